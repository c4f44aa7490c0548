"""When etcd does not answer: the primary goes on while a quorum of voters bears with it.

A holder that cannot renew its lease asks the other members directly (`Pleas`). One that hears nothing from
etcd either says yes (`Extensions`): from then on it casts no vote against this holder's epoch for TTL_S by
its own monotonic clock, unless the holder gives the lease back. Together with the holder, whose Postgres
runs and so cannot vote, ANY k such voters leave fewer than it takes to elect: no round can end before the
holder is dead, at the time *before* it asked + TTL_S - MARGIN_S. It is the lease's own arithmetic.

A voter that reaches etcd says no: then a take-over is possible, and better than a primary that the rest of
the cluster cannot see. For GRACE_S after etcd was last silent to it, it still says yes, so that the
holder has time to come back, too. One that has begun to vote on a lease says no until it sees a newer one.

Made by pgha/agent.py. Write safety does not rest on this file (README.md): it bounds stale reads.
"""

from __future__ import annotations

import asyncio
import math

import structlog

from flyd.errors import Unavailable
from flyd.ports import KV, Clock
from pgha import keys
from pgha.membership import settled, words_needed
from pgha.model import ANY_EPOCH, GRACE_S, TTL_S, AgentConfig, Extension, Plea
from pgha.observe import ClusterRecords
from pgha.ports import Voice
from pgha.term import Term

log = structlog.get_logger(__name__)

LOOK_S = 0.35  # etcd has this long for an answer, while the holder waits for ours
LOOK_EVERY_S = 1.0  # while it is known to be silent
PLEA_TIMEOUT_S = 0.5
AGAIN_S = 0.2  # between two pleas
IDLE_S = 0.1  # at least this long between two looks at the term


class Extensions:
    """What this voter has told holders, and whether it may tell them more."""

    def __init__(self, config: AgentConfig, kv: KV, clock: Clock, records: ClusterRecords) -> None:
        self._config = config
        self._kv = kv
        self._clock = clock
        self._records = records
        self._closed: int | None = None  # newest lease revision that we began to vote on; None: not read yet
        self._looked_s = -math.inf
        self._dark_s = -math.inf  # when etcd last left us without an answer
        self.given = Extension(epoch=ANY_EPOCH, until_s=clock.monotonic_s() + TTL_S)

    def promised(self, revision: int) -> None:
        """What the disk says of our last vote."""
        self._closed = max(revision, self._closed or 0)

    def close(self, revision: int) -> bool:
        """We are about to vote on this lease revision. False: not yet, we told its holder to go on."""
        lease = self._records.lease()
        bound = lease is not None and not lease.released and self.given.epoch in (lease.epoch, ANY_EPOCH)
        if bound and self._clock.monotonic_s() < self.given.until_s:
            return False
        self.promised(revision)
        return True

    async def answer(self, plea: Plea) -> bool:
        """Whether this holder may go on without etcd."""
        if not self._may(plea):
            return False
        if self._clock.monotonic_s() - self._dark_s >= LOOK_EVERY_S:
            await self._look()
        now = self._clock.monotonic_s()
        if now - self._dark_s >= GRACE_S or not self._may(plea):
            return False
        if self.given.epoch != plea.epoch or now >= self.given.until_s:
            log.warning("pgha.extended", node=self._config.node, holder=plea.node, epoch=plea.epoch)
        self.given = Extension(epoch=plea.epoch, until_s=now + TTL_S)
        return True

    def _may(self, plea: Plea) -> bool:
        """It holds the lease as far as we know, and we have begun no vote on it."""
        lease, records = self._records.lease(), self._records
        if lease is None or lease.released or self._closed is None or plea.cluster != self._config.cluster:
            return False
        if (plea.node, plea.epoch) != (lease.node, lease.epoch) or plea.node == self._config.node:
            return False
        voted = any(vote.node == self._config.node for vote in records.votes())
        return self._closed < records.lease_revision and not voted

    async def _look(self) -> None:
        """Ask etcd for anything at all; one question at a time, the others take what it brought."""
        now = self._clock.monotonic_s()
        if now - self._looked_s < LOOK_S:
            return
        self._looked_s = now
        try:
            async with asyncio.timeout(LOOK_S):
                await self._kv.get(keys.lease(self._config.cluster))
        except (Unavailable, TimeoutError):
            self._dark_s = self._clock.monotonic_s()


class Pleas:
    """The holder's side: asks for time whenever its lease is overdue."""

    def __init__(
        self, config: AgentConfig, voice: Voice, clock: Clock, records: ClusterRecords, term: Term
    ) -> None:
        self._config = config
        self._voice = voice
        self._clock = clock
        self._records = records
        self._term = term
        self._without_etcd = 0  # the epoch that goes on without it, for the log

    async def keep(self) -> None:
        """For ever."""
        while True:
            left_s = self._term.plea_due_s() - self._clock.monotonic_s()
            if left_s > 0:
                await asyncio.sleep(min(max(left_s, IDLE_S), TTL_S / 4))
                continue
            epoch, asked_s = self._term.epoch, self._clock.monotonic_s()
            if await self._granted(epoch):
                self._term.extend(epoch, asked_s)
                if self._without_etcd != epoch:
                    log.warning("pgha.without_etcd", node=self._config.node, epoch=epoch)
                self._without_etcd = epoch
            await asyncio.sleep(AGAIN_S)

    async def _granted(self, epoch: int) -> bool:
        """All other voters are asked at once; when the rest are too few to elect, that is enough."""
        config, addresses = self._config, self._records.addresses()
        record = self._records.membership()
        quorum = settled(config.voters) if record is None else record.quorum
        plea = Plea(cluster=config.cluster, node=config.node, epoch=epoch)
        needed = len(quorum.voters) - quorum.votes if record is None else words_needed(record)
        said_yes, enough = 0, asyncio.Event()

        async def ask(address: str) -> None:
            nonlocal said_yes
            if await self._voice.ask(address, plea, PLEA_TIMEOUT_S):
                said_yes += 1
                if said_yes >= needed:
                    enough.set()

        others = [n for n in quorum.voters if n != config.node and n in addresses]
        async with asyncio.TaskGroup() as group:
            asking = [group.create_task(ask(addresses[node])) for node in others]
            try:
                async with asyncio.timeout(PLEA_TIMEOUT_S):
                    await enough.wait()
            except TimeoutError:
                pass
            for task in asking:
                task.cancel()
        return said_yes >= needed
