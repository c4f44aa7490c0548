"""etcd over gRPC: the real ports.KV.

Owns the connections to all members, one channel each, and which member is asked (the
first that works; another as soon as it fails).

Invariants: a request that changes something is sent once: it goes to another member only
if it provably never left (no connection, or a member that declined it for want of a
leader), otherwise its loss is `OutcomeUnknown`. Reads are linearizable and may be
repeated. Each call ends within REQUEST_TIMEOUT_S. A watch never skips: it goes on after
the last change that it delivered, and says `Compacted` if that is impossible.

A member that hangs is noticed by a watch through progress requests (not by gRPC pings:
etcd closes connections that ping more often than every 5 s), by a call through its
deadline. `hasleader` makes a member that lost its quorum say so instead of going quiet.

Called by the composition roots. etcd3aio's own services are not used: they repeat
transactions and pass over compacted changes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, NoReturn, cast

import grpc
import grpc.aio
import structlog

from flyd.errors import Compacted, FlydError, InvalidInput, NotFound, OutcomeUnknown, Unavailable
from flyd.identity.credentials import Credentials, SecureChannel
from flyd.ports import Delete, KeyValue, Listing, Put, TxnResult, Unchanged, WatchBatch
from flyd.store import etcd_wire as wire

log = structlog.get_logger(__name__)

REQUEST_TIMEOUT_S = 3.0
PAUSE_S = 0.1  # after every member failed once
PROBE_EVERY_S = 1.0  # a quiet watch asks for a sign of life this often
SILENCE_S = 2.2  # and gives its member up after this long without any

WANT_LEADER = (("hasleader", "true"),)
CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),  # also how long one attempt to connect may take
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 10_000),  # for a host that vanished without closing its connections
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
)
HEALTH_HINT = "check that a majority of etcd's members runs: etcdctl endpoint health --cluster"

Code = grpc.StatusCode
REFUSALS: dict[grpc.StatusCode, type[FlydError]] = {
    Code.NOT_FOUND: NotFound,
    Code.INVALID_ARGUMENT: InvalidInput,
    Code.FAILED_PRECONDITION: InvalidInput,
}
# Answers after which a change has certainly not happened.
DECLINED = (Code.RESOURCE_EXHAUSTED, Code.PERMISSION_DENIED, Code.UNAUTHENTICATED, Code.UNIMPLEMENTED)


class _NotSent(Exception):
    """The request never left, or the member declined it: another member may be asked."""


class _Lost(Exception):
    """The request may have been worked on, and no answer came."""


class _Member:
    """One etcd member and its channel."""

    def __init__(self, endpoint: str, credentials: Credentials | None) -> None:
        self.endpoint = endpoint
        self.channel = SecureChannel(endpoint, credentials, CHANNEL_OPTIONS)
        self.doubtful = (
            False  # it owes an answer: it may be frozen, with a connection that still takes requests
        )

    def unary(self, method: str) -> grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]:
        """One request, one answer, both as bytes."""
        call: Any = cast(Any, self.channel.get()).unary_unary(method)
        return call

    def stream(self, method: str) -> grpc.aio.StreamStreamMultiCallable[bytes, bytes]:
        """Messages both ways, as bytes."""
        call: Any = cast(Any, self.channel.get()).stream_stream(method)
        return call

    async def connect(self) -> None:
        """Return when connected, raise _NotSent as soon as connecting failed."""
        channel = self.channel.get()
        while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
            if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                raise _NotSent(f"{self.endpoint}: no connection")
            await channel.wait_for_state_change(state)

    async def ask(self, method: str, request: bytes, timeout_s: float) -> bytes:
        """One request, one answer."""
        try:
            if method == wire.LEASE_KEEPALIVE:
                return await self._ask_by_stream(method, request, timeout_s)
            return await self.unary(method)(request, timeout=timeout_s, metadata=WANT_LEADER)
        except grpc.aio.AioRpcError as e:
            self._raise(e)

    async def _ask_by_stream(self, method: str, request: bytes, timeout_s: float) -> bytes:
        call = self.stream(method)(None, timeout=timeout_s, metadata=WANT_LEADER)
        try:
            await call.write(request)
            answer = await call.read()
        finally:
            call.cancel()
        if not isinstance(answer, bytes):
            raise _Lost(f"{self.endpoint}: closed the stream without an answer")
        return answer

    def _raise(self, e: grpc.aio.AioRpcError) -> NoReturn:
        code, details = e.code(), e.details() or ""
        said = f"{self.endpoint}: {details or code.name}"
        if code in REFUSALS:
            raise REFUSALS[code](f"etcd: {details}") from e
        if code in DECLINED:
            hint = "etcdctl alarm list, then compact and defragment" if "space" in details else HEALTH_HINT
            raise Unavailable(f"etcd declined: {said}", hint=hint) from e
        if details.startswith("failed to connect to all addresses") or details == "etcdserver: no leader":
            raise _NotSent(said) from e
        raise _Lost(said) from e


class EtcdKV:
    """ports.KV over an etcd cluster; `endpoints` are host:port of its members, nearest first.

    `credentials` are a host's: etcd trusts nobody else. None is for an etcd without TLS, as pgha
    may be given one where it runs without flyd.
    """

    def __init__(self, endpoints: Sequence[str], credentials: Credentials | None = None) -> None:
        if not endpoints:
            raise InvalidInput("no etcd endpoint given", hint="give host:port of each etcd member")
        self._members = [_Member(endpoint, credentials) for endpoint in endpoints]
        self._current = 0
        self._closed = False

    async def get(self, key: str) -> KeyValue | None:
        """The key now, or None."""
        items = wire.parse_range(await self._read(wire.RANGE, wire.get_request(key))).items
        return items[0] if items else None

    async def list(self, prefix: str) -> Listing:
        """All keys that begin with `prefix`."""
        return wire.parse_range(await self._read(wire.RANGE, wire.list_request(prefix)))

    async def txn(self, compares: Sequence[Unchanged], effects: Sequence[Put | Delete]) -> TxnResult:
        """If all compares hold, do all effects."""
        return wire.parse_txn(await self._write(wire.TXN, wire.txn_request(compares, effects)))

    async def put(self, key: str, value: bytes, *, lease: int = 0) -> int:
        """Set a key; returns the revision."""
        return wire.parse_put(await self._write(wire.PUT, wire.put_request(Put(key, value, lease))))

    async def lease_grant(self, ttl_s: int) -> int:
        """A new lease. Asked again if the answer got lost: a lease nobody knows ends by itself."""
        return wire.parse_lease_grant(await self._read(wire.LEASE_GRANT, wire.lease_grant_request(ttl_s)))

    async def lease_keepalive(self, lease: int) -> int:
        """Renew once; 0 if the lease is gone."""
        answer = await self._read(wire.LEASE_KEEPALIVE, wire.lease_keepalive_request(lease))
        return wire.parse_lease_keepalive(answer)

    async def lease_revoke(self, lease: int) -> None:
        """End the lease; its keys vanish."""
        try:
            await self._read(wire.LEASE_REVOKE, wire.lease_revoke_request(lease))
        except NotFound:
            return

    async def close(self) -> None:
        """Close all connections; what runs ends with Unavailable."""
        self._closed = True
        for member in self._members:
            await member.channel.close()

    async def watch(self, prefix: str, from_revision: int) -> AsyncIterator[WatchBatch]:
        """Every change from `from_revision` on, from whichever member answers."""
        position = from_revision
        failures = 0
        while True:
            member = self._members[self._current]
            try:
                async with aclosing(self._watch_once(member, prefix, position)) as batches:
                    async for batch in batches:
                        failures = 0
                        if batch is not None:
                            position = batch.revision + 1
                        yield batch or WatchBatch(revision=position - 1, changes=())
            except (_NotSent, _Lost) as e:
                if failures == 0:  # once, not for each round over members that are all away
                    log.info("etcd.watch_moved", prefix=prefix, error=str(e), revision=position)
            self._failed(member)
            failures += 1
            if failures >= len(self._members):
                await asyncio.sleep(PAUSE_S)

    async def _watch_once(
        self, member: _Member, prefix: str, from_revision: int
    ) -> AsyncGenerator[WatchBatch | None, None]:
        """Batches from one member (None: it lives) until the stream breaks."""

        async def requests() -> AsyncIterator[bytes]:
            yield wire.watch_request(prefix, from_revision)
            while True:
                await asyncio.sleep(PROBE_EVERY_S)
                yield wire.progress_request()

        self._check_open("watch")
        call = member.stream(wire.WATCH)(requests(), metadata=WANT_LEADER)
        try:
            stream = aiter(call)
            while True:
                answer = wire.parse_watch(await self._next(member, stream))
                if answer.compact_revision:
                    raise Compacted(answer.compact_revision)
                if answer.canceled:
                    raise _Lost(f"{member.endpoint}: watch canceled: {answer.reason}")
                if answer.created and from_revision > 1:
                    await self._check_history(member, from_revision)
                if answer.changes:
                    yield WatchBatch(revision=answer.changes[-1].mod_revision, changes=answer.changes)
                else:
                    yield None
        finally:
            call.cancel()

    async def _next(self, member: _Member, stream: AsyncIterator[Any]) -> bytes:
        try:
            async with asyncio.timeout(SILENCE_S):
                return await anext(stream)
        except TimeoutError as e:
            raise _Lost(f"{member.endpoint}: silent for {SILENCE_S} s") from e
        except StopAsyncIteration as e:
            raise _Lost(f"{member.endpoint}: ended the stream") from e
        except grpc.aio.AioRpcError as e:
            self._check_open("watch")
            raise _Lost(f"{member.endpoint}: {e.details() or e.code().name}") from e
        except asyncio.CancelledError:
            self._raise_if_closed_under_us("watch")
            raise

    async def _check_history(self, member: _Member, from_revision: int) -> None:
        """Compacted if `from_revision` itself is compacted: etcd before 3.5.18 would then still
        open the watch, but without the deletions at exactly that revision.
        """
        try:
            await member.unary(wire.RANGE)(wire.history_request(from_revision - 1), timeout=SILENCE_S)
        except grpc.aio.AioRpcError as e:
            if e.code() is not Code.OUT_OF_RANGE:
                raise _Lost(f"{member.endpoint}: {e.details() or e.code().name}") from e
            if "compacted" in (e.details() or ""):
                raise Compacted(from_revision) from e

    async def _read(self, method: str, request: bytes) -> bytes:
        """A request that may be repeated: every member gets its share of the deadline."""
        return await self._call(method, request, repeatable=True)

    async def _write(self, method: str, request: bytes) -> bytes:
        """A request that is sent at most once."""
        return await self._call(method, request, repeatable=False)

    async def _call(self, method: str, request: bytes, *, repeatable: bool) -> bytes:
        name = method.rpartition("/")[2]
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + REQUEST_TIMEOUT_S
        share_s = REQUEST_TIMEOUT_S / len(self._members)
        tried, reason = 0, "no time"
        while (left_s := deadline_s - loop.time()) > 0:
            member = self._members[self._current]
            try:
                connect_s = min(left_s, share_s)
                if member.doubtful and not repeatable:
                    await self._hear(member, connect_s)
                return await self._attempt(
                    member, method, request, connect_s, connect_s if repeatable else left_s
                )
            except _NotSent as e:
                reason = str(e)
            except _Lost as e:
                reason = str(e)
                if not repeatable:
                    self._failed(member)
                    raise OutcomeUnknown(
                        f"etcd {name}: sent, but no answer came ({reason})",
                        hint="read the keys back before trying again",
                    ) from e
            self._failed(member)
            tried += 1
            if tried % len(self._members) == 0:
                await asyncio.sleep(min(PAUSE_S, max(0.0, deadline_s - loop.time())))
        asked = ", ".join(member.endpoint for member in self._members)
        raise Unavailable(
            f"etcd {name}: none of {asked} answered within {REQUEST_TIMEOUT_S:g} s (last: {reason})",
            hint=HEALTH_HINT,
        )

    async def _attempt(
        self, member: _Member, method: str, request: bytes, connect_s: float, timeout_s: float
    ) -> bytes:
        name = method.rpartition("/")[2]
        self._check_open(name)
        try:
            try:
                async with asyncio.timeout(connect_s):
                    await member.connect()
            except TimeoutError as e:
                raise _NotSent(f"{member.endpoint}: no connection within {connect_s:g} s") from e
            answer = await member.ask(method, request, timeout_s)
        except asyncio.CancelledError:
            self._raise_if_closed_under_us(name)
            # A caller with a deadline shorter than ours gave up on this member: the next call asks another.
            member.doubtful = True
            self._failed(member)
            raise
        except (_Lost, grpc.aio.UsageError):
            self._check_open(name)
            member.doubtful = True
            raise
        member.doubtful = False
        return answer

    async def _hear(self, member: _Member, timeout_s: float) -> None:
        """Ask something harmless first: a frozen member would swallow a write, which is sent only once."""
        try:
            await self._attempt(member, wire.RANGE, wire.get_request("/"), timeout_s, timeout_s)
        except _Lost as e:
            raise _NotSent(str(e)) from e

    def _failed(self, member: _Member) -> None:
        """Ask the next member from now on, unless another task already moved on."""
        if self._members[self._current] is member:
            self._current = (self._current + 1) % len(self._members)

    def _check_open(self, name: str) -> None:
        if self._closed:
            raise Unavailable(f"etcd {name}: this client is closed")

    def _raise_if_closed_under_us(self, name: str) -> None:
        """grpc.aio cancels the caller of a call whose channel is closed; only real cancellation may pass."""
        task = asyncio.current_task()
        if self._closed and task is not None and not task.cancelling():
            raise Unavailable(f"etcd {name}: this client was closed meanwhile")
