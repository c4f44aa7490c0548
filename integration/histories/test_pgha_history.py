"""A history through real `pgha` agents on this machine, under random faults: no anomaly, nothing lost.

Clients reach the primary as the edge would lead them: through one port that follows the leader key while it
says "serving", and that cuts what was connected to an older epoch.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import AsyncGenerator
from urllib.parse import quote

import pytest

from flyd.model import PostgresLeader
from integration.histories.nemesis import Hurt, Plan, counted, hurt, unexcused
from integration.histories.recording import Here, Recording
from integration.pgha_faults import silent_streams, until
from pgha.process_table import server_pids
from pgha.processes import kill_all
from pgha.requests import request_switchover
from tests.support.pgha import PASSWORD, Node, PgCluster, run_pgha

pytestmark = pytest.mark.timeout(600)

MINUTES = 0.3
KINDS = 4
POLL_S = 0.02
CHUNK = 65536


class Endpoint:
    """A port that follows the primary of a cluster."""

    def __init__(self, cluster: PgCluster) -> None:
        self._cluster = cluster
        self._leader: PostgresLeader | None = None
        self._sessions: set[asyncio.Task[None]] = set()
        self.port = 0

    @property
    def uri(self) -> str:
        """As clients are told."""
        return f"postgresql://postgres:{quote(PASSWORD)}@127.0.0.1:{self.port}/postgres"

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncGenerator[None]:
        """Listen and follow, until the end of the block."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        follow = asyncio.ensure_future(self._follow())
        try:
            yield
        finally:
            server.close()
            follow.cancel()
            self._cut()
            await asyncio.wait({follow, *self._sessions})

    async def _follow(self) -> None:
        while True:
            leader = await self._cluster.leader()
            if (leader and leader.epoch) != (self._leader and self._leader.epoch):
                self._cut()
            self._leader = leader
            await asyncio.sleep(POLL_S)

    def _cut(self) -> None:
        for session in self._sessions:
            session.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = asyncio.current_task()
        assert session is not None
        self._sessions.add(session)
        try:
            while self._leader is None or not self._leader.serving:
                await asyncio.sleep(POLL_S)
            host, _, port = self._leader.address.rpartition(":")
            with contextlib.suppress(OSError):
                there_reader, there_writer = await asyncio.open_connection(host, int(port))
                try:
                    async with asyncio.TaskGroup() as pumps:
                        pumps.create_task(_pump(reader, there_writer))
                        pumps.create_task(_pump(there_reader, writer))
                finally:
                    there_writer.close()
        finally:
            writer.close()
            self._sessions.discard(session)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()
    writer.close()


class Faults:
    """What is done to the members, mostly to the primary."""

    def __init__(self, cluster: PgCluster, chance: random.Random, recording: Recording) -> None:
        self._cluster = cluster
        self._chance = chance
        self._recording = recording

    def all(self) -> dict[str, Hurt]:
        """By name."""
        return {
            "node killed": self.node_killed,
            "node frozen": self.node_frozen,
            "agent killed": self.agent_killed,
            "Postgres killed": self.postgres_killed,
            "cut off": self.cut_off,
            "switchover": self.switchover,
        }

    async def _victim(self) -> Node:
        leader = await self._cluster.wait_leader()
        replicas = [node for node in self._cluster.nodes if node.name != leader.node]
        primary = self._cluster.node(leader.node)
        node = primary if self._chance.random() < 0.75 else self._chance.choice(replicas)
        print(f" {node.name} (primary is {primary.name}) ...", end="", flush=True)
        return node

    async def _go_on_without(self, node: Node) -> None:
        """Somebody else leads, and every client writes again."""
        await self._cluster.wait_leader(lambda leader: leader.node != node.name)
        await asyncio.to_thread(self._recording.wait_acks)

    async def _recovered(self) -> None:
        await asyncio.to_thread(self._recording.wait_acks)
        await self._cluster.wait_whole()

    async def node_killed(self) -> None:
        node = await self._victim()
        await node.kill()
        await self._go_on_without(node)
        await node.start()
        await self._recovered()

    async def node_frozen(self) -> None:
        node = await self._victim()
        node.signal(signal.SIGSTOP)
        await self._go_on_without(node)
        node.signal(signal.SIGCONT)
        await self._recovered()

    async def agent_killed(self) -> None:
        """Its killer ends Postgres at once."""
        node = await self._victim()
        await node.kill_agent()
        await self._go_on_without(node)
        await node.start()
        await self._recovered()

    async def postgres_killed(self) -> None:
        """Whoever is primary then, the same or another, is so in a new epoch."""
        before, node = await self._cluster.wait_whole(), await self._victim()
        await kill_all(node.directory / "pgdata")
        if node.name == before.node:
            await self._cluster.wait_leader(lambda leader: leader.epoch > before.epoch)
        else:
            await until("its Postgres is back", lambda: bool(server_pids(node.directory / "pgdata")))
        await self._recovered()

    async def cut_off(self) -> None:
        """Neither etcd nor the other members hear of the primary; clients do."""
        node = self._cluster.node((await self._cluster.wait_leader()).node)
        async with silent_streams(node):
            self._cluster.links[node.name].cut()
            await self._go_on_without(node)
            self._cluster.links[node.name].heal()
        await self._recovered()

    async def switchover(self) -> None:
        before = await self._cluster.wait_whole()
        await request_switchover(self._cluster.kv, self._cluster.name, "", time.time())
        await self._cluster.wait_leader(lambda leader: leader.epoch > before.epoch)
        await self._recovered()


@pytest.mark.soak
async def test_no_anomaly_under_random_faults() -> None:
    plan = Plan.from_environment(MINUTES)
    recording = Recording("pgha", plan.seed)
    async with run_pgha(links=True) as cluster:
        await cluster.wait_whole()
        endpoint = Endpoint(cluster)
        async with endpoint.run():
            with recording:
                here = Here(endpoint.uri, recording.folder)
                for _ in range(2):
                    recording.launch(here)
                await asyncio.to_thread(recording.wait_acks)
                done = await hurt(plan, Faults(cluster, plan.chance(), recording).all(), KINDS)
                history = await asyncio.to_thread(recording.finish, here)
    print(history.summary(plan.seed, done))
    assert len(counted(done)) >= KINDS
    assert not unexcused(history.report.anomalies, done), f"{history.report.text()}\n{history.path}"
    assert history.report.unread == 0
