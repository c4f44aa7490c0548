"""etcd and a run log in memory, for unit tests and the simulator.

Owns: `MemoryEtcd`, the state of one etcd cluster (revisions, history, leases); `MemoryKV`,
one client's handle on it (ports.KV); `MemoryRunLog` (ports.RunLog), which survives a
simulated crash because the object does. Verified: tests/conformance runs the same suite
against these and against the real etcd and SQLite.

Invariants: every change gets the next revision and stays in the history until compacted;
a lease ends by the running loop's clock, by itself, through a timer in the context in which
the server was made (so a simulated host that asked for the lease may crash and it still ends).

Faults: a subclass of MemoryKV overrides `_before` and `_after`, called around each request.
Raising in `_before` means "never reached etcd", in `_after` "done, but the answer got lost".

Called by tests only. Does not model: several members, lag between them, authentication.
"""

from __future__ import annotations

import asyncio
import contextvars
from bisect import bisect_left
from collections.abc import AsyncIterator, Mapping, Sequence

from flyd.errors import Compacted, InvalidInput, InvariantBroken, NotFound, Unavailable
from flyd.model import RunEvent
from flyd.ports import (
    KEPT_ENDED_RUNS,
    Change,
    Delete,
    KeyValue,
    Listing,
    Put,
    TxnResult,
    Unchanged,
    WatchBatch,
)

MIN_TTL_S = 2  # etcd's floor at its default election timeout
MAX_TXN_OPS = 128  # etcd's --max-txn-ops
WATCH_RETRY_S = 0.2  # between attempts of a watch whose connection is (made to be) down


class _Lease:
    def __init__(self, ttl_s: int, timer: asyncio.TimerHandle) -> None:
        self.ttl_s = ttl_s
        self.timer = timer


