"""The placer that follows a mirror: decided on what the mirror shows, committed only if it still holds."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
import pytest

from flyd.errors import Conflict, OutcomeUnknown, Unavailable, Unplaceable
from flyd.machines.commands import set_desired
from flyd.machines.free import free
from flyd.model import Desired, Guest, Machine, MachineConfig, Mount, Reservations, decode, encode
from flyd.placement import placer as placers
from flyd.placement.placer import Placer
from flyd.placement.scheduler import Order
from flyd.placement.volumes import create_volume
from flyd.ports import Delete, Put, TxnResult, Unchanged, WatchBatch
from flyd.store import keys
from flyd.store.memory import MemoryEtcd, MemoryKV
from flyd.store.mirror import Mirror
from tests.support.placing import PLACING, CountedEntropy, FixedClock, join, make_host, place

CONFIG = MachineConfig(image="host:", guest=Guest(memory_mb=512))
WITH_DATA = msgspec.structs.replace(CONFIG, mounts=(Mount(path="/data", name="data", size_gb=3),))
ORDER = Order(app="chat", config=CONFIG)


class CountingKV(MemoryKV):
    """Counts transactions; the next few answers can be lost, and the watch can be held back."""

    def __init__(self, server: MemoryEtcd) -> None:
        super().__init__(server)
        self.txns = 0
        self.lose = 0
        self.flowing = asyncio.Event()
        self.flowing.set()

    async def txn(self, compares: Sequence[Unchanged], effects: Sequence[Put | Delete]) -> TxnResult:
        self.txns += 1
        result = await super().txn(compares, effects)
        if self.lose:
            self.lose -= 1
            raise OutcomeUnknown("the answer got lost")
        return result

    async def watch(self, prefix: str, from_revision: int) -> AsyncIterator[WatchBatch]:
        async for batch in super().watch(prefix, from_revision):
            await self.flowing.wait()
            yield batch


@asynccontextmanager
async def placer_of(server: MemoryEtcd, seed: str = "") -> AsyncGenerator[tuple[Placer, CountingKV]]:
    """A flyd's placer with a mirror of its own."""
    kv = CountingKV(server)
    mirror = Mirror(kv, PLACING)
    async with asyncio.TaskGroup() as group:
        keeping = group.create_task(mirror.keep())
        await mirror.wait_synced()
        yield Placer(kv, mirror, clock=FixedClock(), entropy=CountedEntropy(seed)), kv
        keeping.cancel()


async def stored(server: MemoryEtcd) -> list[Machine]:
    listing = await MemoryKV(server).list(keys.MACHINES)
    return [decode(item.value, Machine) for item in listing.items]


async def promised(server: MemoryEtcd) -> dict[str, Reservations]:
    listing = await MemoryKV(server).list(keys.RESERVATIONS)
    return {keys.last_part(item.key): decode(item.value, Reservations) for item in listing.items}


async def test_orders_that_wait_together_are_one_transaction() -> None:
    server = MemoryEtcd()
    await join(MemoryKV(server), *(make_host(f"ams-{n}", memory_mb=1 << 20) for n in range(4)))
    async with placer_of(server) as (placer, kv):
        machines = await asyncio.gather(*(placer.place(ORDER) for _ in range(80)))
        assert kv.txns <= 1 + 2  # one, and those that came meanwhile as many as a transaction takes
        assert Counter(m.host for m in machines) == {f"ams-{n}": 20 for n in range(4)}
    assert sorted(m.id for m in await stored(server)) == sorted(m.id for m in machines)
    assert len({(m.host, m.private_ip) for m in machines}) == 80


