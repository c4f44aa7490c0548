"""Style that matters, as tests: sizes, determinism, generated code, commands in the README.

Limits are put in from the first day: every admired codebase that grew without them rotted
in one file.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("flyd", "pgha", "volumes")
EVERYWHERE = (*PACKAGES, "tests", "integration", "examples", "bench")

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# What nothing but these may ask the system for: the time, chance, processes of its own.
# The rest gets ports.Clock and ports.Entropy, and so runs in the simulator.
CLOCKS = {("time", "time"), ("time", "monotonic"), ("time", "perf_counter"), ("datetime", "now")}
OUTSIDE = (
    "flyd/cli",  # a person is there, with a watch
    "flyd/cluster",  # starts processes on this machine
    "flyd/store/system.py",  # the real clock and the real dice
    "flyd/drivers/process/shim.py",  # a program of its own, without flyd
    "flyd/drivers/process/proc.py",  # waits for the kernel
    "pgha/killer.py",  # a program of its own: the deadline's enforcer
)


def sources(*folders: str) -> Iterator[Path]:
    """Our own Python files below the folders, generated code left out."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "flyd/v1" not in path.as_posix() and "__pycache__" not in path.parts:
                yield path


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_files_are_short() -> None:
    long = {
        name_of(p): n for p in sources(*EVERYWHERE) if (n := len(p.read_text().splitlines())) > MAX_FILE_LINES
    }
    assert not long, f"files over {MAX_FILE_LINES} lines: split by noun: {long}"


def test_functions_are_short() -> None:
    long: dict[str, int] = {}
    for path in sources(*EVERYWHERE):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long[f"{name_of(path)}:{node.lineno} {node.name}"] = lines
    assert not long, f"functions over {MAX_FUNCTION_LINES} lines: {long}"


def outside_calls(path: Path) -> Iterator[str]:
    """Where the file asks the system for time or chance, or starts a task that nobody waits for."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(
            alias.name in ("random", "secrets", "uuid") for alias in node.names
        ):
            yield f"{name_of(path)}:{node.lineno} imports {node.names[0].name}"
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
        if (owner, node.func.attr) in CLOCKS or (
            owner == "asyncio" and node.func.attr in ("create_task", "ensure_future")
        ):
            yield f"{name_of(path)}:{node.lineno} calls {owner}.{node.func.attr}"


def test_time_and_chance_come_from_ports() -> None:
    found = [
        call
        for path in sources(*PACKAGES)
        if not name_of(path).startswith(OUTSIDE)
        for call in outside_calls(path)
    ]
    assert not found, f"take a Clock, an Entropy, a TaskGroup instead: {found}"


def set_names(function: ast.AST) -> set[str]:
    """Local names that hold a set, by a literal, a comprehension, set(...) or an annotation."""
    found: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if ast.unparse(node.annotation).startswith(("set[", "frozenset[")):
                found.add(node.target.id)
        elif isinstance(node, ast.Assign) and is_set(node.value):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def is_set(node: ast.AST) -> bool:
    if isinstance(node, ast.Set | ast.SetComp):
        return True
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("set", "frozenset")
    )


def test_no_iteration_over_sets() -> None:
    """The order of a set of strings follows PYTHONHASHSEED: a decision made in it can't be replayed."""
    found: list[str] = []
    for path in sources(*PACKAGES):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            names = set_names(function)
            for node in ast.walk(function):
                iterated = node.iter if isinstance(node, ast.For | ast.AsyncFor | ast.comprehension) else None
                if iterated is None or (isinstance(node, ast.comprehension) and only_counts(function, node)):
                    continue
                if is_set(iterated) or (isinstance(iterated, ast.Name) and iterated.id in names):
                    found.append(f"{name_of(path)}:{iterated.lineno} iterates over {ast.unparse(iterated)}")
    assert not found, f"sort it first: {found}"


def only_counts(function: ast.AST, comprehension: ast.comprehension) -> bool:
    """A set made from a set, or sorted(), any(), all(), sum() over one, has no order to lose."""
    for node in ast.walk(function):
        if isinstance(node, ast.SetComp) and comprehension in node.generators:
            return True
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            safe = node.func.id in ("sorted", "any", "all", "sum", "min", "max", "len", "set", "frozenset")
            if safe and any(
                isinstance(a, ast.GeneratorExp) and comprehension in a.generators for a in node.args
            ):
                return True
    return False


def test_generated_code_is_current(tmp_path: Path) -> None:
    subprocess.run([ROOT / "scripts/proto.sh", tmp_path], check=True, capture_output=True)
    fresh = {p.name: p.read_text() for p in (tmp_path / "flyd/v1").iterdir() if p.is_file()}
    committed = {p.name: p.read_text() for p in (ROOT / "flyd/v1").iterdir() if p.is_file()}
    assert sorted(fresh) == sorted(committed)
    stale = [name for name in sorted(fresh) if fresh[name] != committed[name]]
    assert not stale, f"run `make proto`: {stale}"


def readme_commands() -> list[str]:
    """Lines of ```console blocks in the README that begin with `$ `."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [
        line[2:].partition("  #")[0].strip()
        for block in blocks
        for line in block.splitlines()
        if line.startswith("$ ")
    ]


def test_readme_commands_exist() -> None:
    """Every command of the README is a make target or a `fly` verb that exists (integration runs them)."""
    from click.testing import CliRunner

    from flyd.cli.main import fly

    commands = readme_commands()
    assert commands, "the README shows no command"
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands:
        words = command.split()
        if words[0] == "make":
            assert words[1] in targets, command
        elif words[0] == "fly":
            verbs = [w for w in words[1:] if not w.startswith("-")][:2]
            result = CliRunner().invoke(fly, [*verbs[:1], "--help"])
            assert result.exit_code == 0, command
        else:
            assert words[0] in ("git", "cd", "curl", "export"), f"who runs this one? {command}"


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_say_what_they_own(package: str) -> None:
    silent = [
        name_of(p)
        for p in sources(package)
        if p.read_text().strip() and ast.get_docstring(ast.parse(p.read_text())) is None
    ]
    assert not silent, f"no module docstring: {silent}"
