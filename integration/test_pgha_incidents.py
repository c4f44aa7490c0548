"""What broke other people's Postgres clusters, done to ours: docs/incidents_of_others.md has the table.

One cluster of three lives through all of it in this order; each test begins and ends with it whole.
Every agent reaches etcd over a link of its own that can be cut. The numbers are those of the table.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import time
from collections.abc import AsyncIterator

import psycopg
import pytest
import pytest_asyncio

from integration.pgha_faults import (
    Log,
    fill_the_disk,
    incident,
    insert,
    killers,
    never_acknowledged,
    rows,
    send,
    silent_streams,
    titled,
    until,
    wait_acks,
)
from pgha.model import MARGIN_S, TTL_S
from pgha.process_table import server_pids
from pgha.processes import kill_all
from pgha.requests import request_switchover
from tests.support.pgha import PgCluster, connect, run_pgha

pytestmark = [pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]
BUSY_S = 3.0  # what a machine that is busy may add to a deadline


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def three() -> AsyncIterator[PgCluster]:
    async with run_pgha(links=True) as cluster:
        yield cluster


async def test_26_the_initialiser_dies_half_way(three: PgCluster) -> None:
    first = three.nodes[0]
    await until("initdb is at work", lambda: (first.directory / "pgdata.new").exists())
    await first.kill()
    assert not (first.directory / "pgdata").exists()
    await first.start()
    leader = await three.wait_whole()
    assert (leader.node, leader.epoch) == (first.name, 2)
    made = [e.source for e in await three.events() if e.kind == "postgres.initialised"]
    assert made == [first.name]


async def test_19_a_replica_without_etcd_for_a_moment(three: PgCluster) -> None:
    async with incident(three, "19 replica cut from etcd") as scene:
        cut = scene.replicas[0]
        log = Log(three, cut)
        three.links[cut.name].cut()
        await log.wait("failed")
        await wait_acks(scene.writer)
        three.links[cut.name].heal()
        await wait_acks(scene.writer)
    after = await three.wait_whole()
    assert (after.node, after.epoch) == (scene.before.node, scene.before.epoch)


async def test_14_one_stream_is_silent(three: PgCluster) -> None:
    """Primary and one replica do not hear each other any more; both reach all others."""
    async with incident(three, "14 primary and one replica") as scene:
        deaf = scene.replicas[0]
        log = Log(three, deaf)
        async with silent_streams(scene.primary, deaf):
            await log.wait("terminating walreceiver due to timeout")
            await wait_acks(scene.writer)
    after = await three.wait_whole()
    assert (after.node, after.epoch) == (scene.before.node, scene.before.epoch)


async def test_3_a_voter_whose_replay_hangs(three: PgCluster) -> None:
    """The primary is cut from etcd; one voter's startup process, which should end its receiver, is frozen."""
    async with incident(three, "3 vote, then ack") as scene:
        hung = scene.replicas[1]
        startup = titled(hung, b"startup")
        assert len(startup) == 1
        log = Log(three, hung)
        send(startup, signal.SIGSTOP)
        three.links[scene.primary.name].cut()
        await log.wait("event=postgres.fenced")
        assert titled(hung, b"walreceiver") == []
        send(startup, signal.SIGCONT)
        new = await scene.succeeded()
        assert new.node != scene.primary.name
        three.links[scene.primary.name].heal()


async def test_4_a_zombie_that_nobody_kills(three: PgCluster) -> None:
    """Agent and killer are frozen: the old primary lives on, its connections too, for as long as we like."""
    async with incident(three, "4 walsenders of a zombie") as scene:
        old = scene.primary
        control = [old.agent_pid, *killers(old)]
        assert len(control) == 2
        async with await connect(scene.before.address) as session:
            send(control, signal.SIGSTOP)
            await scene.succeeded()
            await wait_acks(scene.writer)
            assert server_pids(old.directory / "pgdata"), "it was to be alive, and write"
            await never_acknowledged(session.execute("INSERT INTO acks VALUES (-4)"))
        send(control, signal.SIGCONT)


