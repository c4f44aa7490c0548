"""The documents do not lie where that can be checked: the diagram, files, commands, examples."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import click
import msgspec
import pytest

from flyd.cli.main import fly
from flyd.hosts.config import HostConfig
from flyd.machines.states import diagram

ROOT = Path(__file__).parent.parent.parent
DOCS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FOLDERS = ("flyd", "pgha", "volumes", "tests", "integration", "bench", "examples", "docs", "proto", "scripts")


def names(paths: tuple[Path, ...]) -> list[str]:
    return [path.name for path in paths]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


def test_the_lifecycle_is_the_table() -> None:
    assert blocks(ROOT / "docs/machines.md", "mermaid") == [diagram()]


def test_the_host_configuration_is_valid() -> None:
    (example,) = blocks(ROOT / "docs/operations.md", "toml")
    msgspec.convert(tomllib.loads(example), HostConfig)


@pytest.mark.parametrize("path", DOCS, ids=names(DOCS))
def test_named_files_exist(path: Path) -> None:
    named = set(re.findall(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w/.-]*[\w/]", path.read_text()))
    missing = [name for name in sorted(named) if not (ROOT / name).exists()]
    assert not missing, f"{path.name} names what is not there: {missing}"


@pytest.mark.parametrize("path", DOCS, ids=names(DOCS))
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing, f"{path.name} links to what is not there: {missing}"


@pytest.mark.parametrize("path", DOCS, ids=names(DOCS))
def test_commands_are_verbs(path: Path) -> None:
    lines = re.findall(r"(?:`|^\$ )(?:FLY_API=\S+ )?fly ([^`\n]+)", path.read_text(), re.MULTILINE)
    for line in lines:
        words = [word for word in line.partition("#")[0].split() if not word.startswith("-")]
        context = click.Context(fly)
        command = fly.get_command(context, words[0])
        assert command is not None, f"{path.name}: fly {line}"
        if isinstance(command, click.Group) and len(words) > 1:
            assert command.get_command(context, words[1]) is not None, f"{path.name}: fly {line}"
