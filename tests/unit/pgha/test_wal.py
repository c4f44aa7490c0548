"""Reading and marking a data directory; configuration text."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgha import pgconf, wal
from pgha.membership import settled


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    (tmp_path / "pg_wal").mkdir()
    (tmp_path / "global").mkdir()
    return tmp_path


def segment(data_dir: Path, timeline: int, number: int) -> None:
    (data_dir / "pg_wal" / f"{timeline:08X}{number // 256:08X}{number % 256:08X}").touch()


@pytest.mark.parametrize(
    ("lsn", "expected"),
    [
        (0, 0),
        (5 * wal.SEGMENT_BYTES, 2),  # the last byte is in segment 4, which only timeline 2 has
        (5 * wal.SEGMENT_BYTES + 1, 3),  # segment 5: both, the newer counts
        (6 * wal.SEGMENT_BYTES + 1, 3),
        (300 * wal.SEGMENT_BYTES + 7, 11),
        (400 * wal.SEGMENT_BYTES, 0),
    ],
)
def test_the_timeline_of_a_position(data_dir: Path, lsn: int, expected: int) -> None:
    for timeline, number in ((2, 4), (2, 5), (3, 5), (3, 6), (11, 300)):
        segment(data_dir, timeline, number)
    (data_dir / "pg_wal" / "00000063.history").touch()
    assert wal.timeline_at(data_dir, lsn) == expected


def test_placeholders_take_numbers_and_go_again(data_dir: Path) -> None:
    folder = data_dir / "pg_wal"
    real = "1\t0/1900000\tno recovery target specified\n\n2\t1/5000A0\tno recovery target specified\n"
    (folder / "00000003.history").write_text(real)
    wal.write_placeholders(data_dir, 3, 6)
    assert sorted(p.name for p in folder.iterdir()) == [f"{n:08X}.history" for n in (3, 4, 5)]
    assert (folder / "00000003.history").read_text() == real
    assert wal.switch_lsn(data_dir, 3) == (1 << 32) + 0x5000A0
    assert [wal.began_lsn(data_dir, n) for n in (2, 3, 4)] == [0, (1 << 32) + 0x5000A0, 0]

    wal.drop_placeholders(data_dir)
    assert [p.name for p in folder.iterdir()] == ["00000003.history"]

    # Below a real history they stay: a replica asks for every number in between.
    wal.write_placeholders(data_dir, 4, 6)
    (folder / "00000006.history").write_text(real)
    wal.drop_placeholders(data_dir)
    assert len(list(folder.iterdir())) == 4


def test_the_system_identifier(data_dir: Path) -> None:
    (data_dir / "global" / "pg_control").write_bytes((2**63 + 5).to_bytes(8, "little") + b"rest")
    assert wal.system_id(data_dir) == str(2**63 + 5)


def test_durable_files(tmp_path: Path) -> None:
    path = tmp_path / "promise"
    wal.write_durably(path, "1")
    wal.write_durably(path, "22")
    assert path.read_text() == "22"
    wal.remove_durably(path)
    wal.remove_durably(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("me", "members", "expected"),
    [
        ("db-1", ("db-1", "db-2", "db-3"), 'ANY 1 ("db-2", "db-3")'),
        ("db-2", ("db-1", "db-2"), 'ANY 1 ("db-1")'),
        ("c", ("a", "b", "c", "d", "e"), 'ANY 2 ("a", "b", "d", "e")'),
    ],
)
def test_synchronous_names(me: str, members: tuple[str, ...], expected: str) -> None:
    assert pgconf.synchronous_names(me, settled(members).synchronous) == expected


def test_quoting() -> None:
    conninfo = pgconf.conninfo("[fdaa::1]:5432", "u", "it's", "/p\\x")
    assert "host='fdaa::1' port='5432'" in conninfo
    assert "application_name='it\\'s' passfile='/p\\\\x'" in conninfo
    text = pgconf.server_config(
        me="a",
        synchronous=settled(("a", "b")).synchronous,
        host="h",
        port=1,
        socket_dir="/s",
        primary_conninfo=conninfo,
    )
    assert "application_name=''it\\\\''s''" in text
    assert wal.sql_literal("it's") == "'it''s'"
    assert wal.passfile_escaped("a:b\\c") == "a\\:b\\\\c"
