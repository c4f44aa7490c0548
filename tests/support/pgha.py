"""A Postgres cluster of real `pgha` agents on loopback, ways to hurt it, and a writer with a memory."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import psycopg

from flyd.errors import Unavailable
from flyd.model import Event, PostgresLeader, PostgresMember, decode
from flyd.ports import KV
from flyd.store import keys as store_keys
from flyd.store.etcd import EtcdKV
from pgha.process_table import server_pids
from tests.support.etcd import EtcdCluster, free_ports, run_etcd
from tests.support.links import Link

PGHA = Path(sys.executable).parent / "pgha"
NO_MORE: Mapping[str, str] = MappingProxyType({})
PASSWORD = "a superuser's secret"
CONNECT_S = 2.0
STORE_S = 60.0  # etcd may be away that long: it is hurt on purpose, and elects a leader of its own
ATTEMPT_S = 0.6  # one question to it, as the agents ask
WAIT_S = 60.0  # for what the cluster does by itself

T = TypeVar("T")
Connection = psycopg.AsyncConnection[tuple[object, ...]]


class Node:
    """One member: its agent's process, its Postgres, its directory."""

    def __init__(self, name: str, address: str, directory: Path, env: dict[str, str]) -> None:
        self.name = name
        self.address = address
        self.directory = directory
        self.group: int | None = None  # that the agent runs with; None: ours
        self._env = env
        self._agent: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the agent."""
        with (self.directory.parent / f"{self.name}.log").open("ab") as log:
            self._agent = await asyncio.create_subprocess_exec(
                str(PGHA), "run", env=os.environ | self._env, stdout=log, stderr=log, group=self.group
            )

    def sibling(self, name: str, host: str) -> Node:
        """One more member of the same cluster, as if made later."""
        port, directory = self._env["PGHA_PORT"], self.directory.parent / name
        env = self._env | {
            "PGHA_NODE": name,
            "PGHA_VOTERS": f"{self._env['PGHA_VOTERS']},{name}",
            "PGHA_ADDRESS": host,
            "PGHA_DATA_DIR": str(directory),
        }
        return Node(name, f"{host}:{port}", directory, env)

    @property
    def agent_pid(self) -> int:
        """Of the agent that was started last."""
        assert self._agent is not None
        return self._agent.pid

    def pids(self) -> list[int]:
        """The agent and every process of its Postgres."""
        agent = [self._agent.pid] if self._agent is not None and self._agent.returncode is None else []
        return agent + server_pids(self.directory / "pgdata")

    def signal(self, number: signal.Signals) -> None:
        """Send it to all of them."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    async def kill(self) -> None:
        """Lose the node: SIGKILL to all of it."""
        while self.pids():
            self.signal(signal.SIGKILL)
            await asyncio.sleep(0.01)
        if self._agent is not None:
            await self._agent.wait()

    async def kill_agent(self) -> None:
        """SIGKILL to the agent alone."""
        assert self._agent is not None
        self._agent.kill()
        await self._agent.wait()

    def signal_agent(self, number: signal.Signals) -> None:
        """To the agent alone."""
        assert self._agent is not None
        self._agent.send_signal(number)

    async def terminate(self) -> int:
        """Ask the agent to end; its exit code."""
        assert self._agent is not None
        self._agent.terminate()
        return await self._agent.wait()

    def wipe(self) -> None:
        """Lose the volume."""
        shutil.rmtree(self.directory)