async def test_13_an_isolated_primary_with_an_open_session(three: PgCluster) -> None:
    async with incident(three, "13 isolated primary") as scene:
        old = scene.primary
        session, data = await connect(scene.before.address), old.directory / "pgdata"
        alive = set(server_pids(data))
        async with silent_streams(old):
            three.links[old.name].cut()
            cut_s = time.monotonic()
            write = insert(session, -13)
            await until("it is dead", lambda: not alive.intersection(server_pids(data)))
            lived_s = time.monotonic() - cut_s
            with pytest.raises(psycopg.OperationalError):
                await write
        print(f"\nlived {lived_s:.2f} s after the cut")
        assert lived_s < TTL_S - MARGIN_S + BUSY_S
        new = await scene.succeeded()
        assert new.node != old.name
        three.links[old.name].heal()
    assert await rows(three, (-13,)) == set()


async def test_6_7_commits_that_nobody_else_has(three: PgCluster) -> None:
    """A crash shows a commit that waited: not before a quorum has it. A cancelled wait says what it is."""
    async with incident(three, "6 a crash while a commit waits") as scene:
        old, log = scene.primary, Log(three, scene.primary)
        for node in scene.replicas:
            await node.kill()
        async with await connect(scene.before.address) as impatient:
            said: list[str] = []
            impatient.add_notice_handler(lambda notice: said.append(notice.message_primary or ""))
            await impatient.execute("SET statement_timeout = 200")
            waits = insert(impatient, -7)
            assert not (await asyncio.wait({waits}, timeout=0.6))[0], "a timeout is no acknowledgement"
            await impatient.cancel_safe()
            await waits  # a cancel is, alas (T1 in pgha/README.md), but it says so
            assert any("canceling wait for synchronous replication" in message for message in said)
        session = await connect(scene.before.address)
        write = insert(session, -6)
        assert not (await asyncio.wait({write}, timeout=0.3))[0]
        await kill_all(old.directory / "pgdata")
        with pytest.raises(psycopg.OperationalError):
            await write
        await log.wait("rule=await_quorum")
        leader = await three.leader()
        assert leader is not None
        assert (leader.node, leader.serving) == (old.name, False)
        for node in scene.replicas:
            await node.start()
    assert await rows(three, (-6, -7)) == {-6, -7}


async def test_5_36_the_stale_replica_is_first_and_alone(three: PgCluster) -> None:
    async with incident(three, "5 stale replica first, 36 two of three lost") as scene:
        stale, other = scene.replicas
        await stale.kill()
        await wait_acks(scene.writer)
        await asyncio.gather(scene.primary.kill(), other.kill())
        log = Log(three, stale)
        await stale.start()
        await log.wait("rule=await_votes")
        leader = await three.leader()
        assert leader is not None
        assert leader.epoch == scene.before.epoch
        await other.start()
        assert (await scene.succeeded()).node == other.name
        await scene.primary.start()


async def test_9_the_old_primary_wakes_when_its_successor_stalls(three: PgCluster) -> None:
    async with incident(three, "9 stale primary, free key") as scene:
        old = scene.primary
        session = await connect(scene.before.address)
        old.signal(signal.SIGSTOP)
        new = await scene.succeeded()
        await wait_acks(scene.writer)
        successor = three.node(new.node)
        successor.signal(signal.SIGSTOP)
        old.signal(signal.SIGCONT)
        await never_acknowledged(session.execute("INSERT INTO acks VALUES (-9)"))
        await session.close()
        await three.wait_leader(lambda leader: leader.epoch > new.epoch)
        await wait_acks(scene.writer)
        successor.signal(signal.SIGCONT)
    assert await rows(three, (-9,)) == set()


async def test_20_the_source_dies_during_a_rewind(three: PgCluster) -> None:
    async with incident(three, "20 rewind cut short") as scene:
        old = scene.primary
        session = await connect(scene.before.address)
        async with silent_streams(old):  # its disk gets a commit that nobody else has
            write = insert(session, -20)
            assert not (await asyncio.wait({write}, timeout=0.3))[0]
            await old.kill()
        with pytest.raises(psycopg.OperationalError):
            await write
        source = three.node((await scene.succeeded()).node)
        before = len(await three.events())
        await old.start()
        await until("a rewind is under way", lambda: (old.directory / "damaged").exists())
        await source.kill()
        assert (old.directory / "damaged").exists()
        await source.start()
    kinds = [e.kind for e in (await three.events())[before:] if e.source == old.name]
    assert "postgres.copied" in kinds
    assert "postgres.voted" not in kinds[: kinds.index("postgres.copied")]
    assert await rows(three, (-20,)) == set()


