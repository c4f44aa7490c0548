"""What etcd says of one cluster, kept current in memory, and when each lease revision was first seen.

The copy may lag behind etcd; nothing unsafe follows from that, because everything that
matters is a compare-and-set. Whoever is about to doubt the holder calls `refresh` first (a
linearizable listing), so that a stalled watch is never taken for a dead primary.

Used by pgha/agent.py only. Decides nothing.
"""

from __future__ import annotations

import asyncio
from typing import TypeVar

import msgspec
import structlog

from flyd.errors import Compacted, Unavailable
from flyd.model import PostgresLeader, PostgresMember, Value, decode
from flyd.ports import KV, Clock, KeyValue, Listing
from flyd.store.keys import postgres_members
from pgha import keys
from pgha.model import Backup, Bootstrap, Doubt, Lease, Lineage, Membership, Pause, Switchover, Vote

log = structlog.get_logger(__name__)

RETRY_S = 0.3
T = TypeVar("T", bound=Value)


class ClusterRecords:
    """One cluster's keys as last seen."""

    def __init__(self, cluster: str, kv: KV, clock: Clock) -> None:
        self._cluster = cluster
        self._kv = kv
        self._clock = clock
        self._items: dict[str, KeyValue] = {}
        self._revision = 0
        self._seen_revision: int = 0  # of the lease, when `lease_seen_s` was set
        self._changed = asyncio.Event()
        self._news = asyncio.Event()  # changed by more than the holder's sign of life
        self.lease_seen_s = 0.0
        self.heard_s = 0.0  # when etcd last said anything of this cluster

    @property
    def known(self) -> bool:
        """Whether etcd has ever answered."""
        return self._revision > 0

    async def refresh(self) -> None:
        """Read everything afresh."""
        self._install(await self._kv.list(keys.cluster(self._cluster)))

    async def watch(self) -> None:
        """Follow every change, for ever."""
        failing = False
        while True:
            try:
                if not self.known:
                    await self.refresh()
                async for batch in self._kv.watch(keys.cluster(self._cluster), self._revision + 1):
                    failing = False
                    for change in batch.changes:
                        self._apply(change.key, change.value, change.mod_revision)
                    self._moved(batch.revision)
            except Compacted:
                self._revision = 0
            except Unavailable as error:
                if not failing:
                    log.warning("pgha.watch_failed", cluster=self._cluster, error=str(error))
                failing = True
                await asyncio.sleep(RETRY_S)

    async def wait_change(self, timeout_s: float, *, renewals: bool = True) -> None:
        """Return at the next change (a lease only renewed counts if `renewals`), or after `timeout_s`."""
        try:
            async with asyncio.timeout(max(0.0, timeout_s)):
                await (self._changed if renewals else self._news).wait()
        except TimeoutError:
            return
        self._changed.clear()
        self._news.clear()

    def poke(self) -> None:
        """Make `wait_change` return."""
        self._changed.set()
        self._news.set()

    def mod_revision(self, key: str) -> int:
        """Of the key as last seen; 0 if absent."""
        item = self._items.get(key)
        return 0 if item is None else item.mod_revision

    def leader(self) -> PostgresLeader | None:
        """Who may be primary."""
        return self._one(keys.postgres_leader(self._cluster), PostgresLeader)

    def bootstrap(self) -> Bootstrap | None:
        """Who may run initdb."""
        return self._one(keys.bootstrap(self._cluster), Bootstrap)

    def lease(self) -> Lease | None:
        """The holder's sign of life."""
        return self._one(keys.lease(self._cluster), Lease)

    def membership(self) -> Membership | None:
        """Who the members are; None: not recorded yet."""
        return self._one(keys.membership(self._cluster), Membership)

    def switchover(self) -> Switchover | None:
        """A wish to move the primary."""
        return self._one(keys.switchover(self._cluster), Switchover)

    def pause(self) -> Pause | None:
        """Whether nothing may happen by itself."""
        return self._one(keys.pause(self._cluster), Pause)

    def backup_wish(self) -> Backup | None:
        """The base backup that somebody wants."""
        return self._one(keys.backup_wish(self._cluster), Backup)

    def read(self, key: str, kind: type[T]) -> T | None:
        """Any key of the cluster, as last seen."""
        return self._one(key, kind)

    def read_all(self, prefix: str, kind: type[T]) -> tuple[T, ...]:
        """All keys below it, in their order."""
        return self._all(prefix, kind)

    @property
    def lease_revision(self) -> int:
        """Of the lease; it names the round."""
        return self.mod_revision(keys.lease(self._cluster))

    def votes(self) -> tuple[Vote, ...]:
        """Cast against the present lease revision."""
        return self._all(keys.votes(self._cluster, self.lease_revision), Vote)

    def doubts(self) -> tuple[Doubt, ...]:
        """About the present lease revision."""
        said = self._all(keys.doubts(self._cluster), Doubt)
        return tuple(d for d in said if d.revision == self.lease_revision)

    def history(self) -> tuple[Lineage, ...]:
        """All epochs, oldest first."""
        return self._all(keys.histories(self._cluster), Lineage)

    def addresses(self) -> dict[str, str]:
        """Where each member's Postgres listens, by the member's name."""
        return {m.node: m.address for m in self._all(postgres_members(self._cluster), PostgresMember)}

    def vote_keys(self) -> tuple[str, ...]:
        """Of the present round."""
        prefix = keys.votes(self._cluster, self.lease_revision)
        return tuple(k for k in sorted(self._items) if k.startswith(prefix))

    def _one(self, key: str, kind: type[T]) -> T | None:
        item = self._items.get(key)
        return None if item is None else decode(item.value, kind)

    def _all(self, prefix: str, kind: type[T]) -> tuple[T, ...]:
        return tuple(decode(self._items[k].value, kind) for k in sorted(self._items) if k.startswith(prefix))

    def _install(self, listing: Listing) -> None:
        if listing.revision < self._revision:
            return
        self._items = {item.key: item for item in listing.items}
        self._news.set()
        self._moved(listing.revision)

    def _apply(self, key: str, value: KeyValue | None, revision: int) -> None:
        if revision <= self._revision:  # a listing was ahead of the watch
            return
        if not self._renewal(key, value):
            self._news.set()
        if value is None:
            self._items.pop(key, None)
        else:
            self._items[key] = value

    def _renewal(self, key: str, value: KeyValue | None) -> bool:
        """The same holder said again that it lives."""
        before = self._items.get(key)
        if key != keys.lease(self._cluster) or before is None or value is None:
            return False
        old, new = decode(before.value, Lease), decode(value.value, Lease)
        return msgspec.structs.replace(old, count=new.count) == new

    def _moved(self, revision: int) -> None:
        self._revision = max(revision, self._revision)
        self.heard_s = self._clock.monotonic_s()
        if self.lease_revision != self._seen_revision:
            self._seen_revision = self.lease_revision
            self.lease_seen_s = self._clock.monotonic_s()
        self._changed.set()
