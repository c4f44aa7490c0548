"""The Postgres port of pgha on a fake server, and the machine that it runs on.

Owns `PostgresHost` (a node: disk, network place, the server's process) and
`SimulatedPostgres` (pgha.ports.Postgres, one for each run of an agent). The server lives
on when the agent crashes; a power cut takes both and what was not flushed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from flyd.errors import FlydError, InvariantBroken, Refused, Unavailable
from pgha.model import Answer, Data, DataState, Position, Replica, Status, Synchronous
from tests.simulation.ledger import Entry, Ledger
from tests.simulation.loop import current, stream
from tests.simulation.network import Network
from tests.simulation.pgserver import Disk, Server

T = TypeVar("T")

QUERY_TIMEOUT_S = 1.0
FENCE_S = (0.004, 0.11)
PROMOTE_S = (0.05, 0.2)
COPY_S = (0.2, 2.0)
POLL_S = 0.02
CANNOT_REWIND = 0.1
PORT = ":5432"


class PostgresHost:
    """One member's machine."""

    def __init__(self, name: str, network: Network, ledger: Ledger, hosts: dict[str, PostgresHost]) -> None:
        self.name = name
        self.address = name + PORT
        self.network = network
        self.ledger = ledger
        self.disk = Disk()
        self.server: Server | None = None
        self.chance = stream(current().seed, f"postgres/{name}")
        self.kills = 0
        self.dark = False  # no power: connections to it are not even refused
        self.refused: list[str] = []  # members whose connections somebody else resets and refuses
        self.ended = asyncio.Event()  # the server, or its stream from a primary, has
        self.founders: tuple[str, ...] = ()
        self._hosts = hosts
        self._sessions = 0
        self._asks: dict[int, asyncio.Future[Any]] = {}

    @property
    def process(self) -> str:
        """The simulated process of the server."""
        return f"{self.name}/postgres"

    def peer(self, address: str) -> PostgresHost:
        """The node at this address, or of this name."""
        return self._hosts[address.removesuffix(PORT)]

    def next_session(self) -> int:
        """A number never used here."""
        self._sessions += 1
        return self._sessions

    def run(self) -> None:
        """Start the server's process."""
        self.server = Server(self)
        current().spawn(self.process, self.server.main())

    def kill(self) -> None:
        """The server is gone this instant; WAL that was not flushed may be gone with it."""
        self.kills += 1
        if self.server is None:
            return
        current().crash(self.process)
        self.server = None
        self.ended.set()
        if not self.dark:
            for other in self._hosts.values():
                self.reset_stream(other)
        kept = self.chance.randint(self.disk.flushed, len(self.disk.wal))
        del self.disk.wal[kept:]
        self.disk.flushed = kept
        for ask in self._asks.values():
            if not ask.done():
                ask.set_exception(Unavailable(f"Postgres of {self.name} ended"))
                ask.exception()  # its asker may have crashed; nobody has to see it
        self._asks.clear()

    def reset_stream(self, other: PostgresHost) -> None:
        """The other's stream from here is reset, once the network has brought that there."""
        server = other.server
        if server is not None and server.upstream == self.address:
            self.network.send(self.name, other.name, server.reset)

    def power_cut(self) -> None:
        """As `kill`, and nothing that was not flushed survives. `dark` says whether the host goes, too."""
        del self.disk.wal[self.disk.flushed :]
        self.kill()

    async def ask(self, question: Callable[[Server], T]) -> T:
        """Have the server answer in its own process; Unavailable if it is down or frozen."""
        server = self.server
        if server is None:
            raise Unavailable(f"Postgres of {self.name} is down")
        answer: asyncio.Future[T] = current().create_future()
        number = self.next_session()
        self._asks[number] = answer

        def settle() -> None:
            if answer.done():
                return
            try:
                answer.set_result(question(server))
            except FlydError as error:
                answer.set_exception(error)
                answer.exception()  # its asker may have crashed; nobody has to see it

        server.inbox.put_nowait(settle)
        try:
            async with asyncio.timeout(QUERY_TIMEOUT_S):
                return await answer
        except TimeoutError:
            raise Unavailable(f"Postgres of {self.name} did not answer") from None
        finally:
            self._asks.pop(number, None)


