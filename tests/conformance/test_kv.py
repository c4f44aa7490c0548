"""One suite for ports.KV: the fake in memory and the real etcd must both pass."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import cast

import pytest
import pytest_asyncio

from flyd.errors import Compacted, InvalidInput, NotFound, OutcomeUnknown, Unavailable
from flyd.ports import KV, Change, Delete, Put, Unchanged, WatchBatch
from flyd.store.etcd import REQUEST_TIMEOUT_S, EtcdKV
from flyd.store.memory import MAX_TXN_OPS, MemoryEtcd, MemoryKV
from tests.support.etcd import EtcdCluster, compact, free_ports, run_etcd

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(60)]

numbers = itertools.count()


class Store:
    """A KV, what only its server can do, and a prefix that no other test uses."""

    def __init__(self, kv: KV, another: Callable[[], KV], compact: Callable[[int], Awaitable[None]]) -> None:
        self.kv = kv
        self.another = another
        self.compact = compact
        self.prefix = f"/test{next(numbers)}/"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def etcd() -> AsyncGenerator[EtcdCluster]:
    async with run_etcd() as cluster:
        yield cluster


@pytest_asyncio.fixture(params=["memory", "etcd"], loop_scope="module")
async def store(request: pytest.FixtureRequest, etcd: EtcdCluster) -> AsyncGenerator[Store]:
    if request.param == "memory":
        server = MemoryEtcd()

        async def forget(revision: int) -> None:
            server.compact(revision)

        yield Store(MemoryKV(server), lambda: MemoryKV(server), forget)
    else:
        kv = EtcdKV(etcd.endpoints)
        yield Store(kv, lambda: EtcdKV(etcd.endpoints), lambda r: compact(etcd.endpoints[0], r))
        await kv.close()


async def collect(watch: AsyncIterator[WatchBatch], count: int, timeout_s: float = 10.0) -> list[Change]:
    """The next `count` changes; closes the watch."""
    changes: list[Change] = []
    async with aclosing(cast(AsyncGenerator[WatchBatch], watch)) as batches, asyncio.timeout(timeout_s):
        async for batch in batches:
            if not batch.changes:
                continue  # a sign of life
            assert batch.revision == batch.changes[-1].mod_revision
            changes += batch.changes
            if len(changes) >= count:
                break
    return changes


def brief(prefix: str, changes: list[Change]) -> list[tuple[str, bytes | None]]:
    return [(c.key.removeprefix(prefix), c.value.value if c.value is not None else None) for c in changes]


async def test_get_returns_what_was_put(store: Store) -> None:
    key = store.prefix + "a"
    assert await store.kv.get(key) is None
    first = await store.kv.put(key, b"1")
    second = await store.kv.put(key, b"2")
    assert second == first + 1
    held = await store.kv.get(key)
    assert held is not None
    assert (held.key, held.value, held.create_revision, held.mod_revision, held.lease) == (
        *(key, b"2", first, second),
        0,
    )


async def test_list_is_a_prefix_in_key_order(store: Store) -> None:
    for name in ("b/2", "b/10", "b/1", "b", "b0", "c/1", "b/é"):
        revision = await store.kv.put(store.prefix + name, name.encode())
    listing = await store.kv.list(store.prefix + "b/")
    assert [kv.value.decode() for kv in listing.items] == ["b/1", "b/10", "b/2", "b/é"]
    assert listing.revision == revision  # pyright: ignore[reportPossiblyUnboundVariable]
    assert (await store.kv.list(store.prefix + "nothing/")).items == ()
    assert len((await store.kv.list("")).items) >= 7


async def test_txn_does_all_or_nothing(store: Store) -> None:
    a, b, c = (store.prefix + name for name in "abc")
    first = await store.kv.txn([Unchanged(a, 0), Unchanged(b, 0)], [Put(a, b"1"), Put(b, b"1")])
    assert first.succeeded
    listing = await store.kv.list(store.prefix)
    assert {kv.mod_revision for kv in listing.items} == {first.revision} == {listing.revision}

    for compares in ([Unchanged(a, 0)], [Unchanged(a, first.revision), Unchanged(b, first.revision - 1)]):
        assert not (await store.kv.txn(compares, [Put(c, b"never"), Delete(a)])).succeeded
    assert await store.kv.list(store.prefix) == listing

    second = await store.kv.txn([Unchanged(a, first.revision)], [Put(c, b"2"), Delete(a)])
    assert second.succeeded
    assert second.revision == first.revision + 1
    assert [kv.key for kv in (await store.kv.list(store.prefix)).items] == [b, c]
    assert not (await store.kv.txn([Unchanged(a, first.revision)], [])).succeeded, "deleted is changed"


async def test_txn_that_changes_nothing_takes_no_revision(store: Store) -> None:
    before = await store.kv.put(store.prefix + "a", b"")
    absent = await store.kv.txn([], [Delete(store.prefix + "absent")])
    assert absent.succeeded
    assert absent.revision == before
    assert (await store.kv.txn([], [])).succeeded


async def test_txn_limits(store: Store) -> None:
    key = store.prefix + "a"
    with pytest.raises(InvalidInput):
        await store.kv.txn([], [Put(key, b"1"), Put(key, b"2")])
    with pytest.raises(InvalidInput):
        await store.kv.txn([], [Put(f"{key}{n}", b"") for n in range(MAX_TXN_OPS + 1)])
    with pytest.raises(NotFound):
        await store.kv.txn([], [Put(key, b"", lease=4711_4711)])
    with pytest.raises(NotFound):
        await store.kv.put(key, b"", lease=4711_4711)
    assert (await store.kv.list(store.prefix)).items == ()


async def test_recreated_key_has_a_new_create_revision(store: Store) -> None:
    key = store.prefix + "a"
    await store.kv.put(key, b"1")
    await store.kv.txn([], [Delete(key)])
    revision = await store.kv.put(key, b"2")
    held = await store.kv.get(key)
    assert held is not None
    assert held.create_revision == held.mod_revision == revision


async def test_lease_expiry_deletes_its_keys(store: Store) -> None:
    start = (await store.kv.list(store.prefix)).revision
    lease = await store.kv.lease_grant(2)
    await store.kv.put(store.prefix + "leased", b"", lease=lease)
    await store.kv.put(store.prefix + "freed", b"", lease=lease)
    await store.kv.put(store.prefix + "freed", b"kept")  # a put without the lease takes the key out of it
    held = await store.kv.get(store.prefix + "leased")
    assert held is not None
    assert held.lease == lease
    changes = await collect(store.kv.watch(store.prefix, start + 1), 4)
    assert brief(store.prefix, changes)[-1] == ("leased", None)
    assert changes[-1].mod_revision == (await store.kv.list(store.prefix)).revision
    assert [kv.key for kv in (await store.kv.list(store.prefix)).items] == [store.prefix + "freed"]
    assert await store.kv.lease_keepalive(lease) == 0


async def test_keepalive_holds_a_lease_and_revoke_ends_it(store: Store) -> None:
    lease = await store.kv.lease_grant(2)
    await store.kv.put(store.prefix + "a", b"", lease=lease)
    await store.kv.put(store.prefix + "b", b"", lease=lease)
    loop = asyncio.get_running_loop()
    until = loop.time() + 4.5
    while loop.time() < until:
        assert await store.kv.lease_keepalive(lease) == 2
        await asyncio.sleep(0.7)
    before = await store.kv.list(store.prefix)
    assert len(before.items) == 2
    await store.kv.lease_revoke(lease)
    changes = await collect(store.kv.watch(store.prefix, before.revision + 1), 2)
    assert brief(store.prefix, changes) == [("a", None), ("b", None)]
    assert len({c.mod_revision for c in changes}) == 1
    await store.kv.lease_revoke(lease)


async def test_watch_from_the_past_goes_on_into_the_future(store: Store) -> None:
    first = await store.kv.put(store.prefix + "a", b"1")
    await store.kv.put("/elsewhere", b"")
    await store.kv.txn([], [Put(store.prefix + "b", b"1"), Delete(store.prefix + "a")])

    async def more() -> None:
        for n in range(50):
            await store.kv.put(store.prefix + "c", str(n).encode())

    async with asyncio.TaskGroup() as tasks:
        changes = tasks.create_task(collect(store.kv.watch(store.prefix, first), 53))
        tasks.create_task(more())
    expected = [("a", b"1"), ("b", b"1"), ("a", None), *[("c", str(n).encode()) for n in range(50)]]
    assert brief(store.prefix, changes.result()) == expected
    revisions = [c.mod_revision for c in changes.result()]
    assert revisions == sorted(revisions)
    late = await collect(store.kv.watch(store.prefix, revisions[-1]), 1)
    assert brief(store.prefix, late) == [("c", b"49")], "from_revision is included"


async def test_watch_from_a_compacted_revision(store: Store) -> None:
    first = await store.kv.put(store.prefix + "a", b"1")
    deleted = (await store.kv.txn([], [Delete(store.prefix + "a")])).revision
    last = await store.kv.put(store.prefix + "b", b"1")
    await store.compact(deleted)
    for revision in (first, deleted):  # also at the very revision: etcd < 3.5.18 would hide the deletion
        with pytest.raises(Compacted):
            await collect(store.kv.watch(store.prefix, revision), 1)
    assert brief(store.prefix, await collect(store.kv.watch(store.prefix, last), 1)) == [("b", b"1")]


async def test_watch_from_a_future_revision(store: Store) -> None:
    revision = await store.kv.put(store.prefix + "a", b"1")
    async with asyncio.TaskGroup() as tasks:
        changes = tasks.create_task(collect(store.kv.watch(store.prefix, revision + 2), 1))
        await store.kv.put(store.prefix + "a", b"2")
        await store.kv.put(store.prefix + "a", b"3")
    assert brief(store.prefix, changes.result()) == [("a", b"3")]


async def test_close_ends_calls_and_watches(store: Store) -> None:
    kv = store.another()
    revision = await kv.put(store.prefix + "a", b"1")
    seen = asyncio.Event()

    async def follow() -> None:
        async for _ in kv.watch(store.prefix, revision):
            seen.set()

    async def expect_unavailable() -> None:
        with pytest.raises(Unavailable):
            await follow()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(expect_unavailable())
        await seen.wait()
        await kv.close()
    with pytest.raises(Unavailable):
        await kv.get(store.prefix + "a")
    assert await store.kv.get(store.prefix + "a") is not None


# --------------------------------------------------------------------------- members that fail (etcd alone)


async def put_until_done(kv: KV, key: str, value: bytes) -> int:
    """Put what may be put twice."""
    while True:
        try:
            return await kv.put(key, value)
        except Unavailable:
            await asyncio.sleep(0.05)


async def test_watch_survives_the_loss_of_the_leading_member() -> None:
    async with run_etcd(3) as cluster:
        leader = await cluster.leader()
        others = [e for e in cluster.endpoints if e != leader.endpoint]
        kv = EtcdKV([leader.endpoint, *others])  # watch and writes begin at the victim
        start = (await kv.list("/")).revision

        async def write() -> None:
            for n in range(30):
                await put_until_done(kv, f"/{n}", b"")
                if n == 10:
                    await leader.kill()
                if n == 20:
                    await leader.start()

        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(collect(kv.watch("/", start + 1), 30, timeout_s=30))
            tasks.create_task(write())
        names = [c.key for c in watching.result()]
        assert sorted(set(names), key=names.index) == [f"/{n}" for n in range(len(set(names)))]
        revisions = [c.mod_revision for c in watching.result()]
        assert revisions == list(range(start + 1, start + 1 + len(revisions))), "no gap, no repetition"
        await kv.close()


async def test_killed_follower_costs_less_than_a_second() -> None:
    async with run_etcd(3) as cluster:
        leader = await cluster.leader()
        victim = next(m for m in cluster.members if m is not leader)
        others = [m.endpoint for m in cluster.members if m is not victim]
        kv = EtcdKV([victim.endpoint, *others])
        await kv.put("/a", b"1")
        await victim.kill()
        started_s = asyncio.get_running_loop().time()
        await kv.put("/a", b"2")
        lease = await kv.lease_grant(5)
        assert await kv.lease_keepalive(lease) == 5
        assert asyncio.get_running_loop().time() - started_s < 1.0
        fresh = EtcdKV([victim.endpoint, *others])
        assert (held := await fresh.get("/a")) is not None
        assert held.value == b"2"
        assert asyncio.get_running_loop().time() - started_s < 2.0
        await fresh.close()
        await kv.close()


async def test_frozen_follower() -> None:
    async with run_etcd(3) as cluster:
        leader = await cluster.leader()
        victim = next(m for m in cluster.members if m is not leader)
        others = [m.endpoint for m in cluster.members if m is not victim]
        reader, writer, watcher = (EtcdKV([victim.endpoint, *others]) for _ in range(3))
        loop = asyncio.get_running_loop()
        start = await writer.put("/a", b"1")
        seen = asyncio.Event()

        async def follow() -> list[Change]:
            changes: list[Change] = []
            async for batch in watcher.watch("/", start):
                changes += batch.changes
                seen.set()
                if changes and changes[-1].value and changes[-1].value.value == b"3":
                    break
            return changes

        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(follow())
            await seen.wait()
            await reader.get("/a")
            victim.freeze()
            frozen_s = loop.time()
            await reader.get("/a")
            assert loop.time() - frozen_s < 2.0, "a read moves on after its member's share of the deadline"
            swallowed = False
            try:  # goes through only if the first write had gone past a member that was slow
                await writer.put("/a", b"2")
            except OutcomeUnknown:
                swallowed = True
            assert loop.time() - frozen_s < REQUEST_TIMEOUT_S + 2.5
            await writer.put("/a", b"3")
            changes = await watching
            assert loop.time() - frozen_s < REQUEST_TIMEOUT_S + 3.0
        values = [c.value.value for c in changes if c.value]
        assert values == ([b"1", b"3"] if swallowed else [b"1", b"2", b"3"])
        victim.thaw()
        for kv in (reader, writer, watcher):
            await kv.close()


async def test_no_write_goes_to_a_member_that_owes_an_answer() -> None:
    async with run_etcd(3) as cluster:
        victim, *others = cluster.members
        kv = EtcdKV(cluster.endpoints)
        await kv.put("/a", b"1")
        victim.freeze()
        await kv.get("/a")
        for member in others:
            await member.kill()
        with pytest.raises(Unavailable) as writing:
            await kv.put("/a", b"2")
        assert not isinstance(writing.value, OutcomeUnknown), "it was never sent"
        victim.thaw()
        for member in others:
            await member.start()
        await cluster.wait_ready()
        assert (held := await kv.get("/a")) is not None
        assert held.value == b"1"
        await kv.put("/a", b"3")
        await kv.close()


async def test_all_members_down() -> None:
    kv = EtcdKV([f"127.0.0.1:{port}" for port in free_ports(3)])
    started_s = asyncio.get_running_loop().time()
    with pytest.raises(Unavailable) as reading:
        await kv.get("/a")
    assert asyncio.get_running_loop().time() - started_s < REQUEST_TIMEOUT_S + 0.5
    assert "127.0.0.1" in reading.value.message
    with pytest.raises(Unavailable) as writing:
        await kv.txn([], [Put("/a", b"")])
    assert not isinstance(writing.value, OutcomeUnknown), "it was never sent"
    await kv.close()
