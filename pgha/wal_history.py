"""What an archive's names mean: timelines, where each ended, and which bytes of which segment are history.

A timeline that was left goes on existing in the archive past its fork: the segment of the fork has leftovers
behind it, and what an old primary wrote that nobody ever had may be there as whole segments. Nothing of that
is history. `ends` says where each timeline on the way to a target ended, `valid_bytes` what counts of a
file, and a restore sees nothing else (newdata.py). Retention keeps by segment number alone, as
pg_archivecleanup does: see `unneeded`.

Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from pgha.model import FIRST_TIMELINE
from pgha.wal import PLACEHOLDER, SEGMENT_BYTES, SEGMENTS_PER_LOG

SEGMENT = re.compile(r"([0-9A-F]{8})([0-9A-F]{8})([0-9A-F]{8})")
NAMED = re.compile(r"([0-9A-F]{8})([0-9A-F]{8})([0-9A-F]{8})(\.partial|\.[0-9A-F]{8}\.backup)?")
HISTORY = re.compile(r"([0-9A-F]{8})\.history")


class Segment(NamedTuple):
    """A segment file's place."""

    timeline: int
    number: int  # its first byte's LSN / SEGMENT_BYTES

    def name(self) -> str:
        """As Postgres calls it."""
        log, low = divmod(self.number, SEGMENTS_PER_LOG)
        return f"{self.timeline:08X}{log:08X}{low:08X}"


class Fork(NamedTuple):
    """Where a timeline was left."""

    timeline: int
    lsn: int


class Base(NamedTuple):
    """The WAL that a base backup needs to be whole."""

    first: Segment
    end_lsn: int


Histories = Mapping[int, tuple[Fork, ...]]  # of each timeline: all that came before it, oldest first


def segment(name: str) -> Segment | None:
    """Of a whole segment's name; None for any other."""
    found = SEGMENT.fullmatch(name)
    return None if found is None else _place(found)


def numbered(name: str) -> int | None:
    """The segment number of whatever goes with a segment: itself, its .partial, its .backup."""
    found = NAMED.fullmatch(name)
    return None if found is None else _place(found).number


def forks(text: str) -> tuple[Fork, ...] | None:
    """A history file's lines; None for a placeholder."""
    if text.startswith(PLACEHOLDER):
        return None
    found: list[Fork] = []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            timeline, lsn = line.split()[:2]
            high, _, low = lsn.partition("/")
            found.append(Fork(int(timeline), (int(high, 16) << 32) + int(low, 16)))
    return tuple(found)


def newest(histories: Histories) -> int:
    """The timeline on which the cluster goes on: a take-over always takes a greater number."""
    return max(histories, default=FIRST_TIMELINE)


def ends(histories: Histories, timeline: int) -> dict[int, int | None]:
    """Every timeline on the way to this one and the LSN at which it was left; None: not left."""
    return {f.timeline: f.lsn for f in histories.get(timeline, ())} | {timeline: None}


def fits(base: Base, way: Mapping[int, int | None]) -> bool:
    """Whether all of the base backup is of this history, nothing of what an old primary did alone."""
    if base.first.timeline not in way:
        return False
    end = way[base.first.timeline]
    return end is None or base.end_lsn <= end


def valid_bytes(at: Segment, way: Mapping[int, int | None]) -> int:
    """How many bytes of this file are history; 0: it has no part in it."""
    if at.timeline not in way:
        return 0
    end = way[at.timeline]
    return SEGMENT_BYTES if end is None else min(max(end - at.number * SEGMENT_BYTES, 0), SEGMENT_BYTES)


def reach(names: Iterable[str], base: Segment, way: Mapping[int, int | None]) -> Segment | None:
    """The last segment that Postgres gets to from the base backup's first one; None: not even to that.

    Where a timeline was left inside a segment, the next one's file of that number has the bytes of both, and
    only with it can Postgres go on.
    """
    there = {at for name in names if (at := segment(name)) is not None and valid_bytes(at, way)}
    last, number = None, base.number
    while True:
        right = Segment(_owner(way, number), number)
        found = [Segment(timeline, number) for timeline in way if Segment(timeline, number) in there]
        if right not in there:
            return max(found, default=last)
        last, number = right, number + 1


def _owner(way: Mapping[int, int | None], number: int) -> int:
    """The timeline of the last byte of that segment: the oldest that was not left before."""
    return min(t for t, end in way.items() if end is None or end >= (number + 1) * SEGMENT_BYTES)


def unneeded(names: Iterable[str], kept: Sequence[Segment]) -> list[str]:
    """What no base backup needs of those that begin at `kept`. History files are always needed.

    By number and not by timeline, so that a segment of a parent timeline goes only when its children's do.
    With nothing kept there is nothing to go by: everything stays.
    """
    if not kept:
        return []
    first = min(base.number for base in kept)
    return [name for name in names if (number := numbered(name)) is not None and number < first]


def _place(found: re.Match[str]) -> Segment:
    timeline, log, low = (int(part, 16) for part in found.groups()[:3])
    return Segment(timeline, log * SEGMENTS_PER_LOG + low)
