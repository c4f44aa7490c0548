"""A voter's own look at the primary: asks it whether it is there, as soon as something is odd.

Odd is: our stream from it has ended, or its lease is overdue (LATE_S). As long as neither is
so nothing is asked, so in quiet times this costs nothing. What the answers are good for is decided in
pgha/decide.py (`evidence`); this loop only keeps the series of bad ones, and wakes the agent.

A primary whose WAL comes is not silent. So the agent is woken at the first question already, to look how far
our WAL goes: what came before it says nothing, only what comes from then on.

Made and run by pgha/agent.py.
"""

from __future__ import annotations

import asyncio

from flyd.model import PostgresLeader
from flyd.ports import Clock
from pgha.model import LATE_S, SILENT_S, Answer, Sighting, Status
from pgha.observe import ClusterRecords
from pgha.ports import Lookout

AGAIN_S = 0.03  # after a bad answer
REASSURED_S = 0.3  # after a good one
IDLE_S = 0.05  # at least this long between two looks at the lease
HAIR_S = 0.003  # past SILENT_S: what is decided by it is decided at once, not after another question
LOOK_S = 0.1  # our WAL must be looked at this soon after a question, or silence counts from that look only


class Suspicion:
    """What this voter has seen of the present primary."""

    def __init__(self, node: str, lookout: Lookout, clock: Clock, records: ClusterRecords) -> None:
        self._node = node
        self._lookout = lookout
        self._clock = clock
        self._records = records
        self._streaming = False
        self._flushed_lsn = 0
        self._look_due = False  # what our WAL has grown by until the next look came before our question
        self._looked_s = 0.0  # that look
        self._heard_s = 0.0  # WAL came, by a later look
        self._wake = asyncio.Event()
        self.sighting = Sighting()

    def saw(self, status: Status) -> None:
        """Our own Postgres, as it was just observed: whoever sends us WAL is not silent."""
        now_s = self._clock.monotonic_s()
        if self._look_due:
            self._look_due, self._looked_s = False, now_s
        elif status.streaming and status.flushed_lsn != self._flushed_lsn:
            self._heard_s = now_s
            if self.sighting.silent_since_s:
                self.sighting = Sighting(epoch=self.sighting.epoch)
        self._streaming, self._flushed_lsn = status.streaming, status.flushed_lsn

    def lost_stream(self) -> None:
        """Our walreceiver may just have ended: look now."""
        self._streaming = False
        self._wake.set()

    async def watch(self) -> None:
        """Ask while something is odd, for ever."""
        while True:
            leader = self._suspect()
            if leader is None:
                self.sighting = Sighting()
                await self._pause(
                    max(IDLE_S, self._records.lease_seen_s + LATE_S - self._clock.monotonic_s())
                )
                continue
            asked_s = self._clock.monotonic_s()
            if not self.sighting.silent_since_s:
                self._look_due = True
                self._records.poke()
            answer = await self._lookout.ask(leader.address, SILENT_S)
            since_s = self._silent_since_s(asked_s) if answer is Answer.SILENT else asked_s
            if since_s == 0:
                self.sighting = Sighting(epoch=leader.epoch)
                await asyncio.sleep(AGAIN_S)
                continue
            self.sighting = _continued(self.sighting, leader.epoch, answer, since_s)
            if answer is Answer.ANSWERED:
                await self._pause(REASSURED_S)
                continue
            if answer is Answer.SILENT:
                await asyncio.sleep(max(0.0, since_s + SILENT_S + HAIR_S - self._clock.monotonic_s()))
            self._records.poke()
            await asyncio.sleep(AGAIN_S)

    def _silent_since_s(self, asked_s: float) -> float:
        """Since when neither an answer nor WAL came, by a question left unanswered; 0: that is not known."""
        if self._heard_s >= asked_s:
            return 0.0
        if self.sighting.silent_since_s or asked_s <= self._looked_s <= asked_s + LOOK_S:
            return asked_s
        return self._looked_s if self._looked_s > asked_s else 0.0

    def _suspect(self) -> PostgresLeader | None:
        """The primary, if there is a reason to ask it."""
        leader, lease = self._records.leader(), self._records.lease()
        if leader is None or leader.node == self._node or not leader.serving:
            return None
        if lease is None or lease.released:
            return None
        late = self._clock.monotonic_s() - self._records.lease_seen_s >= LATE_S
        return leader if late or not self._streaming else None

    async def _pause(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        except TimeoutError:
            return
        self._wake.clear()


def _continued(before: Sighting, epoch: int, answer: Answer, asked_s: float) -> Sighting:
    """The series with one more answer: another kind, or another primary, begins a new one."""
    same = before if before.epoch == epoch else Sighting()
    if answer is Answer.REFUSED:
        return Sighting(epoch=epoch, refused_since_s=same.refused_since_s or asked_s)
    if answer is Answer.SILENT:
        return Sighting(epoch=epoch, silent_since_s=same.silent_since_s or asked_s)
    return Sighting(epoch=epoch)
