"""What every pgha.ports.Postgres does; two members of a cluster of three, without any agent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psycopg
import pytest

from flyd.errors import Refused, Unavailable
from pgha.binaries import find_binaries
from pgha.lookout import TcpLookout
from pgha.membership import settled
from pgha.model import Answer, DataState, Status, Synchronous
from pgha.pgconf import PostgresConfig
from pgha.postgres import RealPostgres
from pgha.process_table import server_pids
from pgha.processes import unprivileged
from tests.support.etcd import free_ports

NODES = ("pg-1", "pg-2", "pg-3")
WAIT_S = 20.0
pytestmark = pytest.mark.timeout(120)


class Pair:
    """Two members and their files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        ports = free_ports(2)
        bin_dir = find_binaries("", unprivileged(), root)
        self.addresses = [f"127.0.0.1:{port}" for port in ports]
        self.members = [
            RealPostgres(
                PostgresConfig(
                    node=NODES[n],
                    members=NODES,
                    host="127.0.0.1",
                    port=ports[n],
                    directory=str(root / NODES[n]),
                    bin_dir=str(bin_dir),
                    socket_dir=str(root / f"s{n}"),
                    superuser_password="super'secret",
                    replication_password="repl:\\secret",
                )
            )
            for n in range(2)
        ]

    async def connect(self, number: int) -> psycopg.AsyncConnection[tuple[object, ...]]:
        """As a client would, over TCP with the password."""
        host, port = self.addresses[number].split(":")
        return await psycopg.AsyncConnection.connect(
            f"host={host} port={port} user=postgres dbname=postgres",
            password="super'secret",
            autocommit=True,
        )


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    root = Path(tempfile.mkdtemp(prefix="pgha-c-"))
    root.chmod(0o755)
    pair = Pair(root)
    yield pair
    for member in pair.members:
        await member.kill()
    shutil.rmtree(root)


async def wait_for(read: Callable[[], Awaitable[Status]], good: Callable[[Status], bool]) -> Status:
    async with asyncio.timeout(WAIT_S):
        while not good(status := await read()):
            await asyncio.sleep(0.02)
        return status


async def make_primary(pair: Pair) -> RealPostgres:
    first = pair.members[0]
    await first.initialise()
    await first.start()
    await wait_for(first.status, lambda s: s.ready and s.idle)
    await first.promote(2)
    return first


async def make_replica(pair: Pair) -> RealPostgres:
    second = pair.members[1]
    await second.copy(pair.addresses[0])
    await second.start()
    await wait_for(second.status, lambda s: s.ready and s.idle)
    await second.follow(pair.addresses[0])
    await wait_for(second.status, lambda s: s.streaming)
    return second


async def test_data_and_promise(pair: Pair) -> None:
    first = pair.members[0]
    assert (await first.data()).state is DataState.EMPTY
    await first.initialise()
    data = await first.data()
    assert data.state is DataState.READY
    assert data.system_id
    assert data.promised == 0
    await first.save_promise(17)
    assert (await first.data()).promised == 17
    with pytest.raises(Refused):
        await first.initialise()


async def test_a_server_starts_fenced_and_dies_whole(pair: Pair) -> None:
    first = pair.members[0]
    assert not (await first.status()).running
    await first.initialise()
    await first.start()
    await first.start()  # twice is once
    status = await wait_for(first.status, lambda s: s.ready)
    assert status.in_recovery
    assert status.timeline == 1
    assert status.upstream == ""
    await first.kill()
    assert server_pids(pair.root / "pg-1" / "pgdata") == []
    assert not (await first.status()).running
    with pytest.raises(Unavailable):
        await first.fence()


