"""fly postgres import: what is committed, and what is said, when either end fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from flyd.cli.postgres_import import CHUNK_BYTES, copy
from flyd.errors import Refused

COMMIT = "cat > {0}/rows && touch {0}/committed"


def shell(script: str) -> list[str]:
    return ["sh", "-c", script]


def said(text: str) -> None:
    assert text.startswith("copying: ")


def test_all_is_there_before_the_target_commits(tmp_path: Path) -> None:
    size = 5 * CHUNK_BYTES + 1
    assert copy(shell(f"head -c {size} /dev/zero"), shell(COMMIT.format(tmp_path)), said) == size
    assert (tmp_path / "rows").stat().st_size == size
    assert (tmp_path / "committed").exists()


@pytest.mark.parametrize("written", [0, 1, 3 * CHUNK_BYTES])
def test_a_source_that_fails_commits_nothing(tmp_path: Path, written: int) -> None:
    source = shell(f"head -c {written} /dev/zero; echo no such database >&2; exit 1")
    with pytest.raises(Refused, match="could not be read, nothing was imported: no such database"):
        copy(source, shell(COMMIT.format(tmp_path)), said)
    assert not (tmp_path / "committed").exists()


def test_a_target_that_ends_early_says_why(tmp_path: Path) -> None:
    endless = shell("cat /dev/zero")
    with pytest.raises(Refused, match="nothing was imported: relation exists"):
        copy(endless, shell("head -c 10 > /dev/null; echo relation exists >&2; exit 3"), said)


def test_a_target_that_fails_at_the_end_says_why() -> None:
    with pytest.raises(Refused, match="it said nothing"):
        copy(shell("echo rows"), shell("cat > /dev/null; exit 3"), said)


def test_an_interruption_commits_nothing(tmp_path: Path) -> None:
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy(shell("echo rows; sleep 5"), shell(COMMIT.format(tmp_path)), interrupt)
    assert not (tmp_path / "committed").exists()
