"""The simulated network between hosts, and a store client that suffers from it.

Owns: `Network` (who reaches whom, how long a message takes, which are lost), `Store` (the
one etcd, calling checkers after every change) and `SimulatedKV` (ports.KV for one host).

A request travels on its own: once sent, it may take effect although its sender has given
up or crashed, and long after the sender's deadline. An answer may be lost after the effect.
Deliveries of a watch lag, are split, and stand still during a partition; nothing is skipped.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import msgspec

from flyd.errors import FlydError, OutcomeUnknown, Unavailable
from flyd.ports import Change, Delete, KeyValue, Listing, Put, TxnResult, Unchanged, WatchBatch
from flyd.store.memory import MemoryEtcd
from tests.simulation.loop import current, stream

T = TypeVar("T")

ETCD = "etcd"
REQUEST_TIMEOUT_S = 2.0
RECONNECT_S = 0.2
WALL_START_S = 1_750_000_000.0


class Weather(msgspec.Struct, frozen=True, kw_only=True):
    """How bad the network is: the probability of each fate of one request."""

    lost: float = 0.0  # on its way there
    unanswered: float = 0.0  # done, but the answer got lost
    late: float = 0.0  # done after the sender's deadline
    latency_s: tuple[float, float] = (0.001, 0.02)
    watch_lag_s: tuple[float, float] = (0.0, 0.05)


CALM = Weather()
ROUGH = Weather(lost=0.02, unanswered=0.02, late=0.01, latency_s=(0.001, 0.15), watch_lag_s=(0.0, 0.5))


class Network:
    """Links between named places; all are up until cut."""

    def __init__(self) -> None:
        self.weather = CALM
        self._chance = stream(current().seed, "network")
        self.on_change: list[Callable[[], None]] = []
        self._cut: set[tuple[str, str]] = set()  # never iterated
        self._healed = asyncio.Event()
        self._outside = current().world_context()

    def reaches(self, a: str, b: str) -> bool:
        """Whether messages pass between the two."""
        return a == b or ((a, b) if a < b else (b, a)) not in self._cut

    def cut(self, a: str, b: str) -> None:
        """Drop every message between the two from now on."""
        current().note(f"cut {a} | {b}")
        self._cut.add((a, b) if a < b else (b, a))
        self._changed()

    def heal(self) -> None:
        """Every link is up again."""
        if self._cut:
            current().note("heal")
        self._cut.clear()
        self._healed.set()
        self._healed = asyncio.Event()
        self._changed()

    def _changed(self) -> None:
        for see in self.on_change:
            see()

    def delay_s(self) -> float:
        """How long one message takes."""
        return self._chance.uniform(*self.weather.latency_s)

    def lag_s(self) -> float:
        """How long a watch's delivery takes."""
        return self._chance.uniform(*self.weather.watch_lag_s)

    def flip(self, probability: float) -> bool:
        """One draw."""
        return self._chance.random() < probability

    def send(self, a: str, b: str, deliver: Callable[[], None]) -> None:
        """Bring a message from one place to another; a cut, now or on arrival, swallows it."""
        if self.reaches(a, b):
            current().call_later(self.delay_s(), self._arrive, a, b, deliver, context=self._outside)

    def _arrive(self, a: str, b: str, deliver: Callable[[], None]) -> None:
        if self.reaches(a, b):
            deliver()

    def request(self, host: str, effect: Callable[[], T]) -> asyncio.Future[T]:
        """Send a request to etcd; the future has its answer, if one comes."""
        loop = current()
        reply: asyncio.Future[T] = loop.create_future()
        delay_s = self.delay_s()
        if self.flip(self.weather.late):
            delay_s += self._chance.uniform(0.5, 2.0) * REQUEST_TIMEOUT_S
        if not self.flip(self.weather.lost):
            loop.call_later(delay_s, self._deliver, host, effect, reply, context=self._outside)
        return reply

    def _deliver(self, host: str, effect: Callable[[], Any], reply: asyncio.Future[Any]) -> None:
        if not self.reaches(host, ETCD):
            return
        outcome: Any = None
        refused: FlydError | None = None
        try:
            outcome = effect()
        except FlydError as error:
            refused = error
        if self.flip(self.weather.unanswered):
            return
        current().call_later(
            self.delay_s(), self._answer, host, reply, outcome, refused, context=self._outside
        )

    def _answer(self, host: str, reply: asyncio.Future[Any], outcome: Any, refused: FlydError | None) -> None:
        if reply.done() or not self.reaches(host, ETCD):
            return
        if refused is not None:
            reply.set_exception(refused)
            reply.exception()  # its sender may have crashed; nobody has to see it
        else:
            reply.set_result(outcome)


