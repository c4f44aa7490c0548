"""Members of a real Postgres cluster come and go under a writer. Nothing acknowledged may be lost."""

from __future__ import annotations

import asyncio
import time

import psycopg
import pytest

from flyd.errors import Refused
from pgha import changes
from pgha.membership import resting, whole
from pgha.model import Membership
from tests.support.pgha import WAIT_S, Node, PgCluster, Writer, connect, run_pgha, writing

pytestmark = pytest.mark.timeout(300)
ROWS = 20


async def wait_acks(writer: Writer, count: int = ROWS) -> None:
    """That many more acknowledgements."""
    wanted = len(writer.acks) + count
    async with asyncio.timeout(WAIT_S):
        while len(writer.acks) < wanted:
            await asyncio.sleep(0.01)


async def until_half_way(cluster: PgCluster) -> Membership:
    async with asyncio.timeout(WAIT_S):
        while True:
            record = await changes.membership(cluster.kv, cluster.name)
            if not whole(record.quorum):
                return record
            await asyncio.sleep(0.002)


async def until_resting(cluster: PgCluster) -> Membership:
    async with asyncio.timeout(WAIT_S):
        while True:
            record = await changes.membership(cluster.kv, cluster.name)
            if resting(record):
                return record
            await asyncio.sleep(0.01)


async def waits_for(cluster: PgCluster) -> object:
    """What the primary's Postgres says that a commit waits for."""
    leader = await cluster.wait_leader()
    async with await connect(leader.address) as session:
        return (await (await session.execute("SHOW synchronous_standby_names")).fetchall())[0][0]


async def add(cluster: PgCluster, number: int) -> Node:
    """A machine for a member, and the word that it is to be one."""
    node = cluster.nodes[0].sibling(f"{cluster.name}-{number}", f"127.0.40.{number}")
    cluster.nodes.append(node)
    await node.start()
    await changes.request_add(cluster.kv, cluster.name, node.name)
    return node


async def remove(cluster: PgCluster, name: str) -> None:
    """Take its word away, then its machine."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                await changes.request_remove(cluster.kv, cluster.name, name)
                break
            except Refused:  # another has not found the new primary yet: without it no quorum would be left
                await asyncio.sleep(0.05)
    record = await until_resting(cluster)
    assert name in record.retired
    node = cluster.node(name)
    await node.kill()
    cluster.nodes.remove(node)
    await changes.forget(cluster.kv, cluster.name, name)


async def replica(cluster: PgCluster) -> str:
    """Some member that is not the primary."""
    leader = await cluster.wait_leader()
    return next(n.name for n in reversed(cluster.nodes) if n.name != leader.node)


async def test_members_come_and_go_under_a_writer() -> None:
    async with run_pgha() as cluster:
        await cluster.wait_whole()
        await until_resting(cluster)
        async with writing(cluster) as writer:
            await wait_acks(writer)
            # 3 -> 4, and the primary is lost in the middle: its successor finishes the change.
            first = await cluster.wait_leader()
            began_s = time.monotonic()
            await add(cluster, 4)
            half_way = await until_half_way(cluster)
            await cluster.node(first.node).kill()
            assert (half_way.quorum.votes, half_way.quorum.synchronous.acks) == (2, 2)
            assert not resting(await changes.membership(cluster.kv, cluster.name))
            four = await until_resting(cluster)
            second = await cluster.wait_leader(lambda leader: leader.epoch > first.epoch)
            assert len(four.quorum.voters) == 4
            assert str(await waits_for(cluster)).startswith("ANY 2 ")
            await wait_acks(writer)
            print(f"\n3 -> 4 with the primary lost: {time.monotonic() - began_s:.1f} s")
            # 4 -> 3: the one that was lost is the one that goes.
            await remove(cluster, first.node)
            await wait_acks(writer)
            # 3 -> 2 -> 3.
            await remove(cluster, await replica(cluster))
            assert str(await waits_for(cluster)).startswith("ANY 1 ")
            await wait_acks(writer)
            last = await add(cluster, 5)
            three = await until_resting(cluster)
            await wait_acks(writer)
        assert set(three.quorum.voters) == {n.name for n in cluster.nodes}
        lost = await writer.lost()
        print(
            f"3 -> 4 -> 3 -> 2 -> 3: {time.monotonic() - began_s:.1f} s, longest pause of writes "
            f"{writer.window_s():.2f} s, {len(writer.acks)} acknowledged, {len(lost)} lost"
        )
        assert lost == set()
        assert second.node != first.node
        await is_a_full_member(cluster, last)


async def is_a_full_member(cluster: PgCluster, node: Node) -> None:
    """With the other replica gone it acknowledges alone; nobody else does."""
    leader = await cluster.wait_leader()
    for other in cluster.nodes:
        if other.name not in (leader.node, node.name):
            await other.kill()
    async with await connect(leader.address) as session:
        await session.execute("INSERT INTO acks VALUES (-7)")
        await node.kill()
        with pytest.raises((TimeoutError, psycopg.Error)):
            async with asyncio.timeout(1.0):
                await session.execute("INSERT INTO acks VALUES (-8)")