class MemoryEtcd:
    """The state of one cluster. Synchronous: each call is one atomic step."""

    def __init__(self) -> None:
        self.revision = 1
        self.compacted = 0
        self._keys: dict[str, KeyValue] = {}
        self._history: list[Change] = []
        self._leases: dict[int, _Lease] = {}
        self._next_lease = 1
        self._waiters: dict[asyncio.Future[None], None] = {}
        self._context = contextvars.copy_context()

    def get(self, key: str) -> KeyValue | None:
        """The key now."""
        return self._keys.get(key)

    def list(self, prefix: str) -> Listing:
        """All keys under the prefix, in key order."""
        items = tuple(self._keys[key] for key in sorted(self._keys) if key.startswith(prefix))
        return Listing(revision=self.revision, items=items)

    def txn(self, compares: Sequence[Unchanged], effects: Sequence[Put | Delete]) -> TxnResult:
        """If all compares hold, all effects at one new revision."""
        self._check_txn(compares, effects)
        if not all(self._mod_revision(c.key) == c.mod_revision for c in compares):
            return TxnResult(succeeded=False, revision=self.revision)
        revision = self.revision + 1
        changes = [c for e in effects if (c := self._apply(e, revision)) is not None]
        self._record(revision, changes)
        return TxnResult(succeeded=True, revision=self.revision)

    def changes(self, prefix: str, from_revision: int) -> tuple[Change, ...]:
        """Every change under the prefix from that revision on; Compacted if some may be gone."""
        if from_revision <= self.compacted:
            raise Compacted(self.compacted)
        start = bisect_left(self._history, from_revision, key=lambda c: c.mod_revision)
        return tuple(c for c in self._history[start:] if c.key.startswith(prefix))

    async def wait_change(self) -> None:
        """Return after the next change of any key (or `wake`)."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = None
        try:
            await waiter
        finally:
            self._waiters.pop(waiter, None)

    def wake(self) -> None:
        """Let every watcher look again."""
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def compact(self, revision: int) -> None:
        """Forget history up to and including `revision`."""
        if revision > self.revision:
            raise InvalidInput(f"cannot compact at {revision}: the store is at revision {self.revision}")
        self.compacted = max(self.compacted, revision)
        start = bisect_left(self._history, self.compacted + 1, key=lambda c: c.mod_revision)
        del self._history[:start]
        self.wake()

    def lease_grant(self, ttl_s: int) -> int:
        """A new lease."""
        lease, self._next_lease = self._next_lease, self._next_lease + 1
        granted_s = max(ttl_s, MIN_TTL_S)
        self._leases[lease] = _Lease(granted_s, self._timer(lease, granted_s))
        return lease

    def lease_keepalive(self, lease: int) -> int:
        """A full TTL again; 0 if the lease is gone."""
        held = self._leases.get(lease)
        if held is None:
            return 0
        held.timer.cancel()
        held.timer = self._timer(lease, held.ttl_s)
        return held.ttl_s

    def lease_revoke(self, lease: int) -> None:
        """End a lease; its keys vanish at one revision."""
        held = self._leases.pop(lease, None)
        if held is None:
            return
        held.timer.cancel()
        revision = self.revision + 1
        keys = sorted(key for key, kv in self._keys.items() if kv.lease == lease)
        changes = [c for key in keys if (c := self._apply(Delete(key), revision)) is not None]
        self._record(revision, changes)

    def _timer(self, lease: int, ttl_s: int) -> asyncio.TimerHandle:
        loop = asyncio.get_running_loop()
        return loop.call_at(loop.time() + ttl_s, self.lease_revoke, lease, context=self._context)

    def _mod_revision(self, key: str) -> int:
        held = self._keys.get(key)
        return held.mod_revision if held is not None else 0

    def _check_txn(self, compares: Sequence[Unchanged], effects: Sequence[Put | Delete]) -> None:
        if max(len(compares), len(effects)) > MAX_TXN_OPS:
            raise InvalidInput(f"a transaction of more than {MAX_TXN_OPS} compares or effects")
        if len({e.key for e in effects}) < len(effects):
            raise InvalidInput("a transaction changes the same key twice")
        for effect in effects:
            if isinstance(effect, Put) and effect.lease and effect.lease not in self._leases:
                raise NotFound(f"lease {effect.lease} of key {effect.key} has ended")

    def _apply(self, effect: Put | Delete, revision: int) -> Change | None:
        before = self._keys.get(effect.key)
        if isinstance(effect, Delete):
            if before is None:
                return None
            del self._keys[effect.key]
            return Change(key=effect.key, value=None, mod_revision=revision)
        created = before.create_revision if before is not None else revision
        kv = KeyValue(effect.key, effect.value, revision, created, effect.lease)
        self._keys[effect.key] = kv
        return Change(key=effect.key, value=kv, mod_revision=revision)

    def _record(self, revision: int, changes: Sequence[Change]) -> None:
        if changes:
            self.revision = revision
            self._history.extend(changes)
            self.wake()


class MemoryKV:
    """One client of a MemoryEtcd: ports.KV, with places to put faults."""

    def __init__(self, server: MemoryEtcd | None = None) -> None:
        self.server = server if server is not None else MemoryEtcd()
        self._closed = False

    async def _before(self, op: str) -> None:
        """Before a request (or a watch's delivery) named `op`; raise to lose it on its way there."""
        await asyncio.sleep(0)
        if self._closed:
            raise Unavailable(f"etcd {op}: this client is closed")

    async def _after(self, op: str) -> None:
        """After the effect; raise OutcomeUnknown (or Unavailable) to lose the answer."""

    async def get(self, key: str) -> KeyValue | None:
        """The key now, or None."""
        await self._before("get")
        answer = self.server.get(key)
        await self._after("get")
        return answer

    async def list(self, prefix: str) -> Listing:
        """All keys that begin with `prefix`."""
        await self._before("list")
        answer = self.server.list(prefix)
        await self._after("list")
        return answer

    async def txn(self, compares: Sequence[Unchanged], effects: Sequence[Put | Delete]) -> TxnResult:
        """If all compares hold, do all effects."""
        await self._before("txn")
        answer = self.server.txn(compares, effects)
        await self._after("txn")
        return answer

    async def put(self, key: str, value: bytes, *, lease: int = 0) -> int:
        """Set a key; returns the revision."""
        await self._before("put")
        answer = self.server.txn((), (Put(key, value, lease),))
        await self._after("put")
        return answer.revision

    async def watch(self, prefix: str, from_revision: int) -> AsyncIterator[WatchBatch]:
        """Every change from `from_revision` on; a delivery lost in `_before` comes again."""
        position = from_revision
        while True:
            try:
                await self._before("watch")
            except Unavailable:
                if self._closed:
                    raise
                await asyncio.sleep(WATCH_RETRY_S)
                continue
            changes = self.server.changes(prefix, position)
            if changes:
                position = changes[-1].mod_revision + 1
                yield WatchBatch(revision=changes[-1].mod_revision, changes=changes)
            else:
                position = max(position, self.server.revision + 1)
                await self.server.wait_change()

    async def lease_grant(self, ttl_s: int) -> int:
        """A new lease, at least MIN_TTL_S."""
        await self._before("lease_grant")
        lease = self.server.lease_grant(ttl_s)
        await self._after("lease_grant")
        return lease

    async def lease_keepalive(self, lease: int) -> int:
        """Renew once; 0 if the lease is gone."""
        await self._before("lease_keepalive")
        ttl_s = self.server.lease_keepalive(lease)
        await self._after("lease_keepalive")
        return ttl_s

    async def lease_revoke(self, lease: int) -> None:
        """End the lease; its keys vanish."""
        await self._before("lease_revoke")
        self.server.lease_revoke(lease)
        await self._after("lease_revoke")

    async def close(self) -> None:
        """Every later call, and every running watch, ends with Unavailable."""
        self._closed = True
        self.server.wake()


class MemoryRunLog:
    """ports.RunLog in memory; "durable" as long as the object is kept."""

    def __init__(self) -> None:
        self._runs: dict[str, list[RunEvent]] = {}
        self._ended: list[str] = []
        self._records: dict[str, bytes] = {}

    def append(self, event: RunEvent) -> None:
        """Add one event; sequences of a run count from 0 without gaps."""
        events = self._runs.get(event.run_id, [])
        if event.sequence != len(events):
            raise InvariantBroken(
                f"run {event.run_id}: event {event.sequence} ({event.kind}) appended, "
                f"but {len(events)} is the next",
                hint="two tasks drive the same run, or one resumed from an old copy of its events",
            )
        self._runs[event.run_id] = [*events, event]
        if event.kind == "end":
            self._ended.append(event.run_id)
            while len(self._ended) > KEPT_ENDED_RUNS:
                del self._runs[self._ended.pop(0)]

    def events(self, run_id: str) -> tuple[RunEvent, ...]:
        """All events of one run, in order."""
        return tuple(self._runs.get(run_id, ()))

    def open_runs(self) -> tuple[str, ...]:
        """Runs begun and not ended, oldest first."""
        return tuple(
            run_id
            for run_id, events in self._runs.items()
            if events[0].kind == "begin" and events[-1].kind != "end"
        )

    def put_record(self, key: str, value: bytes) -> None:
        """Set one record."""
        self._records[key] = value

    def delete_record(self, key: str) -> None:
        """Remove one record; absent is no error."""
        self._records.pop(key, None)

    def records(self, prefix: str) -> Mapping[str, bytes]:
        """All records under the prefix, in key order."""
        return {k: self._records[k] for k in sorted(self._records) if k.startswith(prefix)}
