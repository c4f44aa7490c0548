"""A fake Postgres server: WAL as a list, streaming by pull, commits that wait for ANY k.

Owns: `Disk` (what survives), `Server` (one run of the postmaster: its memory, living in a
simulated process of its own, so that it can be killed and frozen) and the streaming
protocol between servers. An LSN is a number of entries.

Like the real one: only flushed WAL is sent; a standby flushes before it says so; a request
for more doubles as the flush acknowledgement; one that was on its way when the standby was
fenced still counts; a server refuses a standby whose position is not in its history.

Used by postgres.py (the adapter given to agents) and postgres_world.py (clients, faults).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import msgspec

from pgha.membership import settled
from pgha.model import DataState, Replica, Status, Synchronous
from tests.simulation.ledger import Entry, Ledger
from tests.simulation.loop import Stream, current
from tests.simulation.network import Network

FLUSH_S = (0.0005, 0.01)
READY_AFTER_S = (0.05, 0.6)
REPLAY_S = (0.001, 0.05)
KEEPALIVE_S = 0.5
RECEIVE_TIMEOUT_S = 2.0
RECONNECT_S = 0.2
BATCH = 20


class Disk(msgspec.Struct):
    """What a node's machine keeps through anything."""

    state: DataState = DataState.EMPTY
    system_id: str = ""
    promised: int = 0
    wal: list[Entry] = []
    flushed: int = 0

    def timeline(self) -> int:
        """Of the last flushed WAL."""
        return self.wal[self.flushed - 1].timeline if self.flushed else 0

    def contains(self, timeline: int, lsn: int) -> bool:
        """Whether the position lies in this history, judged as Postgres does: by timelines."""
        ends = [n + 1 for n, entry in enumerate(self.wal[: self.flushed]) if entry.timeline == timeline]
        return bool(ends) and lsn <= ends[-1]

    def fork(self, other: Disk) -> int:
        """Where the two histories part."""
        both = zip(self.wal[: self.flushed], other.wal[: other.flushed], strict=False)
        shared = 0
        for ours, theirs in both:
            if ours != theirs:
                break
            shared += 1
        return shared


class Request(msgspec.Struct, frozen=True):
    """A standby: I have flushed up to `lsn`, give me more."""

    name: str
    session: int
    system_id: str
    timeline: int
    lsn: int
    first: bool
    reply: Callable[[tuple[Entry, ...] | None], None]  # None: refused


class Receiver(msgspec.Struct):
    """A standby as its sender knows it."""

    session: int
    flushed: int
    heard_s: float
    waiting: Request | None = None


class Commit(msgspec.Struct, frozen=True):
    """A client that waits."""

    lsn: int
    row: int
    timeline: int
    reply: Callable[[bool], None]


class Node(Protocol):
    """A member's machine, as its server and its peers use it."""

    name: str
    disk: Disk
    chance: Stream
    network: Network
    ledger: Ledger
    server: Server | None
    refused: list[str]
    ended: asyncio.Event
    founders: tuple[str, ...]

    def next_session(self) -> int:
        """A number that this node has never used."""
        ...

    def peer(self, address: str) -> Node:
        """The node at this address."""
        ...


