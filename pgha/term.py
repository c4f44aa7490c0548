"""The term of a primary: the lease that it holds, renewed in a loop of its own, and its end.

Invariant (I7): at `sent_s + TTL_S - MARGIN_S` the holder's Postgres is dead, where `sent_s` is
from *before* the last renewal that succeeded was sent, or the last plea that a quorum of voters
granted (extension.py: for when etcd does not answer). The loop below does nothing but renew
and, at that moment, kill; slow work of the agent cannot delay it, and if the whole agent hangs
the killer (killer.py), which gets each new deadline, does the same. It also stops renewing when
Postgres has not been seen well for HEALTH_S, so a hanging primary does not hold the cluster.

Called by pgha/agent.py. Write safety does not rest on this file (README.md): it bounds stale reads.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable

import structlog

from flyd.errors import Unavailable
from flyd.model import decode, encode
from flyd.ports import KV, Clock, Put, Unchanged
from pgha import keys
from pgha.model import MARGIN_S, PLEA_S, RENEW_S, TTL_S, Lease
from pgha.ports import Killer

log = structlog.get_logger(__name__)

HEALTH_S = 5.0
ATTEMPT_S = 0.6  # then ask again: another member of etcd may answer
RETRY_S = 0.1

OnLost = Callable[[str], Awaitable[None]]


class Term:
    """At most one term at a time; `epoch` is 0 while there is none."""

    def __init__(self, cluster: str, node: str, kv: KV, clock: Clock, killer: Killer) -> None:
        self._key = keys.lease(cluster)
        self._node = node
        self._kv = kv
        self._clock = clock
        self._killer = killer
        self._wake = asyncio.Event()
        self._busy = asyncio.Lock()  # one request about the lease at a time
        self._revision = 0
        self._count = 0
        self._sent_s = 0.0
        self._pleaded_s = 0.0
        self._healthy_s = 0.0
        self.epoch = 0

    @property
    def deadline_s(self) -> float:
        """When the holder must be dead."""
        return max(self._sent_s, self._pleaded_s) + TTL_S - MARGIN_S

    def valid(self) -> bool:
        """A term is on and its deadline is ahead."""
        return self.epoch > 0 and self._clock.monotonic_s() < self.deadline_s

    def begin(self, epoch: int, revision: int, sent_s: float) -> None:
        """A take-over succeeded; it was sent at `sent_s`."""
        self.epoch, self._revision, self._count = epoch, revision, 0
        self._sent_s, self._pleaded_s = sent_s, 0.0
        self._healthy_s = sent_s
        self._killer.arm(self.deadline_s)
        self._wake.set()

    def end(self) -> None:
        """No renewals from now on. The killer stays armed until Postgres is known to be down."""
        self.epoch = 0

    def buried(self) -> None:
        """Postgres is down (or was never up as primary): nothing to kill."""
        if self.epoch == 0:
            self._killer.arm(0)

    def healthy(self) -> None:
        """Postgres was just seen well."""
        self._healthy_s = self._clock.monotonic_s()

    def plea_due_s(self) -> float:
        """When to ask the voters for more time; infinite while there is no term, or nothing worth saving."""
        if not self.valid() or self._clock.monotonic_s() - self._healthy_s >= HEALTH_S:
            return math.inf
        return self._sent_s + PLEA_S

    def extend(self, epoch: int, asked_s: float) -> None:
        """Enough voters were asked at `asked_s` and said that they will not vote against us for TTL_S."""
        if self.valid() and self.epoch == epoch:  # past the deadline Postgres is dead: nothing brings it back
            self._pleaded_s = max(self._pleaded_s, asked_s)
            self._killer.arm(self.deadline_s)

    async def release(self, target: str) -> bool:
        """Give the lease back, if it is still ours. Only after Postgres is down."""
        self.end()
        async with self._busy:
            item = await self._kv.get(self._key)
            if item is None:
                return False
            lease = decode(item.value, Lease)
            if lease.node != self._node or lease.released:
                return False
            given = Lease(
                epoch=lease.epoch, node=self._node, count=lease.count + 1, released=True, target=target
            )
            compare = Unchanged(self._key, item.mod_revision)
            return (await self._kv.txn([compare], [Put(self._key, encode(given))])).succeeded

    async def keep(self, on_lost: OnLost) -> None:
        """Renew while there is a term; when it cannot be held, end it and call `on_lost`. For ever."""
        while True:
            if self.epoch == 0:
                self._wake.clear()
                await self._wake.wait()
            epoch, now = self.epoch, self._clock.monotonic_s()
            reason = ""
            if now >= self.deadline_s:
                reason = "no renewal succeeded in time"
            elif now - self._healthy_s < HEALTH_S and not await self._renew():
                reason = "somebody else holds the lease"
            if reason and self.epoch == epoch:
                self.end()
                await on_lost(reason)
            left_s = self.deadline_s - self._clock.monotonic_s()
            await asyncio.sleep(max(0.0, min(RENEW_S, left_s)))

    async def _renew(self) -> bool:
        """Try until it succeeds or the deadline comes. False: the lease is not ours any more."""
        uncertain = False
        while True:
            left_s = self.deadline_s - self._clock.monotonic_s()
            if left_s <= 0 or self.epoch == 0:
                return True  # `keep` looks at the deadline next
            try:
                async with asyncio.timeout(min(left_s, ATTEMPT_S)), self._busy:
                    if self.epoch == 0:
                        return True
                    if uncertain and not await self._read_back():
                        return False
                    if await self._renew_once():
                        return True
                    uncertain = True  # somebody else, or an earlier request of ours that arrived late
            except (Unavailable, TimeoutError) as error:
                if not uncertain:
                    log.warning("pgha.renewal_failed", node=self._node, error=str(error))
                uncertain = True
                await asyncio.sleep(RETRY_S)

    async def _read_back(self) -> bool:
        """What unanswered requests did. False: the lease is not ours any more."""
        item = await self._kv.get(self._key)
        lease = None if item is None else decode(item.value, Lease)
        if item is None or lease is None or lease.node != self._node or lease.epoch != self.epoch:
            return False
        if lease.released:
            return False
        self._revision, self._count = item.mod_revision, lease.count
        return True

    async def _renew_once(self) -> bool:
        """One compare-and-set."""
        sent_s = self._clock.monotonic_s()
        lease = Lease(epoch=self.epoch, node=self._node, count=self._count + 1)
        result = await self._kv.txn([Unchanged(self._key, self._revision)], [Put(self._key, encode(lease))])
        if not result.succeeded:
            return False
        self._revision, self._count, self._sent_s = result.revision, lease.count, sent_s
        if self.epoch == lease.epoch:
            self._killer.arm(self.deadline_s)
        return True
