"""What is in an archive: its base backups, its timelines, and the part of its WAL that is history.

    <archive>/owner             archive_owner.py
    <archive>/wal/<segment>     archive.py
    <archive>/base/<name>/      a data directory by pg_basebackup, whole with the WAL that it needs
    <archive>/base/<name>.json  a Backup (model.py); written last: without it the backup is not there

Reads only. Called by pgha/newdata.py and pgha/upkeep.py.
"""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path

import msgspec

from flyd.errors import InvalidInput, Refused, Unavailable
from pgha import wal_history
from pgha.model import Backup
from pgha.wal import SEGMENT_BYTES
from pgha.wal_history import Base, Fork, Segment

CHUNK_BYTES = 1 << 20


def sealed(archive: Path) -> list[Backup]:
    """The base backups that may be restored from, oldest first."""
    found = [msgspec.json.decode(p.read_bytes(), type=Backup) for p in (archive / "base").glob("*.json")]
    return sorted(found, key=lambda backup: backup.finished_at_s)


def base_of(archive: Path, name: str) -> Base:
    """Which WAL that backup needs, by the manifest that pg_basebackup left in it."""
    path = archive / "base" / name / "backup_manifest"
    try:
        ranges = json.loads(path.read_text())["WAL-Ranges"]
        first, last = ranges[0], ranges[-1]
        return Base(
            Segment(int(first["Timeline"]), _lsn(first["Start-LSN"]) // SEGMENT_BYTES),
            _lsn(last["End-LSN"]),
        )
    except (OSError, ValueError, LookupError) as error:
        raise Unavailable(f"the base backup {name} has no readable manifest: {path}: {error}") from error


def histories(archive: Path) -> dict[int, tuple[Fork, ...]]:
    """Every timeline that was begun, and what came before it."""
    found: dict[int, tuple[Fork, ...]] = {}
    for path in (archive / "wal").glob("*.history"):
        at = wal_history.HISTORY.fullmatch(path.name)
        forks = wal_history.forks(path.read_text())
        if at is not None and forks is not None:
            found[int(at[1], 16)] = forks
    return found


def chosen(archive: Path, before: str) -> Backup:
    """The newest base backup of the newest history that ended before that time (ISO 8601; empty: any)."""
    limit_s = instant_s(before) if before else float("inf")
    known = histories(archive)
    for backup in reversed(sealed(archive)):
        base = base_of(archive, backup.name)
        timeline = max(wal_history.newest(known), base.first.timeline)
        if backup.finished_at_s <= limit_s and wal_history.fits(base, wal_history.ends(known, timeline)):
            return backup
    raise Refused(
        f"no base backup in {archive} ended before {before or 'now'}",
        hint="`fly postgres backup list` shows those that there are",
    )


def lay_out(archive: Path, base: Base, folder: Path) -> int:
    """Make a folder of just that WAL which a restore from there may read; answers the timeline to restore to.

    Links, and cut copies where a timeline was left inside a segment: see wal_history.py.
    """
    known = histories(archive)
    timeline = max(wal_history.newest(known), base.first.timeline)
    way = wal_history.ends(known, timeline)
    folder.mkdir()
    for path in (archive / "wal").iterdir():
        at, history = wal_history.segment(path.name), wal_history.HISTORY.fullmatch(path.name)
        count = 0 if at is None or at.number < base.first.number else wal_history.valid_bytes(at, way)
        if count == SEGMENT_BYTES or (history is not None and int(history[1], 16) in way):
            (folder / path.name).symlink_to(path)
        elif count:
            _cut(path, folder / path.name, count)
    return timeline


def instant_s(text: str) -> float:
    """Seconds since 1970 of an ISO 8601 time with its offset from UTC."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        when = None
    if when is None or when.tzinfo is None:
        raise InvalidInput(f"{text!r} is no time", hint="for example 2026-11-23T21:04:05.678+00:00")
    return when.timestamp()


def _cut(source: Path, target: Path, count: int) -> None:
    """A file of the same length with nothing behind `count`: Postgres finds the end of WAL there."""
    with source.open("rb") as whole, target.open("wb") as part:
        left = count
        while left and (chunk := whole.read(min(left, CHUNK_BYTES))):
            part.write(chunk)
            left -= len(chunk)
        os.ftruncate(part.fileno(), SEGMENT_BYTES)


def _lsn(text: str) -> int:
    high, _, low = text.partition("/")
    return (int(high, 16) << 32) + int(low, 16)