class Server:
    """One run of Postgres."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.inbox: asyncio.Queue[Callable[[], None]] = asyncio.Queue()
        self.ready = False
        self.in_recovery = True
        self.stopping = False
        self.upstream = ""
        self.session = 0
        self.streaming = False
        self.replayed = 0
        self.synchronous = settled(node.founders).synchronous
        self._answer: asyncio.Future[tuple[Entry, ...] | None] | None = None  # that we wait for
        self.receivers: dict[str, Receiver] = {}
        self._commits: list[Commit] = []
        self._group: asyncio.TaskGroup | None = None

    # ------------------------------------------------------------------ the process

    async def main(self) -> None:
        """Run until killed."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            group.create_task(self._recover())
            group.create_task(self._keepalive())
            while True:
                handle = await self.inbox.get()
                handle()

    def task(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine inside this process."""
        assert self._group is not None
        self._group.create_task(work)

    async def _recover(self) -> None:
        await asyncio.sleep(self.node.chance.uniform(*READY_AFTER_S))
        self.ready = True
        self.replayed = self.node.disk.flushed

    async def _keepalive(self) -> None:
        while True:
            await asyncio.sleep(KEEPALIVE_S)
            for _, receiver in sorted(self.receivers.items()):
                if receiver.waiting is not None:
                    request, receiver.waiting = receiver.waiting, None
                    request.reply(())

    def status(self) -> Status:
        """What a query would say now."""
        if not self.ready:
            return Status(running=True)
        disk = self.node.disk
        return Status(
            running=True,
            ready=True,
            in_recovery=self.in_recovery,
            timeline=disk.timeline(),
            began_lsn=next((n for n, e in enumerate(disk.wal) if e.timeline == disk.timeline()), 0),
            flushed_lsn=disk.flushed,
            replayed_lsn=self.replayed if self.in_recovery else disk.flushed,
            idle=self.in_recovery and self.replayed == disk.flushed,
            upstream=self.upstream,
            streaming=self.streaming,
            synchronous=self.synchronous,
        )

    def timeline(self) -> int:
        """Of its last WAL."""
        return self.node.disk.timeline()

    def replicas(self) -> tuple[Replica, ...]:
        """pg_stat_replication."""
        now = current().time()
        return tuple(
            Replica(name=name, flushed_lsn=r.flushed, streaming=now - r.heard_s < RECEIVE_TIMEOUT_S)
            for name, r in sorted(self.receivers.items())
            if now - r.heard_s < 2 * RECEIVE_TIMEOUT_S
        )

    # ------------------------------------------------------------------ a standby

    def end_session(self) -> None:
        """The walreceiver is gone; what arrives for it from now on is dropped."""
        self.session = self.node.next_session()
        self.streaming = False

    def reset(self) -> None:
        """The connection to the upstream breaks; a new one is tried soon."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(None)

    def follow(self, address: str) -> None:
        """Stream from there from now on."""
        if self.upstream == address:
            return
        self.end_session()
        self.upstream = address
        self.task(self._receive(self.session, address))

    async def _receive(self, session: int, address: str) -> None:
        node, first = self.node, True
        while self.session == session:
            answer: asyncio.Future[tuple[Entry, ...] | None] = current().create_future()
            self._answer = answer
            self._ask(node.peer(address), session, first, answer)
            try:
                async with asyncio.timeout(RECEIVE_TIMEOUT_S):
                    entries = await answer
            except TimeoutError:
                entries = None
            if self.session != session:
                return
            if entries is None:
                self.streaming, first = False, True
                node.ended.set()
                await asyncio.sleep(RECONNECT_S)
                continue
            await asyncio.sleep(node.chance.uniform(*FLUSH_S) if entries else 0)
            if self.session != session:
                return
            node.disk.wal.extend(entries)
            node.disk.flushed = len(node.disk.wal)
            self.streaming, first = True, False
            if entries:
                self.wal_grew()
                self.task(self._replay(node.disk.flushed))

    def _ask(
        self, peer: Node, session: int, first: bool, answer: asyncio.Future[tuple[Entry, ...] | None]
    ) -> None:
        node, disk = self.node, self.node.disk

        def settle(entries: tuple[Entry, ...] | None) -> None:
            if not answer.done():
                answer.set_result(entries)

        request = Request(
            name=node.name,
            session=session,
            system_id=disk.system_id,
            timeline=disk.timeline(),
            lsn=disk.flushed,
            first=first,
            reply=lambda entries: node.network.send(peer.name, node.name, lambda: settle(entries)),
        )

        def arrive() -> None:
            if node.name in peer.refused:
                node.network.send(peer.name, node.name, lambda: settle(None))
            elif peer.server is not None:
                server = peer.server
                server.inbox.put_nowait(lambda: server.serve(request))

        node.network.send(node.name, peer.name, arrive)

    async def _replay(self, lsn: int) -> None:
        await asyncio.sleep(self.node.chance.uniform(*REPLAY_S))
        self.replayed = max(self.replayed, min(lsn, self.node.disk.flushed))

    # ------------------------------------------------------------------ a sender

    def serve(self, request: Request) -> None:
        """A standby asks for WAL: note what it has flushed, send more now or once there is more."""
        disk = self.node.disk
        known = self.receivers.get(request.name)
        if known is not None and known.session > request.session:
            return
        acceptable = request.lsn <= disk.flushed and disk.contains(request.timeline, request.lsn)
        if not self.ready or request.system_id != disk.system_id or not acceptable:
            request.reply(None)
            return
        standby = self.node.peer(request.name)
        asks_still = standby.server is not None and standby.server.session == request.session
        if request.first and asks_still:  # else its disk may have other WAL by now
            ours = standby.disk.wal[: request.lsn]
            self.node.ledger.check_prefix(request.name, self.node.name, ours, disk.wal)
        self.receivers[request.name] = Receiver(request.session, request.lsn, current().time(), request)
        self._release()
        self.wal_grew()

    def wal_grew(self) -> None:
        """Send to whoever waits for more."""
        disk = self.node.disk
        for _, receiver in sorted(self.receivers.items()):
            request = receiver.waiting
            if request is not None and disk.flushed > request.lsn:
                receiver.waiting = None
                request.reply(tuple(disk.wal[request.lsn : min(disk.flushed, request.lsn + BATCH)]))

    # ------------------------------------------------------------------ a primary

    def insert(self, row: int, reply: Callable[[bool], None]) -> None:
        """A client's row; `reply(True)` is the acknowledgement, `reply(False)` a refusal."""
        disk = self.node.disk
        if not self.ready or self.in_recovery or self.stopping:
            reply(False)
            return
        timeline = disk.wal[-1].timeline
        disk.wal.append(Entry(timeline, row))
        self._commits.append(Commit(len(disk.wal), row, timeline, reply))
        self.task(self._flush(len(disk.wal)))

    async def _flush(self, lsn: int) -> None:
        await asyncio.sleep(self.node.chance.uniform(*FLUSH_S))
        self.node.disk.flushed = max(self.node.disk.flushed, lsn)
        self.wal_grew()
        self._release()

    def _release(self) -> None:
        """Acknowledge the commits that ANY k standbys have flushed."""
        needed, names = self.synchronous.acks, self.synchronous.names
        flushed = sorted((r.flushed for n, r in self.receivers.items() if n in names), reverse=True)
        safe = min(flushed[needed - 1] if len(flushed) >= needed else 0, self.node.disk.flushed)
        while self._commits and self._commits[0].lsn <= safe and not self.stopping:
            commit = self._commits.pop(0)
            self.node.ledger.acknowledge(commit.row, self.node.name, commit.timeline)
            commit.reply(True)

    def synchronise(self, wanted: Synchronous) -> int:
        """Commits wait for these from now on; every stream breaks, as those of ended walsenders do."""
        self.synchronous = wanted
        for _, receiver in sorted(self.receivers.items()):
            if receiver.waiting is not None:
                receiver.waiting.reply(None)
        self.receivers.clear()
        return self.node.disk.flushed

    def promote(self, timeline: int) -> int:
        """Leave recovery; answers where the new timeline leaves the old one."""
        disk = self.node.disk
        self.end_session()
        self.upstream = ""
        self.replayed = switch = disk.flushed
        disk.wal.append(Entry(timeline, 0))
        disk.flushed = len(disk.wal)
        self.in_recovery = False
        current().note(f"promoted {self.node.name} timeline {timeline} at {switch}")
        self.node.ledger.promoted(self.node.name, timeline, disk.wal)
        self.wal_grew()
        return switch

    def shut_down(self) -> None:
        """Begin a fast shutdown: sessions end without an answer, standbys still get all WAL."""
        self.stopping = True
        self._commits.clear()
        self.node.disk.flushed = len(self.node.disk.wal)
        self.wal_grew()

    def handed_over(self) -> bool:
        """Whether every standby that is connected has all of it."""
        now, flushed = current().time(), self.node.disk.flushed
        return all(
            r.flushed >= flushed for r in self.receivers.values() if now - r.heard_s < RECEIVE_TIMEOUT_S
        )