class SimulatedPostgres:
    """pgha.ports.Postgres."""

    def __init__(self, host: PostgresHost) -> None:
        self._host = host

    async def _work(self, span_s: tuple[float, float]) -> None:
        """Let time pass; Unavailable if the server was killed meanwhile."""
        kills = self._host.kills
        await asyncio.sleep(self._host.chance.uniform(*span_s))
        if self._host.kills != kills:
            raise Unavailable(f"Postgres of {self._host.name} was killed")

    async def data(self) -> Data:
        disk = self._host.disk
        return Data(state=disk.state, system_id=disk.system_id, promised=disk.promised)

    async def save_promise(self, revision: int) -> None:
        await asyncio.sleep(self._host.chance.uniform(0.001, 0.01))
        self._host.disk.promised = max(self._host.disk.promised, revision)

    async def initialise(self) -> None:
        disk = self._host.disk
        if disk.state is not DataState.EMPTY:
            raise Refused(f"{self._host.name} has data")
        await self._work(COPY_S)
        disk.wal, disk.flushed = [Entry(1, 0)], 1
        disk.state, disk.system_id = DataState.READY, str(self._host.chance.randrange(10**9))

    async def start(self) -> None:
        if self._host.disk.state is not DataState.READY:
            raise Refused(f"{self._host.name} has no usable data")
        if self._host.server is not None:
            return
        await self._work((0.01, 0.1))
        self._host.run()

    async def stop(self, timeout_s: float) -> bool:
        host = self._host
        clean = True
        if host.server is not None:
            try:
                await host.ask(Server.shut_down)
                async with asyncio.timeout(timeout_s):
                    while not await host.ask(Server.handed_over):
                        await asyncio.sleep(POLL_S)
            except (TimeoutError, Unavailable):
                clean = False
        await self.kill()
        return clean

    async def kill(self) -> None:
        await asyncio.sleep(self._host.chance.uniform(0.001, 0.01))
        self._host.kill()

    async def status(self) -> Status:
        return Status() if self._host.server is None else await self._host.ask(Server.status)

    async def replicas(self) -> tuple[Replica, ...]:
        return await self._host.ask(Server.replicas)

    async def wait_ended(self) -> None:
        await self._host.ended.wait()
        self._host.ended.clear()

    async def follow(self, address: str) -> None:
        await self._work((0.001, 0.02))
        await self._host.ask(lambda server: server.follow(address))

    async def fence(self) -> Position:
        """The receiver lives on for a moment after the configuration says that it should not."""
        await self._work(FENCE_S)

        def close(server: Server) -> Position:
            server.end_session()
            server.upstream = ""
            return Position(timeline=self._host.disk.timeline(), lsn=self._host.disk.flushed)

        return await self._host.ask(close)

    async def synchronise(self, wanted: Synchronous) -> int:
        """The new configuration is not in force at once, and until then the old one is."""
        await self._work((0.001, 0.1))
        return await self._host.ask(lambda server: server.synchronise(wanted))

    async def promote(self, timeline: int) -> int:
        host = self._host
        await self._work(PROMOTE_S)

        def leave(server: Server) -> int:
            if not server.in_recovery and host.disk.timeline() == timeline:
                return next(n for n, entry in enumerate(host.disk.wal) if entry.timeline == timeline)
            if not server.ready:
                raise Unavailable(f"Postgres of {host.name} takes no connections yet")
            if not server.in_recovery or timeline <= host.disk.timeline():
                raise InvariantBroken(f"{host.name} is on timeline {host.disk.timeline()}, not {timeline}")
            return server.promote(timeline)

        return await host.ask(leave)

    async def checkpoint(self) -> None:
        await self._work((0.01, 0.3))
        await self._host.ask(lambda _server: None)

    async def rewind(self, address: str) -> bool:
        """Truncate to where our history leaves theirs."""
        disk = self._host.disk
        self._reach(address)
        await self.kill()
        disk.state = DataState.DAMAGED
        if self._host.chance.random() < CANNOT_REWIND:
            return False
        source = await self._from(address)
        if source.system_id != disk.system_id:
            return False
        fork = disk.fork(source)
        del disk.wal[fork:]
        disk.flushed = fork
        disk.state = DataState.READY
        return True

    async def copy(self, address: str) -> None:
        disk = self._host.disk
        self._reach(address)
        await self.kill()
        disk.state = DataState.DAMAGED
        disk.wal, disk.flushed = [], 0
        source = await self._from(address)
        disk.wal = list(source.wal[: source.flushed])
        disk.flushed = len(disk.wal)
        disk.system_id, disk.state = source.system_id, DataState.READY

    def _reach(self, address: str) -> Server:
        """The server there; Unavailable if it does not answer."""
        other = self._host.peer(address)
        server = other.server
        if server is None or not server.ready or not self._host.network.reaches(self._host.name, other.name):
            raise Unavailable(f"{address} does not answer")
        return server

    async def _from(self, address: str) -> Disk:
        """The other's disk, once the work is done; Unavailable if it was not there all the time."""
        server = self._reach(address)
        for _ in range(2):
            await self._work((COPY_S[0] / 2, COPY_S[1] / 2))
            if self._reach(address) is not server:
                raise Unavailable(f"{address} went away")
        return self._host.peer(address).disk


class SimulatedLookout:
    """pgha.ports.Lookout: asks over the network; a frozen server is silent, one that is not there refused."""

    def __init__(self, host: PostgresHost) -> None:
        self._host = host

    async def ask(self, address: str, timeout_s: float) -> Answer:
        me, peer = self._host, self._host.peer(address)
        answer: asyncio.Future[Answer] = current().create_future()

        def settle(said: Answer) -> None:
            if not answer.done():
                answer.set_result(said)

        def reply(said: Answer) -> None:
            me.network.send(peer.name, me.name, lambda: settle(said))

        def arrive() -> None:
            if me.name in peer.refused or (peer.server is None and not peer.dark):
                reply(Answer.REFUSED)
            elif peer.server is not None:
                peer.server.inbox.put_nowait(lambda: reply(Answer.ANSWERED))

        me.network.send(me.name, peer.name, arrive)
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            return Answer.SILENT


class SimulatedKiller:
    """pgha.ports.Killer: a process of its own that kills the server at the deadline, or with the agent."""

    def __init__(self, host: PostgresHost) -> None:
        self._host = host
        self.process = f"{host.name}/killer{host.next_session()}"  # an old, frozen one may still be there
        self._deadline_s = 0.0
        self._agent_gone = False
        self._told = asyncio.Event()

    def arm(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._told.set()

    def lose_agent(self) -> None:
        """The agent's end of the pipe is closed."""
        self._agent_gone = True
        self._told.set()

    async def main(self) -> None:
        """The killer's process."""
        while not self._agent_gone:
            self._told.clear()
            left_s = self._deadline_s - current().time() if self._deadline_s else None
            try:
                async with asyncio.timeout(left_s):
                    await self._told.wait()
            except TimeoutError:
                self._host.kill()
                self._deadline_s = 0
        self._host.kill()
