"""The Postgres world while its members change: added, removed and turned back half-way, under all its faults.

Owns the operator, who asks for changes as a person would (pgha/changes.py), gives new members a machine
and removed ones their end. And one checker more: at every change of anything in etcd, what may acknowledge,
by the record and by what is in force at the primary, meets what may elect (I2). At the end the change that
was asked for last is done.

Called by tests/simulation/runner.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from flyd.errors import FlydError
from flyd.ports import Change
from pgha.changes import FEWEST_MEMBERS, request_add, request_remove
from pgha.membership import in_flux, overlap, resting
from tests.simulation.loop import current, stream
from tests.simulation.network import SimulatedKV
from tests.simulation.postgres_world import CLUSTER, HEAL_S, PostgresWorld

OPERATOR = "operator"
SPARE: tuple[str, ...] = ("fra", "gru", "nrt", "syd", "waw")
MOST = 5
CHANGE_S = 60.0  # for the last change, once everything works


class MembersWorld(PostgresWorld):
    """One run."""

    def __init__(self, faults_s: float | None = None) -> None:
        super().__init__(*([] if faults_s is None else [faults_s]))
        self._spare = list(SPARE)
        self._wishes = stream(current().seed, "operator")
        self._kv = SimulatedKV(self.network, self.store, OPERATOR)
        self.store.on_change.append(self._check_overlap)

    async def run(self) -> str:
        """As the Postgres world, with the operator."""
        current().spawn(OPERATOR, self._operate())
        told = await super().run()
        return f"{told}, members {' '.join(self.membership.target)}, {len(self.membership.retired)} removed"

    def _check_overlap(self, _changes: Sequence[Change]) -> None:
        quorum = self.membership.quorum
        if not overlap(quorum):
            current().fail(f"overlap: {quorum}")
        leader = self.leader
        server = None if leader is None else self.hosts[leader.node].server
        if leader is None or server is None or server.in_recovery or server.timeline() != leader.epoch:
            return
        in_force = msgspec.structs.replace(quorum, synchronous=server.synchronous)
        if not overlap(in_force):
            current().fail(f"overlap: {leader.node} goes by {server.synchronous}, and {quorum} elects")

    # ------------------------------------------------------------------ the operator

    async def _operate(self) -> None:
        """Every few seconds, for ever: carry on with what is under way, or wish for something new."""
        while True:
            await asyncio.sleep(self._wishes.uniform(0.3, 3))
            self._bury()
            if self.healing:
                continue
            try:
                async with asyncio.timeout(2):
                    await self._wish()
            except (FlydError, TimeoutError):
                continue  # etcd is away, or it was refused: as a person would, try something else later

    async def _wish(self) -> None:
        record = self.membership
        if not resting(record):
            if self._wishes.random() < 0.3:
                await self._turn_back(self._wishes.choice(in_flux(record)))
            return
        grow = len(record.target) < MOST and self._spare and self._wishes.random() < 0.6
        if len(record.target) <= FEWEST_MEMBERS or grow:
            if self._spare:
                await self._add(self._spare[0])
            return
        await request_remove(self._kv, CLUSTER, self._wishes.choice(record.target))

    async def _add(self, name: str) -> None:
        """The machine first, then the word: as flyd does."""
        if name not in self.hosts:
            self.make_host(name)
            self.nodes = (*self.nodes, name)
            self.start_agent(name)
        await request_add(self._kv, CLUSTER, name)
        self._spare.remove(name)

    async def _turn_back(self, name: str) -> None:
        if name in self.membership.target:
            await request_remove(self._kv, CLUSTER, name)
        elif name not in self.membership.retired:
            await request_add(self._kv, CLUSTER, name)

    def _bury(self) -> None:
        """Who was removed loses its machine and its disk."""
        for name in self.membership.retired:
            if name in self.nodes:
                current().note(f"buried {name}")
                self.nodes = tuple(n for n in self.nodes if n != name)
                self.end_machine(name, dark=True)

    async def heal(self) -> None:
        """And the last change comes to its end."""
        await super().heal()
        await self.wait("the members are as wished", lambda: resting(self.membership), CHANGE_S)
        self._bury()
        await self.wait("all members stream", self.all_stream, HEAL_S)