class PgCluster:
    """Members in three "regions" and a view of what etcd says of them."""

    def __init__(self, name: str, root: Path, kv: KV, etcd: EtcdCluster, nodes: list[Node]) -> None:
        self.name = name
        self.root = root
        self.kv = kv
        self.etcd = etcd
        self.nodes = nodes
        self.links: dict[str, Link] = {}  # of each node to etcd, if the cluster was made with them
        self.inserted = 0  # numbers given to writers so far

    def node(self, name: str) -> Node:
        """By name."""
        return next(n for n in self.nodes if n.name == name)

    async def leader(self) -> PostgresLeader | None:
        """Who may be primary."""
        item = await self._ask(lambda: self.kv.get(store_keys.postgres_leader(self.name)))
        return None if item is None else decode(item.value, PostgresLeader)

    async def members(self) -> dict[str, PostgresMember]:
        """What each member last said."""
        listing = await self._ask(lambda: self.kv.list(store_keys.postgres_members(self.name)))
        said = [decode(i.value, PostgresMember) for i in listing.items]
        return {m.node: m for m in said}

    async def events(self) -> list[Event]:
        """The cluster's history."""
        listing = await self._ask(lambda: self.kv.list(f"{store_keys.EVENTS}{self.name}/"))
        return [decode(i.value, Event) for i in listing.items]

    async def _ask(self, question: Callable[[], Awaitable[T]]) -> T:
        """etcd's answer, asked again for as long as it is away."""
        async with asyncio.timeout(STORE_S):
            while True:
                with contextlib.suppress(Unavailable, TimeoutError):
                    async with asyncio.timeout(ATTEMPT_S):
                        return await question()
                await asyncio.sleep(0.02)

    async def wait_leader(
        self, good: Callable[[PostgresLeader], bool] = lambda _: True, timeout_s: float = WAIT_S
    ) -> PostgresLeader:
        """The leader, once it serves and is as wanted."""
        async with asyncio.timeout(timeout_s):
            while True:
                leader = await self.leader()
                if leader is not None and leader.serving and good(leader):
                    return leader
                await asyncio.sleep(0.02)

    async def wait_whole(self, timeout_s: float = WAIT_S) -> PostgresLeader:
        """A serving leader whose epoch every other member streams."""
        async with asyncio.timeout(timeout_s):
            while True:
                leader, members = await self.leader(), await self.members()
                if leader is not None and leader.serving:
                    others = [m for m in members.values() if m.node != leader.node]
                    streaming = [m for m in others if m.streaming and m.timeline == leader.epoch]
                    if len(streaming) == len(self.nodes) - 1:
                        return leader
                await asyncio.sleep(0.05)

    def history(self) -> str:
        """The end of every agent's log, for a failed test."""
        texts = [f"== {p.name}\n{p.read_text()[-6000:]}" for p in sorted(self.root.glob("*.log"))]
        return "\n".join(texts)


class Writer:
    """Inserts 1, 2, 3, ... at the leader that etcd names; remembers every acknowledgement."""

    def __init__(self, cluster: PgCluster) -> None:
        self._cluster = cluster
        self.acks: list[tuple[int, float, str]] = []  # (number, when, by which address)
        self._left: list[asyncio.Future[None]] = []  # inserts that nobody waits for any more

    async def prepare(self) -> None:
        """Make the table."""
        leader = await self._cluster.wait_leader()
        async with await connect(leader.address) as connection:
            await connection.execute("CREATE TABLE IF NOT EXISTS acks (n int PRIMARY KEY)")

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                leader = await self._cluster.leader()
                if leader is None or not leader.serving:
                    await asyncio.sleep(0.01)
                    continue
                async with asyncio.timeout(CONNECT_S):
                    connection = await connect(leader.address)
                await self._insert(connection, leader)
            except (psycopg.Error, OSError, TimeoutError):
                await asyncio.sleep(0.01)

    async def _insert(self, connection: Connection, leader: PostgresLeader) -> None:
        """One after the other; leaves for a new leader when this one is silent, as the edge would."""
        while True:
            insert = asyncio.ensure_future(self._one(connection, leader.address))  # noqa: TID251
            try:
                while not (await asyncio.wait({insert}, timeout=0.05))[0]:
                    now = await self._cluster.leader()
                    if now is not None and now.serving and now.epoch != leader.epoch:
                        return
            finally:
                if not insert.done():
                    self._left.append(insert)
            insert.result()

    async def _one(self, connection: Connection, address: str) -> None:
        self._cluster.inserted += 1
        number = self._cluster.inserted
        await connection.execute("INSERT INTO acks VALUES (%s)", (number,))
        self.acks.append((number, time.monotonic(), address))

    async def close(self) -> None:
        """Give up what was left."""
        for insert in self._left:
            insert.cancel()
        if self._left:
            await asyncio.wait(self._left)

    def window_s(self) -> float:
        """The longest time between two acknowledgements that follow each other."""
        times = sorted(at for _, at, _ in self.acks)
        return max((b - a for a, b in itertools.pairwise(times)), default=0.0)

    async def lost(self) -> set[int]:
        """Acknowledged and not there."""
        leader = await self._cluster.wait_leader()
        async with await connect(leader.address) as connection:
            cursor = await connection.execute("SELECT n FROM acks")
            there = {row[0] for row in await cursor.fetchall()}
        return {n for n, _, _ in self.acks} - there


