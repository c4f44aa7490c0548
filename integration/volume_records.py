"""Checksummed records that an application on a volume flushes one by one, and what of them must be in a copy.

The writer's own clock says when each record was asked for and when it was acknowledged; all hosts of these
clusters are on one machine and have that clock, too.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

SUM_CHARS = 16


class Record(NamedTuple):
    """One acknowledged record."""

    line: str
    asked_s: float
    acked_s: float


class Records:
    """A writer that never stops: each record is `<number>-<checksum>`."""

    def __init__(self, keep: Callable[[str], bool]) -> None:
        self.acked: list[Record] = []
        self._keep = keep
        self._done = threading.Event()
        self._writer = threading.Thread(target=self._write)

    def start(self) -> None:
        """Begin to write."""
        self._writer.start()

    def stop(self) -> None:
        """Write no more."""
        self._done.set()
        self._writer.join()

    def _write(self) -> None:
        number = 0
        while not self._done.is_set():
            number += 1
            line, asked_s = f"{number}-{checksum(number)}", time.time()
            if self._keep(line):
                self.acked.append(Record(line, asked_s, time.time()))


def checksum(number: int) -> str:
    """What a record must have."""
    return hashlib.sha256(str(number).encode()).hexdigest()[:SUM_CHARS]


@contextmanager
def recording(keep: Callable[[str], bool]) -> Generator[Records]:
    """Records while the block runs."""
    records = Records(keep)
    records.start()
    try:
        yield records
    finally:
        records.stop()


def damaged(lines: Sequence[str]) -> list[str]:
    """Those that are not as somebody wrote them; other lines than records are not looked at."""
    found: list[str] = []
    for line in lines:
        number, dash, told = line.partition("-")
        if dash and number.isdigit() and told != checksum(int(number)):
            found.append(line)
    return found


def missing(records: Records, lines: Sequence[str], before_s: float = float("inf")) -> list[str]:
    """Records that were acknowledged before then and are not there."""
    there = frozenset(lines)
    return [r.line for r in records.acked if r.acked_s < before_s and r.line not in there]


def untold_s(records: Records, lines: Sequence[str], data_at_s: float) -> float:
    """By how much a copy's data is newer than was said: of its newest record, in seconds. Never much."""
    there = frozenset(lines)
    newest_s = max((r.acked_s for r in records.acked if r.line in there), default=data_at_s)
    return newest_s - data_at_s