async def test_three_flyds_at_once_never_promise_more_than_there_is() -> None:
    server = MemoryEtcd()
    await join(MemoryKV(server), *(make_host(name, memory_mb=2048) for name in ("ams-1", "iad-1", "sin-1")))
    async with placer_of(server, "a") as a, placer_of(server, "b") as b, placer_of(server, "c") as c:
        orders = [placer.place(ORDER) for _ in range(10) for placer, _ in (a, b, c)]
        outcomes = await asyncio.gather(*orders, return_exceptions=True)
    placed = [m for m in outcomes if isinstance(m, Machine)]
    refused = [e for e in outcomes if isinstance(e, Unplaceable)]
    assert (len(placed), len(refused)) == (12, 18)  # 3 hosts x 2048 MB / 512 MB
    assert Counter(m.host for m in placed) == {"ams-1": 4, "iad-1": 4, "sin-1": 4}
    assert "needs 512 MB memory, 0 MB free of 2048" in refused[0].reasons["ams-1"]
    assert {h: len(p.machines) for h, p in (await promised(server)).items()} == Counter(
        m.host for m in placed
    )


async def test_its_own_placements_are_counted_before_the_mirror_shows_them() -> None:
    server = MemoryEtcd()
    await join(MemoryKV(server), make_host("ams-1"), make_host("ams-2"))
    async with placer_of(server) as (placer, kv):
        kv.flowing.clear()
        machines = [await placer.place(ORDER) for _ in range(4)]
        assert (kv.txns, Counter(m.host for m in machines)) == (4, {"ams-1": 2, "ams-2": 2})
        kv.flowing.set()
        machines += [await placer.place(ORDER) for _ in range(4)]
    assert Counter(m.host for m in machines) == {"ams-1": 4, "ams-2": 4}
    assert len({(m.host, m.private_ip) for m in machines}) == 8


async def test_a_refusal_is_never_from_an_old_view() -> None:
    """Room that somebody else has given back a moment ago is found."""
    server = MemoryEtcd()
    other = MemoryKV(server)
    await join(other, make_host("ams-1", memory_mb=512))
    first = await place(other, ORDER, clock=FixedClock(), entropy=CountedEntropy("first"))
    async with placer_of(server, "second") as (placer, kv):
        with pytest.raises(Unplaceable, match="needs 512 MB memory, 0 MB free of 512"):
            await placer.place(ORDER)
        kv.flowing.clear()
        await set_desired(other, "chat", first.id, Desired.DESTROYED)
        await free(other, "ams-1", first)
        again = asyncio.ensure_future(placer.place(ORDER))  # noqa: TID251 - waited for below
        done, _ = await asyncio.wait([again], timeout=0.05)
        assert not done  # it knows that it does not know
        kv.flowing.set()
        assert (await again).host == "ams-1"


async def test_what_others_have_taken_meanwhile_is_not_promised_again() -> None:
    server = MemoryEtcd()
    other = MemoryKV(server)
    await join(other, make_host("ams-1", memory_mb=512), make_host("ams-2", memory_mb=512))
    async with placer_of(server, "mine") as (placer, kv):
        kv.flowing.clear()
        theirs = await place(other, ORDER, clock=FixedClock(), entropy=CountedEntropy("theirs"))
        mine = asyncio.ensure_future(placer.place(ORDER))  # noqa: TID251 - waited for below
        await asyncio.wait([mine], timeout=0.05)
        kv.flowing.set()
        assert {theirs.host, (await mine).host} == {"ams-1", "ams-2"}


async def test_a_host_that_was_cordoned_a_moment_ago_gets_nothing() -> None:
    server = MemoryEtcd()
    other = MemoryKV(server)
    await join(other, make_host("ams-1"), make_host("ams-2"))
    async with placer_of(server) as (placer, kv):
        kv.flowing.clear()
        await other.put(keys.host("ams-1"), encode(make_host("ams-1", cordoned=True)))
        placing = asyncio.ensure_future(placer.place(ORDER))  # noqa: TID251 - waited for below
        await asyncio.wait([placing], timeout=0.05)
        kv.flowing.set()
        assert (await placing).host == "ams-2"


async def test_a_lost_answer_does_not_place_twice() -> None:
    server = MemoryEtcd()
    await join(MemoryKV(server), make_host("ams-1", memory_mb=8192))
    async with placer_of(server) as (placer, kv):
        kv.lose = 2
        machines = await asyncio.gather(*(placer.place(ORDER) for _ in range(6)))
    assert sorted(m.id for m in await stored(server)) == sorted(m.id for m in machines)
    assert len((await promised(server))["ams-1"].machines) == 6


