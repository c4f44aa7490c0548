"""No decision looks at a wall clock (incident 16: somebody sets it an hour back during an outage)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import pgha

DECIDING = ("agent", "acts", "decide", "extension", "observe", "suspicion", "term", "killer", "lookout")
STAMPS = ("since_s", "requested_at_s", "updated_at_s", "at_s")  # what is stored of a wall clock
FOLDER = Path(pgha.__file__).parent


def looks(tree: ast.AST) -> list[int]:
    """Lines that do anything with a wall clock but pass it on under the name of a stamp."""
    passed_on = {
        id(node.value.func if isinstance(node.value, ast.Call) else node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg in STAMPS
    }
    wall = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("wall_s", *STAMPS)]
    named = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("time", "now")]
    return [node.lineno for node in (*wall, *named) if id(node) not in passed_on]


@pytest.mark.parametrize("module", DECIDING)
def test_a_wall_clock_is_written_down_and_never_looked_at(module: str) -> None:
    assert looks(ast.parse((FOLDER / f"{module}.py").read_text())) == []


@pytest.mark.parametrize(
    "line",
    ["x = clock.wall_s()", "if lease.since_s < 5: pass", "f(now=clock.wall_s())", "time.time()"],
)
def test_a_look_would_be_found(line: str) -> None:
    assert looks(ast.parse(line)) == [1]