class Store(MemoryEtcd):
    """The one etcd. Checkers see the state after every change."""

    def __init__(self) -> None:
        super().__init__()
        self.on_change: list[Callable[[Sequence[Change]], None]] = []
        self.writer = ""  # whose transaction is being done

    def by(self, writer: str, compares: Sequence[Unchanged], effects: Sequence[Put | Delete]) -> TxnResult:
        """A transaction, with its sender known to the checkers."""
        self.writer = writer
        try:
            return self.txn(compares, effects)
        finally:
            self.writer = ""

    def _record(self, revision: int, changes: Sequence[Change]) -> None:
        super()._record(revision, changes)
        if changes:
            current().note(f"etcd {revision} " + " ".join(_short(c) for c in changes))
            for see in self.on_change:
                see(changes)


def _short(change: Change) -> str:
    return change.key.removeprefix("/flyd/v1/") + ("" if change.value is not None else " gone")


class SimulatedKV:
    """One host's client of the store: ports.KV."""

    def __init__(self, network: Network, store: Store, host: str) -> None:
        self._network = network
        self._store = store
        self._host = host
        self._closed = False

    async def _call(self, op: str, effect: Callable[[], T], *, writes: bool) -> T:
        if self._closed:
            raise Unavailable(f"etcd {op}: this client is closed")
        reply = self._network.request(self._host, effect)
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                return await reply
        except TimeoutError:
            kind = OutcomeUnknown if writes else Unavailable
            raise kind(f"etcd {op}: no answer within {REQUEST_TIMEOUT_S} s") from None

    async def get(self, key: str) -> KeyValue | None:
        return await self._call("get", lambda: self._store.get(key), writes=False)

    async def list(self, prefix: str) -> Listing:
        return await self._call("list", lambda: self._store.list(prefix), writes=False)

    async def txn(self, compares: Sequence[Unchanged], effects: Sequence[Put | Delete]) -> TxnResult:
        return await self._call("txn", lambda: self._store.by(self._host, compares, effects), writes=True)

    async def put(self, key: str, value: bytes, *, lease: int = 0) -> int:
        effects = (Put(key, value, lease),)
        return (await self._call("put", lambda: self._store.txn((), effects), writes=True)).revision

    async def watch(self, prefix: str, from_revision: int) -> AsyncIterator[WatchBatch]:
        position = from_revision
        while True:
            await asyncio.sleep(self._network.lag_s())
            if self._closed:
                raise Unavailable("etcd watch: this client is closed")
            if not self._network.reaches(self._host, ETCD):
                await asyncio.sleep(RECONNECT_S)
                continue
            changes = self._store.changes(prefix, position)
            if not changes:
                position = max(position, self._store.revision + 1)
                await self._store.wait_change()
                continue
            if self._network.flip(0.3):  # a batch may end after any revision
                changes = tuple(c for c in changes if c.mod_revision == changes[0].mod_revision)
            position = changes[-1].mod_revision + 1
            yield WatchBatch(revision=changes[-1].mod_revision, changes=changes)

    async def lease_grant(self, ttl_s: int) -> int:
        return await self._call("lease_grant", lambda: self._store.lease_grant(ttl_s), writes=True)

    async def lease_keepalive(self, lease: int) -> int:
        return await self._call("lease_keepalive", lambda: self._store.lease_keepalive(lease), writes=True)

    async def lease_revoke(self, lease: int) -> None:
        await self._call("lease_revoke", lambda: self._store.lease_revoke(lease), writes=True)

    async def close(self) -> None:
        self._closed = True
        self._store.wake()


class SimulatedClock:
    """ports.Clock on virtual time.

    `skew_s`: how wrong the wall clock is. `up_s`: for how long the host had been up at the start.
    """

    def __init__(self, skew_s: float = 0.0, up_s: float = 0.0) -> None:
        self.skew_s = skew_s
        self._up_s = up_s

    def monotonic_s(self) -> float:
        return current().time() + self._up_s

    def wall_s(self) -> float:
        return WALL_START_S + current().time() + self.skew_s


class SimulatedEntropy:
    """ports.Entropy from a stream of the seed."""

    def __init__(self, name: str) -> None:
        self._chance = stream(current().seed, f"entropy/{name}")

    def token(self, n_bytes: int) -> str:
        return self._chance.randbytes(n_bytes).hex()