async def test_an_order_repeated_finds_its_machine() -> None:
    server = MemoryEtcd()
    await join(MemoryKV(server), make_host("ams-1"))
    order = msgspec.structs.replace(ORDER, machine_id="0123456789abcd")
    async with placer_of(server, "a") as (placer, _), placer_of(server, "b") as (another, _):
        first = await placer.place(order)
        assert await another.place(order) == first
        assert await placer.place_all([order, order]) == (first, first)
    assert len((await promised(server))["ams-1"].machines) == 1


async def test_volumes_are_claimed_each_once() -> None:
    server = MemoryEtcd()
    kv = MemoryKV(server)
    await join(kv, make_host("ams-1"))
    await create_volume(kv, "chat", "data", "ams", 3, clock=FixedClock(), entropy=CountedEntropy("v"))
    order = Order(app="chat", config=WITH_DATA)
    async with placer_of(server) as (placer, _):
        machines = await asyncio.gather(*(placer.place(order) for _ in range(3)))
    assert len({m.config.mounts[0].volume for m in machines}) == 3
    assert sum((await promised(server))["ams-1"].volumes_gb.values()) == 9


async def test_all_or_none_with_what_belongs_to_it() -> None:
    server = MemoryEtcd()
    await join(MemoryKV(server), make_host("ams-1", memory_mb=1024))
    mark = Put(keys.app("chat"), b"{}")
    async with placer_of(server) as (placer, kv):
        with pytest.raises(Unplaceable):
            await placer.place_all([ORDER] * 3, effects=[mark])
        assert (await stored(server), await kv.get(mark.key)) == ([], None)
        assert len(await placer.place_all([ORDER] * 2, effects=[mark])) == 2
        assert await kv.get(mark.key) is not None
        with pytest.raises(Unplaceable, match="0 MB free of 1024"):
            await placer.place(ORDER)
    assert len(await stored(server)) == 2


async def test_a_failed_guard_places_nothing_and_fails_nobody_else() -> None:
    server = MemoryEtcd()
    await join(MemoryKV(server), make_host("ams-1"))
    async with placer_of(server) as (placer, _):
        guarded = placer.place(ORDER, guards=(Unchanged(keys.leader("deployer"), 999),))
        outcomes = await asyncio.gather(guarded, placer.place(ORDER), return_exceptions=True)
    assert isinstance(outcomes[0], Conflict)
    assert [m.id for m in await stored(server)] == [m.id for m in outcomes if isinstance(m, Machine)]
    assert len(await stored(server)) == 1


async def test_who_gives_up_waiting_takes_nobody_along() -> None:
    server = MemoryEtcd()
    await join(MemoryKV(server), make_host("ams-1", memory_mb=8192))
    async with placer_of(server) as (placer, _):
        tasks = [asyncio.ensure_future(placer.place(ORDER)) for _ in range(6)]  # noqa: TID251 - waited for
        await asyncio.sleep(0)
        tasks[0].cancel()  # the one whose turn it is
        tasks[3].cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    placed = [m for m in outcomes if isinstance(m, Machine)]
    assert len(placed) == 4
    assert {m.id for m in placed} <= {m.id for m in await stored(server)}


async def test_a_view_that_does_not_come_back_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placers, "CATCH_UP_S", 0.05)
    server = MemoryEtcd()
    other = MemoryKV(server)
    await join(other, make_host("ams-1"))
    async with placer_of(server) as (placer, kv):
        kv.flowing.clear()
        await other.put(keys.app("x"), b"{}")
        with pytest.raises(Unavailable, match="can not place: what it knows of etcd is"):
            await placer.place(msgspec.structs.replace(ORDER, region="fra"))
        kv.lose = 1
        with pytest.raises(OutcomeUnknown, match="got lost"):
            await placer.place(ORDER)
        kv.flowing.set()
