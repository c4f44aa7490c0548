"""The placer and volumes over the in-memory etcd, with competitors and lost answers."""

from __future__ import annotations

import asyncio
from collections import Counter

import msgspec
import pytest

from flyd.errors import Conflict, NotFound, OutcomeUnknown, Refused, Unplaceable
from flyd.machines.commands import set_desired
from flyd.machines.free import free
from flyd.model import (
    Desired,
    Guest,
    Machine,
    MachineConfig,
    Mount,
    Reservations,
    Volume,
    decode,
)
from flyd.placement.scheduler import Order, reserved
from flyd.placement.volumes import create_volume, list_volumes
from flyd.ports import KV, Unchanged
from flyd.storage import records
from flyd.store import keys
from flyd.store.memory import MemoryKV
from tests.support.placing import CountedEntropy, FixedClock, join, make_host, place

CONFIG = MachineConfig(image="host:", guest=Guest(memory_mb=512))
WITH_DATA = msgspec.structs.replace(CONFIG, mounts=(Mount(path="/data", name="data", size_gb=3),))
CLOCK = FixedClock()


async def put_machine(kv: KV, order: Order, seed: str = "") -> Machine:
    return await place(kv, order, clock=CLOCK, entropy=CountedEntropy(seed))


async def promised(kv: KV, host: str) -> Reservations:
    item = await kv.get(keys.reservations(host))
    return decode(item.value, Reservations) if item else Reservations(host=host)


