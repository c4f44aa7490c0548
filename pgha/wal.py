"""Reading and marking a data directory: where WAL ends, timelines, small durable files.

What a position is: `lsn` is the end of flushed WAL, `timeline` that of the segment file which
holds its last byte. A standby opens a segment of a newer timeline only once it has all of
the older one up to the fork, so the newest file that holds the byte tells the true epoch.

Called by pgha/postgres.py. Changes nothing but history placeholders and the files that it is given.
"""

from __future__ import annotations

import os
from pathlib import Path

SEGMENT_BYTES = 16 * 1024 * 1024  # initdb's default
SEGMENTS_PER_LOG = 0x1_0000_0000 // SEGMENT_BYTES
PLACEHOLDER = "# pgha placeholder: this timeline number is taken\n"

# What the startup process waits for when it has replayed all WAL there is here.
IDLE_WAITS = ("RecoveryRetrieveRetryInterval", "RecoveryWalStream")

STATUS_SQL = """
SELECT r,
       (pg_last_wal_receive_lsn() - '0/0'::pg_lsn)::bigint,
       (pg_last_wal_replay_lsn() - '0/0'::pg_lsn)::bigint,
       CASE WHEN NOT r THEN (pg_current_wal_flush_lsn() - '0/0'::pg_lsn)::bigint END,
       CASE WHEN NOT r THEN ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int END,
       CASE WHEN r THEN (SELECT wait_event FROM pg_stat_activity WHERE backend_type = 'startup') END,
       CASE WHEN r THEN (SELECT pid FROM pg_stat_wal_receiver WHERE status = 'streaming') END
FROM pg_is_in_recovery() AS r
"""

REPLICAS_SQL = """
SELECT application_name, (flush_lsn - '0/0'::pg_lsn)::bigint, state = 'streaming'
FROM pg_stat_replication ORDER BY application_name, flush_lsn
"""


def system_id(data_dir: Path) -> str:
    """The cluster's identity: the first eight bytes of pg_control."""
    with (data_dir / "global" / "pg_control").open("rb") as control:
        return str(int.from_bytes(control.read(8), "little"))


def postmaster_pid(data_dir: Path) -> int:
    """Of the server that says it runs here; 0 if none does."""
    try:
        first = (data_dir / "postmaster.pid").read_text().partition("\n")[0]
    except FileNotFoundError:
        return 0
    return int(first) if first.strip().isdigit() else 0


def timeline_at(data_dir: Path, lsn: int) -> int:
    """The newest timeline of which there is a segment with the byte before `lsn`; 0 if none."""
    if lsn <= 0:
        return 0
    number = (lsn - 1) // SEGMENT_BYTES
    tail = f"{number // SEGMENTS_PER_LOG:08X}{number % SEGMENTS_PER_LOG:08X}"
    return max(
        (int(n[:8], 16) for n in os.listdir(data_dir / "pg_wal") if len(n) == 24 and n.endswith(tail)),
        default=0,
    )


def switch_lsn(data_dir: Path, timeline: int) -> int:
    """Where `timeline` left its parent: the last line of its history file."""
    text = _history(data_dir, timeline).read_text()
    lines = [line.split("\t") for line in text.splitlines() if line.strip() and not line.startswith("#")]
    high, _, low = lines[-1][1].partition("/")
    return (int(high, 16) << 32) + int(low, 16)


def began_lsn(data_dir: Path, timeline: int) -> int:
    """As `switch_lsn`; 0 for the first timeline, and where its history file is not here."""
    path = _history(data_dir, timeline)
    if not path.exists() or path.read_text().startswith(PLACEHOLDER):
        return 0
    return switch_lsn(data_dir, timeline)


def write_placeholders(data_dir: Path, first: int, end: int) -> None:
    """Take the timeline numbers `first` to `end` - 1, so that Postgres' next choice is `end`."""
    for timeline in range(first, end):
        path = _history(data_dir, timeline)
        if not path.exists():
            path.write_text(PLACEHOLDER)


def drop_placeholders(data_dir: Path) -> None:
    """Remove those above the newest real history: a server that starts must not take one for its target."""
    for name in sorted(os.listdir(data_dir / "pg_wal"), reverse=True):
        if name.endswith(".history"):
            path = data_dir / "pg_wal" / name
            if not path.read_text().startswith(PLACEHOLDER):
                return
            path.unlink()


def write_durably(path: Path, text: str) -> None:
    """Replace the file; on return it would survive a power cut."""
    partial = path.with_name(path.name + ".new")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    _sync_directory(path.parent)


def remove_durably(path: Path) -> None:
    """Remove the file; on return that would survive a power cut."""
    path.unlink(missing_ok=True)
    _sync_directory(path.parent)


def sql_literal(text: str) -> str:
    """A string constant of SQL (standard_conforming_strings is on)."""
    return "'" + text.replace("'", "''") + "'"


def passfile_escaped(text: str) -> str:
    """A field of a password file."""
    return text.replace("\\", "\\\\").replace(":", "\\:")


def _history(data_dir: Path, timeline: int) -> Path:
    return data_dir / "pg_wal" / f"{timeline:08X}.history"


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
