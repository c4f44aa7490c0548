"""The repairer's loop over a store in memory, in virtual time: losses, drains, leaders that come and go."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from unittest import mock

import msgspec

from flyd.errors import OutcomeUnknown
from flyd.hosts.membership import LEASE_TTL_S
from flyd.model import (
    App,
    Desired,
    Machine,
    MachineConfig,
    MachineState,
    Mount,
    encode,
)
from flyd.model.cluster import DrainState
from flyd.ports import Delete, Put, TxnResult, Unchanged
from flyd.store import keys
from flyd.store.leader import CONTROLLER
from tests.support.repairing import GRACE_S, World, repaired, until

# --------------------------------------------------------------------------- lost hosts


@repaired
async def test_a_lost_hosts_machine_is_placed_elsewhere_after_its_grace(world: World):
    await world.place("m1")
    world.say("m1")
    world.lose("ams-1")
    took_s = await until(lambda: world.claims()["m1"].host != "ams-1")
    assert GRACE_S - LEASE_TTL_S <= took_s <= GRACE_S
    moved = world.claims()["m1"]
    assert (moved.epoch, moved.region) == (2, moved.host.partition("-")[0])
    assert "m1" in world.promised(moved.host).machines
    assert "m1" in world.promised("ams-1").machines, "its copy may still run: its room is taken"
    assert world.etcd.get(keys.status("web", "m1")) is None, "what the lost host said counts no more"
    assert [e.source for e in world.events("machine.moved")] == ["m1"]


@repaired
async def test_a_host_that_is_back_in_time_keeps_all(world: World):
    await world.place("m1")
    world.lose("ams-1")
    await asyncio.sleep(GRACE_S - LEASE_TTL_S - 1)
    loss = world.loss("ams-1")
    assert loss is not None
    assert loss.moves_at_s - loss.since_s == GRACE_S
    world.etcd.txn((), (Put(keys.alive("ams-1"), b"true"),))
    await asyncio.sleep(GRACE_S)
    assert world.claims()["m1"].host == "ams-1"
    assert world.loss("ams-1") is None


@repaired
async def test_a_late_word_of_a_loss_does_not_outlive_the_loss(world: World):
    held_up: list[tuple[Sequence[Unchanged], Sequence[Put | Delete]]] = []
    at_once = world.kv.txn

    async def slow(compares: Sequence[Unchanged], effects: Sequence[Put | Delete]) -> TxnResult:
        if not held_up and any(isinstance(e, Put) and e.key == keys.loss("ams-1") for e in effects):
            held_up.append((compares, effects))
            raise OutcomeUnknown("no answer")
        return await at_once(compares, effects)

    with mock.patch.object(world.kv, "txn", slow):
        world.lose("ams-1")
        await until(lambda: world.loss("ams-1"))
        world.etcd.txn((), (Put(keys.alive("ams-1"), b"true"),))
        await until(lambda: not world.loss("ams-1"))
        world.etcd.txn(*held_up[0])  # it took this long to get there
        await asyncio.sleep(GRACE_S)
        assert world.loss("ams-1") is None


@repaired
async def test_a_machine_with_a_volume_stays_and_is_told_of(world: World):
    await world.place("m1", config=MachineConfig(image="x", mounts=(Mount(path="/d", name="d"),)))
    world.lose("ams-1")
    await until(lambda: world.events("machine.stays"))
    loss = world.loss("ams-1")
    assert loss is not None
    assert list(loss.left) == ["m1"]
    assert world.claims()["m1"].host == "ams-1"


@repaired
async def test_no_room_is_told_once_and_tried_again_when_there_is(world: World):
    for n, host in enumerate(("iad-1", "sin-1")):
        for k in range(4):
            await world.place(f"full{n}{k}", host)
    await world.place("m1")
    world.lose("ams-1")
    await until(lambda: world.events("machine.unplaceable"))
    await asyncio.sleep(10)
    (event,) = world.events("machine.unplaceable")
    assert "sin-1: needs 256 MB memory, 0 MB free" in event.message
    world.end("full12")
    await until(lambda: world.claims()["m1"].host == "sin-1", 2.0)


@repaired
async def test_nothing_moves_while_most_hosts_are_lost(world: World):
    await world.place("m1")
    await world.place("m2", "iad-1")
    world.lose("ams-1", "iad-1")
    await until(lambda: (loss := world.loss("ams-1")) and loss.held)
    await asyncio.sleep(5 * GRACE_S)
    assert (world.claims()["m1"].host, world.claims()["m2"].host) == ("ams-1", "iad-1")
    assert len(world.events("host.moves_held")) == 2, "once for each host"
    world.etcd.txn((), (Put(keys.alive("iad-1"), b"true"),))
    await until(lambda: world.claims()["m1"].host != "ams-1", 2.0)


@repaired
async def test_a_deposed_repairer_moves_nothing(world: World):
    await world.place("m1")
    world.lose("ams-1")
    await world.kv.put(keys.leader(CONTROLLER), b"another")
    await asyncio.sleep(3 * GRACE_S)
    assert world.claims()["m1"].host == "ams-1"


@repaired
async def test_a_new_leader_goes_on_counting(world: World):
    async with asyncio.TaskGroup() as group:
        second = await world.start(group)  # its guard deposes the first
        await world.place("m1")
        world.lose("ams-1")
        await asyncio.sleep(10)
        third = await world.start(group)
        began_s = asyncio.get_running_loop().time()
        await until(lambda: world.claims()["m1"].host != "ams-1", GRACE_S + 1)
        assert asyncio.get_running_loop().time() - began_s >= GRACE_S - LEASE_TTL_S - 1, "late, never early"
        for task in (*second, *third):
            task.cancel()


# --------------------------------------------------------------------------- drains


def placed_elsewhere(world: World) -> Iterator[Machine]:
    return (m for m in world.claims().values() if m.host != "ams-1")


@repaired
async def test_a_drain_replaces_one_machine_of_a_group_at_a_time(world: World):
    await world.kv.put(keys.app("web"), encode(App(name="web")))
    for machine_id in ("m1", "m2"):
        await world.place(machine_id)
        world.say(machine_id)
    world.drain()
    for old_id in ("m1", "m2"):
        await until(lambda old_id=old_id: old_id in world.drained().replacing)
        new_id = world.drained().replacing[old_id]
        await until(lambda new_id=new_id: new_id in world.claims())
        await asyncio.sleep(20)
        here = [m for m in world.claims().values() if m.host == "ams-1"]
        assert all(m.desired is Desired.STARTED and not m.cordoned for m in here), "not before it is healthy"
        assert len(world.drained().replacing) == 1
        world.say(new_id)
        await until(lambda old_id=old_id: world.claims()[old_id].cordoned)
        await until(lambda old_id=old_id: world.claims()[old_id].desired is Desired.DESTROYED)
        world.end(old_id)
    await until(lambda: world.drained().state is DrainState.DRAINED)
    assert len(list(placed_elsewhere(world))) == len(world.claims()) == 2
    assert not world.drained().replacing


@repaired
async def test_a_drain_gives_resting_machines_away_and_names_what_stays(world: World):
    volume = MachineConfig(image="x", mounts=(Mount(path="/d", name="d"),))
    await world.place("rests")
    await world.place("stays", config=volume)
    world.say("rests", MachineState.STOPPED)
    claim = msgspec.structs.replace(world.claims()["rests"], desired=Desired.STOPPED)
    world.etcd.txn((), (Put(keys.machine("web", "rests"), encode(claim)),))
    world.say("stays")
    world.drain()
    await until(lambda: world.drained().state is DrainState.DRAINED)
    rests = world.claims()["rests"]
    assert rests.host != "ams-1"
    assert rests.desired is Desired.STOPPED
    assert list(world.drained().left) == ["stays"]
    assert world.claims()["stays"].desired is Desired.STARTED
    world.drain(force=True)
    await until(lambda: world.claims()["stays"].desired is Desired.STOPPED)


@repaired
async def test_a_drain_that_finds_no_room_stops_nothing(world: World):
    await world.place("m1")
    world.say("m1")
    for n, host in enumerate(("iad-1", "sin-1")):
        for k in range(4):
            await world.place(f"full{n}{k}", host)
    world.drain()
    await until(lambda: any("no host can take" in doing for doing in world.drained().doing))
    await asyncio.sleep(60)
    assert world.claims()["m1"].desired is Desired.STARTED
    assert not world.claims()["m1"].cordoned


@repaired
async def test_a_cancelled_drain_takes_back_what_was_not_needed_yet(world: World):
    await world.place("m1")
    world.say("m1")
    world.drain()
    await until(lambda: len(world.claims()) == 2)
    cancelled = msgspec.structs.replace(world.drained(), state=DrainState.CANCELLED)
    world.etcd.txn((), (Put(keys.drain("ams-1"), encode(cancelled)),))
    (new,) = placed_elsewhere(world)
    await until(lambda: world.claims()[new.id].desired is Desired.DESTROYED)
    world.end(new.id)
    await until(lambda: world.etcd.get(keys.drain("ams-1")) is None)
    assert list(world.claims()) == ["m1"]


@repaired
async def test_a_drain_goes_on_under_the_next_leader(world: World):
    await world.place("m1")
    world.say("m1")
    world.drain()
    await until(lambda: len(world.claims()) == 2)
    async with asyncio.TaskGroup() as group:
        second = await world.start(group)
        (new,) = placed_elsewhere(world)
        world.say(new.id)
        await until(lambda: world.claims()["m1"].desired is Desired.DESTROYED)
        world.end("m1")
        await until(lambda: world.drained().state is DrainState.DRAINED)
        assert list(world.claims()) == [new.id], "one replacement, not two"
        for task in second:
            task.cancel()


@repaired
async def test_a_draining_host_that_is_lost_loses_its_machine_once(world: World):
    await world.place("m1")
    world.say("m1")
    world.drain()
    await until(lambda: len(world.claims()) == 2)
    (new,) = placed_elsewhere(world)
    world.lose("ams-1")
    await until(lambda: world.claims()["m1"].host != "ams-1", GRACE_S + 5)
    await until(lambda: world.claims()[new.id].desired is Desired.DESTROYED)
    world.end(new.id)
    await until(lambda: world.drained().state is DrainState.DRAINED)
    assert [m for m in world.claims().values() if m.desired is Desired.STARTED] == [world.claims()["m1"]]
