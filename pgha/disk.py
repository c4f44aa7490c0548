"""How full a member's disk may get before something is said and done. Pure.

Postgres panics when it cannot write WAL, and takes the lease, its sessions and, on a disk that stays full,
every later start with it. So it stops taking writes before, while there is still room for checkpoints, for
WAL that is not archived yet, and for a person's DELETE. Between `closes` and `opens` lies a gap as wide as
`closes`: it does not open and close again with each checkpoint.

Called by pgha/guard.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

from flyd.model import Value

MB = 1 << 20
GB = 1 << 30
LOW_PART, LOW_LEAST, LOW_MOST = 0.10, 160 * MB, 20 * GB
CLOSES_PART, CLOSES_LEAST, CLOSES_MOST = 0.03, 64 * MB, 2 * GB  # four segments of WAL at least
FAILING_S = 90.0  # Postgres tries again after 60 s: a failure that the next try ends is none


class Level(StrEnum):
    """What a member's disk allows."""

    OK = "ok"
    LOW = "low"
    READ_ONLY = "read-only"


class Room(NamedTuple):
    """What a file system has for Postgres' user."""

    free_bytes: int
    total_bytes: int

    def low(self) -> int:
        """Somebody should look below this."""
        return _between(LOW_LEAST, int(self.total_bytes * LOW_PART), LOW_MOST)

    def closes(self) -> int:
        """No writes below this."""
        return _between(CLOSES_LEAST, int(self.total_bytes * CLOSES_PART), CLOSES_MOST)

    def opens(self) -> int:
        """Writes again above this."""
        return 2 * self.closes()


class Storage(Value, frozen=True, kw_only=True):
    """What a member last said of its disk and of the archive. `failing_since_s` 0: archiving works."""

    node: str
    level: Level = Level.OK
    free_bytes: int = 0
    total_bytes: int = 0
    failing_since_s: float = 0.0
    failing_segment: str = ""
    waiting: int = 0  # segments that are not archived yet, while it fails


class Archiver(NamedTuple):
    """What Postgres says of its archiver; seconds since 1970, 0: never."""

    failed_s: float = 0.0
    failed_segment: str = ""
    archived_s: float = 0.0


def level(rooms: Iterable[Room], before: Level) -> Level:
    """The worst of the file systems that Postgres writes to."""
    found = [_level(room, before) for room in rooms]
    return max(found, key=list(Level).index, default=Level.OK)


def failing_since_s(archiver: Archiver, began_s: float, now_s: float) -> tuple[float, bool]:
    """When the failures began that have not ended (0: there are none), and whether it is time to say so.

    `began_s` is what this answered last.
    """
    if archiver.failed_s <= archiver.archived_s:
        return 0.0, False
    since_s = began_s or archiver.failed_s
    return since_s, now_s >= since_s + FAILING_S


def _level(room: Room, before: Level) -> Level:
    limit = room.opens() if before is Level.READ_ONLY else room.closes()
    if room.free_bytes < limit:
        return Level.READ_ONLY
    return Level.LOW if room.free_bytes < room.low() else Level.OK


def _between(least: int, value: int, most: int) -> int:
    return max(least, min(value, most))
