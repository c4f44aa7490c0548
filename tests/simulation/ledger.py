"""What the simulated Postgres servers promised their clients, checked as it happens.

Owns the checkers of the Postgres world, always on:
- lost: when a node leaves recovery, its WAL holds every row acknowledged in older epochs;
- one owner: no timeline is ever promoted by two nodes;
- two primaries: no acknowledgement in an older epoch of a row that was sent after a newer
  epoch had acknowledged one;
- one history: a standby never streams on top of WAL that its primary does not have.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tests.simulation.loop import current


class Entry(msgspec.Struct, frozen=True):
    """One WAL record. row 0: not a client's (initdb, end of recovery)."""

    timeline: int
    row: int


class Violation(AssertionError):
    """A promise was broken: the finding of a run."""


class Ledger:
    """Every row: when it was sent, who acknowledged it."""

    def __init__(self) -> None:
        self.sent_s: dict[int, float] = {}
        self.acknowledged: dict[int, int] = {}  # row -> epoch
        self.epoch_acknowledged_s: dict[int, float] = {}  # epoch -> its first acknowledgement
        self.owners: dict[int, str] = {}  # timeline -> node

    def send(self) -> int:
        """A new row on its way."""
        row = len(self.sent_s) + 1
        self.sent_s[row] = current().time()
        return row

    def acknowledge(self, row: int, node: str, epoch: int) -> None:
        """The server has told its client that the row is safe."""
        newer = [e for e in sorted(self.epoch_acknowledged_s) if e > epoch]
        if newer and self.sent_s[row] > self.epoch_acknowledged_s[newer[0]]:
            raise Violation(
                f"two primaries: {node} acknowledged row {row} in epoch {epoch}, and the row was sent "
                f"after epoch {newer[0]} had acknowledged its first"
            )
        self.acknowledged[row] = epoch
        self.epoch_acknowledged_s.setdefault(epoch, current().time())

    def promoted(self, node: str, timeline: int, wal: Sequence[Entry]) -> None:
        """A server leaves recovery with this WAL."""
        owner = self.owners.setdefault(timeline, node)
        if owner != node:
            raise Violation(f"one owner: timeline {timeline} of {owner} is promoted again, by {node}")
        self.check_lost(f"{node}, promoted on timeline {timeline},", wal, before_epoch=timeline)

    def check_lost(self, who: str, wal: Sequence[Entry], before_epoch: int) -> None:
        """Every row acknowledged in an older epoch is in this WAL.

        (A node may wake up and promote in an epoch that is over: it owes nothing to newer ones.)
        """
        there = {entry.row for entry in wal}
        owed = (row for row, epoch in self.acknowledged.items() if epoch < before_epoch)
        lost = sorted(row for row in owed if row not in there)
        if lost:
            raise Violation(
                f"lost: {who} lacks {len(lost)} of {len(self.acknowledged)} acknowledged rows: {lost[:5]}"
            )

    def check_prefix(
        self, standby: str, primary: str, ours: Sequence[Entry], theirs: Sequence[Entry]
    ) -> None:
        """What a standby has is what its primary has, as far as it goes."""
        if theirs[: len(ours)] != ours:
            raise Violation(f"one history: {standby} streams from {primary} on top of other WAL")
