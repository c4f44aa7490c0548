"""docs/incidents_of_others.md names all 36 incidents, and only tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent.parent
TABLE = (ROOT / "docs/incidents_of_others.md").read_text()
FILES = {"I": "integration/test_pgha_incidents.py", "F": "integration/test_pgha.py"}


def rows() -> list[list[str]]:
    lines = [line for line in TABLE.splitlines() if re.match(r"\| \d", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_incident_has_a_verdict() -> None:
    assert [int(row[0]) for row in rows()] == list(range(1, 37))
    for number, _, verdict, _, shown_by in rows():
        assert re.match(r"holds|safe|does not arise|\*\*not held\*\*|not held|not shown", verdict), number
        assert shown_by, number


def test_what_shows_it_exists() -> None:
    for number, _, _, _, shown_by in rows():
        for path in re.findall(r"`([\w/]+/[\w/]+\.py)`", shown_by):
            assert (ROOT / path).exists(), (number, path)
        for file, name in re.findall(r"\b([IF]) `(\w+)`", shown_by):
            assert f"async def {name}(" in (ROOT / FILES[file]).read_text(), (number, name)
