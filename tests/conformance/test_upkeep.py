"""Retention on a real folder: what goes, in which order, and that a crash only leaves more to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flyd.errors import Refused, Unavailable
from pgha import archive_owner, archived, backups, upkeep
from pgha.archive_owner import ArchiveOwner
from pgha.model import Backup
from pgha.wal_history import Segment

NOW_S = 1e9


def add(archive: Path, name: str, number: int, finished_at_s: float) -> None:
    """A base backup that begins in that segment."""
    folder = archive / "base" / name
    (folder / "pg_wal").mkdir(parents=True)
    ranges = [{"Timeline": 1, "Start-LSN": f"0/{number:02X}000028", "End-LSN": f"0/{number:02X}000100"}]
    (folder / "backup_manifest").write_text(json.dumps({"WAL-Ranges": ranges}))
    backups.seal(archive, Backup(name=name, finished_at_s=finished_at_s))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    (tmp_path / "wal").mkdir()
    for number in range(1, 9):
        (tmp_path / "wal" / Segment(1, number).name()).touch()
    for name in ("00000002.history", "000000010000000000000002.00000028.backup", ".x.pg-1.7"):
        (tmp_path / "wal" / name).touch()
    for n, name in enumerate(("a", "b", "c")):
        add(tmp_path, name, 2 * n + 2, 100.0 * n + 1)
    return tmp_path


def segments(archive: Path) -> list[int]:
    return sorted(at.number for at in (read(p.name) for p in (archive / "wal").iterdir()) if at)


def read(name: str) -> Segment | None:
    return Segment(int(name[:8], 16), int(name[8:], 16)) if len(name) == 24 else None


def names(archive: Path) -> list[str]:
    return [b.name for b in archived.sealed(archive)]


def test_what_no_kept_backup_needs_goes(archive: Path) -> None:
    assert upkeep.prune(archive, (), 2, NOW_S) == ["a"]
    assert (names(archive), segments(archive)) == (["b", "c"], [4, 5, 6, 7, 8])
    left = sorted(p.name for p in (archive / "wal").iterdir() if not read(p.name))
    assert left == [".x.pg-1.7", "00000002.history"]  # the copy on its way is of today
    assert sorted(p.name for p in (archive / "base").iterdir()) == ["b", "b.json", "c", "c.json"]
    assert upkeep.prune(archive, (), 2, NOW_S) == []
    upkeep.prune(archive, (), 2, 1e12)
    assert not (archive / "wal" / ".x.pg-1.7").exists()


def test_a_backup_of_no_use_is_none_of_those_kept(archive: Path) -> None:
    assert upkeep.prune(archive, ("c",), 2, NOW_S) == []
    assert upkeep.prune(archive, ("c",), 1, NOW_S) == ["a"]
    assert (names(archive), segments(archive)) == (["b", "c"], [4, 5, 6, 7, 8])


def test_a_crash_leaves_more_to_do_and_no_backup_without_its_wal(archive: Path) -> None:
    (archive / "base" / "a.json").unlink()  # it died after the first step
    (archive / "base" / "d.new" / "pg_wal").mkdir(parents=True)  # and before: a backup that was cut short
    assert upkeep.prune(archive, (), 2, NOW_S) == []
    assert (names(archive), segments(archive)) == (["b", "c"], [4, 5, 6, 7, 8])
    assert sorted(p.name for p in (archive / "base").iterdir()) == ["b", "b.json", "c", "c.json"]


def test_a_backup_that_cannot_be_read_keeps_all_wal(archive: Path) -> None:
    (archive / "base" / "b" / "backup_manifest").write_text("{}")
    with pytest.raises(Unavailable, match="no readable manifest"):
        upkeep.prune(archive, (), 2, NOW_S)
    assert segments(archive) == list(range(1, 9))


def test_an_archive_that_is_not_mounted_is_not_an_empty_one(archive: Path, tmp_path: Path) -> None:
    member = tmp_path / "member"
    member.mkdir()
    archive_owner.claim(archive, ArchiveOwner(cluster="db", token="t"), member)
    archive_owner.require(archive, member)
    for folder in (tmp_path / "elsewhere", member):
        with pytest.raises(Refused, match="not this cluster's archive now"):
            archive_owner.require(folder, member)
