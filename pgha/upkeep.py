"""The archive looked after: how far each base backup reaches, and what no kept one needs removed.

A backup goes in this order: its record in the archive (from then on nobody restores from it), its data, its
record in etcd; WAL goes last, judged by the backups that the archive itself still has. So a crash leaves
something to be removed again, never a backup without its WAL.

Called by pgha/backups.py on the primary, one at a time.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path

from flyd.errors import Unavailable
from pgha import archived, backup_plan, wal, wal_history
from pgha.backup_plan import ArchiveState, Reached
from pgha.processes import Tools
from pgha.wal_history import Segment

STALE_S = 86400.0  # a copy on its way in that is this old was cut short
DUMP_S = 60.0
LOOK_BACK = 64  # segments without a commit
COMMIT = re.compile(r"desc: COMMIT (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+) UTC")


def prune(archive: Path, broken: Collection[str], keep: int, now_s: float) -> list[str]:
    """Remove what the newest `keep` good backups do not need; answers which backups went.

    Not while one is being taken. Unavailable or OSError: something could not be read or removed; it is safe
    to try again.
    """
    base, wal_dir = archive / "base", archive / "wal"
    gone = backup_plan.expired(archived.sealed(archive), broken, keep)
    for name in gone:
        wal.remove_durably(base / f"{name}.json")
    kept = [backup.name for backup in archived.sealed(archive)]
    for path in base.iterdir():
        if path.is_dir() and path.name not in kept:
            shutil.rmtree(path)
    first = [archived.base_of(archive, name).first for name in kept]
    for name in wal_history.unneeded(os.listdir(wal_dir), first):
        (wal_dir / name).unlink(missing_ok=True)
    for path in wal_dir.glob(".*"):
        if path.stat().st_mtime < now_s - STALE_S:
            path.unlink(missing_ok=True)
    return gone


async def state(archive: Path, tools: Tools) -> ArchiveState:
    """How far each base backup reaches."""
    known = archived.histories(archive)
    names = os.listdir(archive / "wal")
    last_number = max((at.number for name in names if (at := wal_history.segment(name))), default=0)
    commits: dict[Segment, float] = {}
    found: list[Reached] = []
    for backup in archived.sealed(archive):
        base = archived.base_of(archive, backup.name)
        way = wal_history.ends(known, max(wal_history.newest(known), base.first.timeline))
        if not wal_history.fits(base, way):
            found.append(Reached(backup=backup.name, missing="its own history: it ended in a failover"))
            continue
        last = wal_history.reach(names, base.first, way)
        if last is None:
            found.append(Reached(backup=backup.name, missing=base.first.name()))
            continue
        if last not in commits:
            commits[last] = await _last_commit_s(archive / "wal", last, base.first, tools)
        gap = Segment(last.timeline, last.number + 1).name() if last.number < last_number else ""
        found.append(
            Reached(backup=backup.name, last_segment=last.name(), last_commit_s=commits[last], missing=gap)
        )
    return ArchiveState(reached=tuple(found))


async def _last_commit_s(wal_dir: Path, last: Segment, first: Segment, tools: Tools) -> float:
    """When the newest commit up to that segment was; 0 if there is none near."""
    for number in range(last.number, max(first.number, last.number - LOOK_BACK) - 1, -1):
        path = wal_dir / Segment(last.timeline, number).name()
        if not path.exists():
            return 0.0
        code, said = await tools.attempt(
            "pg_waldump", "--rmgr=Transaction", str(path), env={"TZ": "UTC"}, timeout_s=DUMP_S
        )  # ends with 1 where WAL ends inside the segment
        times = COMMIT.findall(said)
        if times:
            return datetime.fromisoformat(times[-1]).replace(tzinfo=UTC).timestamp()
        if code not in (0, 1):
            raise Unavailable(f"pg_waldump {path} ended with {code}: {said[-300:]}")
    return 0.0


async def pruned(archive: Path, broken: Collection[str], keep: int, now_s: float) -> list[str]:
    """`prune`, beside the loop: it may take long."""
    return await asyncio.to_thread(prune, archive, broken, keep, now_s)
