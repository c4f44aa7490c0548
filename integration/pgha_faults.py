"""Ways to hurt a Postgres cluster of three on one machine, for test_pgha_incidents.py."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from pathlib import Path

import psycopg

from flyd.model import PostgresLeader
from pgha.process_table import server_pids
from tests.support.pgha import Connection, Node, PgCluster, Writer, connect, writing

WAIT_S = 60.0  # for what should take a second or three
POLL_S = 0.02
INCIDENT_S = 100.0  # of which a few on a machine that does nothing else
ROWS = 20


async def until(what: str, reached: Callable[[], bool]) -> None:
    """Return once it is so."""
    try:
        async with asyncio.timeout(WAIT_S):
            while not reached():
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise AssertionError(f"not within {WAIT_S:.0f} s: {what}") from None


async def wait_acks(writer: Writer, count: int = ROWS) -> None:
    """That many more acknowledgements."""
    wanted = len(writer.acks) + count
    await until(f"{count} more acknowledgements", lambda: len(writer.acks) >= wanted)


class Scene:
    """One incident under a writer: who led before it, who did not, and what was acknowledged."""

    def __init__(self, cluster: PgCluster, before: PostgresLeader, writer: Writer) -> None:
        self.cluster = cluster
        self.before = before
        self.writer = writer
        self.primary = cluster.node(before.node)
        self.replicas = [node for node in cluster.nodes if node.name != before.node]

    async def succeeded(self) -> PostgresLeader:
        """The next epoch's primary, once it serves."""
        return await self.cluster.wait_leader(lambda leader: leader.epoch > self.before.epoch)


@contextlib.asynccontextmanager
async def incident(cluster: PgCluster, name: str) -> AsyncGenerator[Scene]:
    """The cluster is whole and written to; then the block; then it is whole again, with nothing lost."""
    async with asyncio.timeout(INCIDENT_S):
        before = await cluster.wait_whole()
        async with writing(cluster) as writer:
            await wait_acks(writer)
            yield Scene(cluster, before, writer)
            await wait_acks(writer)
            await cluster.wait_whole()
    lost = await writer.lost()
    print(f"\n{name}: window {writer.window_s():.2f} s, {len(writer.acks)} acknowledged, {len(lost)} lost")
    assert lost == set()


# --------------------------------------------------------------------------- processes


def titled(node: Node, title: bytes) -> list[int]:
    """The processes of its Postgres with this in their title."""
    found: list[int] = []
    for pid in server_pids(node.directory / "pgdata"):
        with contextlib.suppress(OSError):
            if title in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


async def streams(node: Node, to: Node) -> list[int]:
    """Its processes that stream to that one."""
    async with await connect(node.address) as session:
        query = "SELECT pid FROM pg_stat_replication WHERE application_name = %s"
        cursor = await session.execute(query, (to.name,))
        return [int(str(row[0])) for row in await cursor.fetchall()]


def killers(node: Node) -> list[int]:
    """The process beside the agent that ends its Postgres at the deadline."""
    children = Path(f"/proc/{node.agent_pid}/task/{node.agent_pid}/children").read_text().split()
    return [int(pid) for pid in children if b"pgha.killer" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """The signal to each that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def fill_the_disk(node: Node) -> None:
    """As far as its Postgres can tell: no write to a file succeeds any more. Done as its own user."""
    data = node.directory / "pgdata"
    root, owner = os.geteuid() == 0, data.stat()
    for pid in server_pids(data):
        subprocess.run(
            ["prlimit", "--pid", str(pid), "--fsize=0:0"],
            user=owner.st_uid if root else None,
            group=owner.st_gid if root else None,
            extra_groups=() if root else None,
            check=False,  # a session may have ended meanwhile
        )


@contextlib.asynccontextmanager
async def silent_streams(node: Node, only: Node | None = None) -> AsyncGenerator[None]:
    """What it streams (to that one) stays in its hands, whoever connects; the connections live."""
    frozen: set[int] = set()

    async def freeze() -> None:
        while True:
            pids = set(titled(node, b"walsender") if only is None else await streams(node, only))
            send(pids - frozen, signal.SIGSTOP)
            frozen.update(pids)
            await asyncio.sleep(POLL_S)

    task = asyncio.ensure_future(freeze())
    try:
        await until("a stream is frozen", lambda: bool(frozen))
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
        send(frozen, signal.SIGCONT)


# --------------------------------------------------------------------------- what agents say


class Log:
    """What a node's agent says from now on."""

    def __init__(self, cluster: PgCluster, node: Node) -> None:
        self._path = cluster.root / f"{node.name}.log"
        self._name = node.name
        self._from = self._path.stat().st_size

    def says(self, text: str) -> bool:
        """Whether it has."""
        with self._path.open("rb") as log:
            log.seek(self._from)
            return text.encode() in log.read()

    async def wait(self, text: str) -> None:
        """Until it does."""
        await until(f"{self._name} says {text}", lambda: self.says(text))


# --------------------------------------------------------------------------- clients


async def never_acknowledged(work: Awaitable[object]) -> None:
    """It may fail, or hang for a while and be given up; it must not succeed."""
    try:
        async with asyncio.timeout(2.0):
            await work
    except (TimeoutError, psycopg.Error):
        return
    raise AssertionError("acknowledged")


async def rows(cluster: PgCluster, numbers: tuple[int, ...]) -> set[int]:
    """Which of them the leader has."""
    leader = await cluster.wait_leader()
    async with await connect(leader.address) as session:
        cursor = await session.execute("SELECT n FROM acks WHERE n = ANY(%s)", (list(numbers),))
        return {int(str(row[0])) for row in await cursor.fetchall()}


def insert(session: Connection, number: int) -> asyncio.Task[object]:
    """An INSERT on its way."""

    async def write() -> object:
        return await session.execute("INSERT INTO acks VALUES (%s)", (number,))

    return asyncio.create_task(write())