async def test_streaming_fencing_promotion_and_rewind(pair: Pair) -> None:
    first = await make_primary(pair)
    status = await first.status()
    assert status.primary()
    assert status.timeline == 2
    second = await make_replica(pair)
    assert [r.name for r in await first.replicas()] == ["pg-2"]

    # Others are to acknowledge: once it says so, no process goes by the old word.
    assert (await first.status()).synchronous == settled(NODES).synchronous
    both = Synchronous(names=NODES, acks=2)
    lsn = await first.synchronise(both)
    assert 0 < lsn <= (status := await first.status()).flushed_lsn
    assert status.synchronous == both
    async with await pair.connect(0) as client:
        waiting = asyncio.ensure_future(client.execute("CREATE TABLE waits (n int)"))  # noqa: TID251
        await wait_for(second.status, lambda s: s.streaming and s.flushed_lsn > lsn)
        assert not (await asyncio.wait({waiting}, timeout=0.3))[0], "one acknowledges where two are needed"
        await first.synchronise(settled(NODES).synchronous)
        await waiting
    await wait_for(second.status, lambda s: s.streaming)

    # A commit waits for the replica's disk.
    async with await pair.connect(0) as client:
        await client.execute("CREATE TABLE t (n int)")
        await client.execute("INSERT INTO t VALUES (1)")
        position = await second.fence()
        assert position.timeline == 2
        assert (await second.status()).upstream == ""
        waiting = asyncio.ensure_future(client.execute("INSERT INTO t VALUES (2)"))  # noqa: TID251
        done, _ = await asyncio.wait({waiting}, timeout=0.5)
        assert not done, "acknowledged although the only replica is fenced"
        assert (await second.fence()) == position

        # The replica becomes primary on a timeline of our choice; the other one dies and comes back.
        await first.kill()
        with pytest.raises(psycopg.OperationalError):
            await waiting
    fork = await second.promote(5)
    assert fork <= position.lsn
    assert await second.promote(5) == fork
    assert (await second.status()).timeline == 5
    await first.start()
    old = await wait_for(first.status, lambda s: s.ready and s.idle)
    assert old.timeline == 2
    assert old.replayed_lsn > fork
    assert await first.rewind(pair.addresses[1])
    assert (await first.data()).state is DataState.READY
    await first.start()
    await wait_for(first.status, lambda s: s.ready and s.idle)
    await first.follow(pair.addresses[1])
    await wait_for(first.status, lambda s: s.streaming and s.timeline == 5)
    async with await pair.connect(1) as client:
        await client.execute("INSERT INTO t VALUES (3)")
    async with await pair.connect(0) as client:
        cursor = await client.execute("SELECT n FROM t ORDER BY n")
        assert await cursor.fetchall() == [(1,), (3,)]


async def test_the_end_of_a_server_and_of_a_stream_is_noticed_at_once(pair: Pair) -> None:
    first = await make_primary(pair)
    second = await make_replica(pair)
    lookout = TcpLookout()
    assert await lookout.ask(pair.addresses[0], 5.0) is Answer.ANSWERED
    with contextlib.suppress(TimeoutError):  # what has ended so far
        async with asyncio.timeout(0.1):
            while True:
                await second.wait_ended()
    primary, stream = (asyncio.ensure_future(m.wait_ended()) for m in (first, second))  # noqa: TID251
    for pid in server_pids(pair.root / "pg-1" / "pgdata"):
        os.kill(pid, signal.SIGSTOP)
    assert await lookout.ask(pair.addresses[0], 0.3) is Answer.SILENT
    assert not (await asyncio.wait({primary, stream}, timeout=0.1))[0]
    await first.kill()
    async with asyncio.timeout(2.0):
        await primary
        await stream
    assert await lookout.ask(pair.addresses[0], 5.0) is Answer.REFUSED
    assert not (await second.status()).streaming


async def test_a_fast_stop_gives_everything_to_the_replica(pair: Pair) -> None:
    first = await make_primary(pair)
    second = await make_replica(pair)
    assert await first.stop(10.0)
    await second.fence()
    await first.start()
    old = await wait_for(first.status, lambda s: s.ready and s.idle)
    assert old.flushed_lsn == (await second.status()).flushed_lsn


async def test_an_unreachable_source_damages_nothing(pair: Pair) -> None:
    first = pair.members[0]
    await first.initialise()
    await first.start()
    await wait_for(first.status, lambda s: s.ready)
    for attempt in (first.copy, first.rewind):
        with pytest.raises(Unavailable):
            await attempt(pair.addresses[1])
    assert (await first.data()).state is DataState.READY
    assert (await first.status()).running