async def connect(address: str) -> Connection:
    """As a client, straight to a member."""
    host, _, port = address.rpartition(":")
    return await psycopg.AsyncConnection.connect(
        f"host={host} port={port} user=postgres dbname=postgres connect_timeout=2",
        password=PASSWORD,
        autocommit=True,
    )


@contextlib.asynccontextmanager
async def writing(cluster: PgCluster) -> AsyncGenerator[Writer]:
    """A writer that runs in the background."""
    writer = Writer(cluster)
    await writer.prepare()
    task = asyncio.ensure_future(writer.run())  # noqa: TID251
    try:
        yield writer
    finally:
        task.cancel()
        await asyncio.wait({task})
        await writer.close()


@contextlib.asynccontextmanager
async def run_pgha(
    member_count: int = 3,
    etcd_members: int = 1,
    *,
    links: bool = False,
    more_env: Mapping[str, str] = NO_MORE,
    first_group: int | None = None,
) -> AsyncGenerator[PgCluster]:
    """A cluster from nothing; all its processes are killed and its files removed at exit.

    With `links`, each agent reaches the first member of etcd, and only that, over a link that can be cut.
    With `first_group`, the agents run with that group id and the ones that follow it (only as root).
    """
    root = Path(tempfile.mkdtemp(prefix="pgha-it-"))
    root.chmod(0o755)
    name = f"db{secrets.token_hex(3)}"
    names = [f"{name}-{n + 1}" for n in range(member_count)]
    port = free_ports(1)[0]
    nodes: list[Node] = []
    async with run_etcd(etcd_members) as etcd:
        kv = EtcdKV(etcd.endpoints)
        relays = {node: Link(etcd.endpoints[0]) for node in names if links}
        for link in relays.values():
            await link.start()
        for n, node in enumerate(names):
            directory = root / node
            env = {
                "TMPDIR": str(root),  # the sockets go with the rest
                "PGHA_CLUSTER": name,
                "PGHA_NODE": node,
                "PGHA_VOTERS": ",".join(names),
                "PGHA_REGION": f"r{n + 1}",
                "PGHA_ADDRESS": f"127.0.40.{n + 1}",
                "PGHA_PORT": str(port),
                "PGHA_DATA_DIR": str(directory),
                "FLYD_ETCD": relays[node].endpoint if links else ",".join(etcd.endpoints),
                "PGHA_SUPERUSER_PASSWORD": PASSWORD,
                "PGHA_REPLICATION_PASSWORD": "another:secret",
                **more_env,
            }
            nodes.append(Node(node, f"127.0.40.{n + 1}:{port}", directory, env))
            nodes[-1].group = None if first_group is None else first_group + n
        cluster = PgCluster(name, root, kv, etcd, nodes)
        cluster.links |= relays
        try:
            for node in nodes:
                await node.start()
            yield cluster
        except BaseException:
            print(cluster.history())
            raise
        finally:
            for node in nodes:
                await node.kill()
            for link in relays.values():
                await link.close()
            await kv.close()
            shutil.rmtree(root, ignore_errors=True)