async def test_29_the_primarys_disk_is_full(three: PgCluster) -> None:
    async with incident(three, "29 disk full") as scene:
        fill_the_disk(scene.primary)
        await scene.succeeded()


async def test_31_the_target_of_a_switchover_dies(three: PgCluster) -> None:
    async with incident(three, "31 switchover to one that dies") as scene:
        target = scene.replicas[0]
        await request_switchover(three.kv, three.name, target.name, time.time())
        await target.kill()
        await wait_acks(scene.writer)
        await target.start()


@pytest.mark.soak
async def test_30_a_switchover_while_streams_hang(three: PgCluster) -> None:
    async with incident(three, "30 switchover, streams hang") as scene:
        target = scene.replicas[0]
        async with silent_streams(scene.primary):
            await request_switchover(three.kv, three.name, target.name, time.time())
            await scene.succeeded()


async def test_28_a_shutdown_that_hangs(three: PgCluster) -> None:
    """The agent is told to end; a frozen session keeps its Postgres from ending."""
    async with incident(three, "28 shutdown hangs") as scene:
        async with await connect(scene.before.address) as session:
            hung = session.info.backend_pid
            send([hung], signal.SIGSTOP)
            assert await scene.primary.terminate() == 0
            assert server_pids(scene.primary.directory / "pgdata") == []
        await scene.succeeded()
        await scene.primary.start()


async def test_12_all_of_it_loses_power(three: PgCluster) -> None:
    async with incident(three, "12 all three at once"):
        await asyncio.gather(*(node.kill() for node in three.nodes))
        await asyncio.gather(*(node.start() for node in three.nodes))


@pytest.mark.soak
async def test_27_etcd_is_lost_or_restored_from_a_backup(three: PgCluster) -> None:
    """Nothing is promoted; with the right etcd back, everything is there."""
    etcd = three.etcd.members[0]
    true, backup = etcd.directory.with_name("true"), etcd.directory.with_name("backup")

    async def swap_in(store: str) -> None:
        await asyncio.gather(etcd.kill(), *(node.kill() for node in three.nodes))
        shutil.rmtree(etcd.directory, ignore_errors=True)
        if store:
            shutil.copytree(etcd.directory.with_name(store), etcd.directory)
        await etcd.start()

    async def start_all() -> None:
        await asyncio.gather(*(node.start() for node in three.nodes))

    async with incident(three, "27 lost store") as scene:
        await etcd.kill()
        shutil.copytree(etcd.directory, backup)
        await etcd.start()
        async with silent_streams(scene.primary):  # so that its WAL ends past where its successor begins
            write = insert(await connect(scene.before.address), -27)
            assert not (await asyncio.wait({write}, timeout=0.3))[0]
            await scene.primary.kill()
        with pytest.raises(psycopg.OperationalError):
            await write
        await scene.succeeded()
        await wait_acks(scene.writer)
        await asyncio.gather(etcd.kill(), *(node.kill() for node in three.nodes))
        shutil.copytree(etcd.directory, true)

        logs = [Log(three, node) for node in three.nodes]
        await swap_in("")
        await start_all()
        await asyncio.gather(*(log.wait("rule=lost_store") for log in logs))
        assert await three.leader() is None

        voters = [Log(three, node) for node in scene.replicas]
        await swap_in("backup")
        await start_all()
        refusals = ("rule=store_went_back", "rule=ahead_of_history", "rule=other_history")
        for log in voters:
            await until("it refuses", lambda log=log: any(log.says(text) for text in refusals))
        leader = await three.leader()
        assert leader is not None
        assert not (leader.serving and leader.epoch > scene.before.epoch)

        await swap_in("true")
        scene.primary.wipe()  # by hand: it followed the old etcd into an epoch of its own
        await start_all()