class LostAnswers(MemoryKV):
    """Every n-th transaction is done, and its answer lost."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self._every = every
        self._txns = 0

    async def _after(self, op: str) -> None:
        if op == "txn":
            self._txns += 1
            if self._txns % self._every == 0:
                raise OutcomeUnknown("the answer got lost")


async def test_a_machine_is_claimed_with_all_that_it_needs() -> None:
    kv = MemoryKV()
    await join(kv, make_host("ams-1"))
    machine = await put_machine(kv, Order(app="chat", config=CONFIG, region="ams", release=3))
    assert len(machine.id) == 14
    assert int(machine.id, 16) >= 0
    assert len(machine.instance_id) == 26
    assert machine.private_ip.startswith("127.11.")
    assert (machine.release, machine.epoch, machine.host) == (3, 1, "ams-1")
    stored = await kv.get(keys.machine("chat", machine.id))
    assert stored is not None
    assert decode(stored.value, Machine) == machine
    held = await promised(kv, "ams-1")
    assert held.machines[machine.id].memory_mb == 512
    assert machine.id in held.addresses


async def test_thirty_placers_at_once_never_promise_more_than_there_is() -> None:
    kv = MemoryKV()
    await join(kv, *(make_host(name, memory_mb=2048) for name in ("ams-1", "iad-1", "sin-1")))
    orders = (put_machine(kv, Order(app=f"app{n % 4}", config=CONFIG), str(n)) for n in range(30))
    outcomes = await asyncio.gather(*orders, return_exceptions=True)
    placed = [m for m in outcomes if isinstance(m, Machine)]
    refused = [e for e in outcomes if isinstance(e, Unplaceable)]
    assert (len(placed), len(refused)) == (12, 18)  # 3 hosts x 2048 MB / 512 MB
    assert Counter(m.host for m in placed) == {"ams-1": 4, "iad-1": 4, "sin-1": 4}
    assert len({(m.host, m.private_ip) for m in placed}) == 12
    assert "needs 512 MB memory, 0 MB free of 2048" in refused[0].reasons["ams-1"]


async def test_two_machines_never_get_the_same_volume() -> None:
    kv = MemoryKV()
    await join(kv, make_host("ams-1"))
    await create_volume(kv, "chat", "data", "ams", 3, clock=CLOCK, entropy=CountedEntropy("v"))
    order = Order(app="chat", config=WITH_DATA)
    machines = await asyncio.gather(*(put_machine(kv, order, str(n)) for n in range(3)))
    volumes = await list_volumes(kv, "chat")
    assert len({m.config.mounts[0].volume for m in machines}) == 3
    assert sorted(v.attached_machine for v in volumes) == sorted(m.id for m in machines)
    assert [v.epoch for v in volumes] == [1, 1, 1]
    assert sum((await promised(kv, "ams-1")).volumes_gb.values()) == 9


async def test_an_order_repeated_finds_its_machine() -> None:
    kv = MemoryKV()
    await join(kv, make_host("ams-1"))
    order = Order(app="chat", config=CONFIG, machine_id="0123456789abcd")
    first = await put_machine(kv, order, "a")
    assert await put_machine(kv, order, "b") == first
    assert len((await promised(kv, "ams-1")).machines) == 1


async def test_a_lost_answer_does_not_place_twice() -> None:
    kv = LostAnswers(every=2)
    await join(kv, make_host("ams-1", memory_mb=8192))
    entropy = CountedEntropy()
    placed = [
        await place(kv, Order(app="chat", config=CONFIG), clock=CLOCK, entropy=entropy) for _ in range(6)
    ]
    assert len((await kv.list(f"{keys.MACHINES}chat/")).items) == len(placed) == 6
    volumes = [
        await create_volume(kv, "chat", "data", "ams", 1, clock=CLOCK, entropy=entropy) for _ in range(4)
    ]
    assert await list_volumes(kv, "chat") == tuple(sorted(volumes, key=lambda v: v.id))
    for volume in volumes:
        await records.destroy(kv, "chat", volume.id, 1.0, entropy=entropy)
    for destroyed in await records.list_destroyed(kv, "ams-1"):
        await records.forget(kv, destroyed, entropy=entropy)
    assert (await promised(kv, "ams-1")).volumes_gb == {}


async def test_a_failed_guard_places_nothing() -> None:
    kv = MemoryKV()
    await join(kv, make_host("ams-1"))
    with pytest.raises(Conflict, match="leaders/deployer has changed"):
        await place(
            kv,
            Order(app="chat", config=CONFIG),
            clock=CLOCK,
            entropy=CountedEntropy(),
            guards=(Unchanged(keys.leader("deployer"), 999),),
        )
    assert (await kv.list(keys.RESERVATIONS)).items == ()


async def test_refusals_are_for_people() -> None:
    kv = MemoryKV()
    with pytest.raises(Unplaceable, match="no host has joined"):
        await put_machine(kv, Order(app="chat", config=CONFIG))
    await join(kv, make_host("ams-1"), make_host("iad-1"))
    with pytest.raises(Unplaceable) as caught:
        await put_machine(kv, Order(app="chat", config=CONFIG, region="fra"))
    assert caught.value.reasons == {
        "ams-1": "wrong region ams (fra wanted)",
        "iad-1": "wrong region iad (fra wanted)",
    }
    assert "Regions with hosts: ams, iad" in caught.value.hint


async def test_what_a_machine_gave_back_is_taken_by_the_next() -> None:
    kv = MemoryKV()
    await join(kv, make_host("ams-1", memory_mb=512))
    first = await put_machine(kv, Order(app="chat", config=WITH_DATA))
    with pytest.raises(Unplaceable, match="needs 512 MB memory, 0 MB free of 512"):
        await put_machine(kv, Order(app="chat", config=CONFIG), "early")
    await set_desired(kv, "chat", first.id, Desired.DESTROYED)
    await free(kv, "ams-1", first)
    second = await put_machine(kv, Order(app="chat", config=WITH_DATA), "late")
    (volume,) = await list_volumes(kv, "chat")
    assert second.config.mounts[0].volume == first.config.mounts[0].volume == volume.id
    assert (volume.attached_machine, volume.epoch) == (second.id, 2)
    assert await promised(kv, "ams-1") == Reservations(
        host="ams-1",
        machines={second.id: reserved(CONFIG.guest)},
        volumes_gb={volume.id: 3},
        addresses={second.id: (await promised(kv, "ams-1")).addresses[second.id]},
    )


async def test_an_attached_volume_is_not_destroyed() -> None:
    kv = MemoryKV()
    entropy = CountedEntropy()
    await join(kv, make_host("ams-1"))
    machine = await put_machine(kv, Order(app="chat", config=WITH_DATA))
    volume_id = machine.config.mounts[0].volume
    with pytest.raises(Refused, match=f"attached to machine {machine.id}"):
        await records.destroy(kv, "chat", volume_id, 1.0, entropy=entropy)
    with pytest.raises(NotFound, match="vol_none"):
        await records.destroy(kv, "chat", "vol_none", 1.0, entropy=entropy)
    record = await kv.get(keys.volume("chat", volume_id))
    assert record is not None
    assert decode(record.value, Volume).attached_machine == machine.id
    assert machine.desired is Desired.STARTED
