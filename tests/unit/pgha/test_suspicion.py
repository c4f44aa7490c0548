"""When a voter takes the primary for silent: soon after it fell silent, never while its WAL comes."""

from __future__ import annotations

import asyncio

from flyd.model import PostgresLeader, encode
from flyd.ports import Put
from pgha import keys
from pgha.model import LATE_S, OVERDUE_S, RENEW_S, SILENT_S, Answer, Lease, Status
from pgha.observe import ClusterRecords
from pgha.suspicion import AGAIN_S, Suspicion
from tests.simulation.loop import current, run
from tests.simulation.network import Network, SimulatedClock, SimulatedKV, Store

CALM_S = 1.0  # an agent with nothing to do looks at its Postgres this often
A_WRITE_S = 0.005


class World:
    """Voter `b`, who follows `a`: what `a` does, and `b`'s agent as far as it looks at its own Postgres."""

    def __init__(self) -> None:
        self.store = Store()
        self.records = ClusterRecords("db", SimulatedKV(Network(), self.store, "b"), SimulatedClock())
        self.suspicion = Suspicion("b", self, SimulatedClock(), self.records)
        self.answers = self.renews = self.writes = self.looks = True
        self.lsn = 0
        self.silent = False  # what the agent found
        self.slow_s = 0.0  # how long the agent takes to look
        leader = PostgresLeader(cluster="db", epoch=4, node="a", address="a:1", serving=True)
        self.store.txn((), (Put(keys.postgres_leader("db"), encode(leader)),))

    async def ask(self, address: str, timeout_s: float) -> Answer:
        """ports.Lookout."""
        if self.answers:
            return Answer.ANSWERED
        await asyncio.sleep(timeout_s)
        return Answer.SILENT

    async def renew(self) -> None:
        count = 0
        while True:
            if self.renews:
                count += 1
                lease = Lease(epoch=4, node="a", count=count)
                self.store.txn((), (Put(keys.lease("db"), encode(lease)),))
                await self.records.refresh()
            await asyncio.sleep(RENEW_S)

    async def insert(self) -> None:
        while True:
            self.lsn += self.writes
            await asyncio.sleep(A_WRITE_S)

    async def look(self) -> None:
        while True:
            await asyncio.sleep(self.slow_s)
            if self.looks:
                self.suspicion.saw(Status(running=True, ready=True, streaming=True, flushed_lsn=self.lsn))
            since_s = self.suspicion.sighting.silent_since_s  # decided in the same turn, as the agent does
            self.silent = self.silent or bool(since_s and current().time() - since_s >= SILENT_S)
            await self.records.wait_change(CALM_S, renewals=False)

    async def silent_for_s(self, limit_s: float) -> float:
        """How old the lease is when silence counts; `limit_s` if it does not by then."""
        while current().time() - self.records.lease_seen_s < limit_s and not self.silent:
            await asyncio.sleep(0.001)
        return current().time() - self.records.lease_seen_s


def measured(
    answers: bool, renews: bool, writes: bool, looks: bool, limit_s: float, slow_s: float = 0.0
) -> float:
    """After some quiet seconds these things stop: how old the lease is when `b` has seen silence."""
    found: list[float] = []

    async def main() -> None:
        world = World()
        world.slow_s = slow_s
        async with asyncio.TaskGroup() as group:
            works = (world.renew(), world.insert(), world.look(), world.suspicion.watch())
            tasks = [group.create_task(work) for work in works]
            await asyncio.sleep(3.3)
            world.answers, world.renews, world.writes, world.looks = answers, renews, writes, looks
            found.append(await world.silent_for_s(limit_s))
            for task in tasks:
                task.cancel()

    run(1, main)
    return found[0]


def test_a_busy_primary_that_falls_silent_is_seen_by_the_first_question() -> None:
    age_s = measured(answers=False, renews=False, writes=False, looks=True, limit_s=9.0)
    assert LATE_S + SILENT_S <= age_s < OVERDUE_S + AGAIN_S


def test_on_a_slow_machine_silence_counts_from_the_look_at_the_wal() -> None:
    age_s = measured(answers=False, renews=False, writes=False, looks=True, limit_s=9.0, slow_s=0.25)
    assert LATE_S + 0.25 + SILENT_S <= age_s < OVERDUE_S + 0.25 + 0.25 + AGAIN_S  # a slow look more to decide


def test_who_sends_wal_is_not_silent_though_its_port_and_its_lease_are() -> None:
    assert measured(answers=False, renews=False, writes=True, looks=True, limit_s=9.0) >= 9.0
    assert measured(answers=False, renews=False, writes=True, looks=True, limit_s=9.0, slow_s=0.25) >= 9.0


def test_who_answers_is_not_silent_though_nothing_else_comes() -> None:
    assert measured(answers=True, renews=False, writes=False, looks=True, limit_s=9.0) >= 9.0


def test_silence_counts_only_if_somebody_looked_at_the_wal() -> None:
    assert measured(answers=False, renews=False, writes=False, looks=False, limit_s=9.0) >= 9.0
