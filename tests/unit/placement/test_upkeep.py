"""What operators ask of hosts: cordon, drain, uncordon, remove; also with answers lost and others at work."""

from __future__ import annotations

import msgspec
import pytest

from flyd.errors import Conflict, InvalidInput, NotFound, OutcomeUnknown, Refused
from flyd.hosts.membership import LEASE_TTL_S
from flyd.model import App, Desired, Host, Machine, MachineConfig, Mount, Reservations, decode, encode
from flyd.model.cluster import Drain, DrainState, LossRule
from flyd.placement import upkeep
from flyd.placement.scheduler import Order
from flyd.placement.volumes import create_volume
from flyd.ports import Delete, Put
from flyd.storage import records
from flyd.store import keys
from flyd.store.memory import MemoryKV
from tests.support.placing import CountedEntropy, FixedClock, join, make_host, place

CLOCK = FixedClock()
VOLUME = MachineConfig(image="x", mounts=(Mount(path="/d", name="d"),))


class LosingKV(MemoryKV):
    """The answer of every first transaction gets lost."""

    lose = False

    async def _after(self, op: str) -> None:
        if self.lose and op == "txn":
            self.lose = False
            raise OutcomeUnknown("no answer")


@pytest.fixture
async def kv() -> LosingKV:
    kv = LosingKV()
    await join(kv, make_host("ams-1"), make_host("iad-1"))
    return kv


def host(kv: MemoryKV) -> Host | None:
    stored = kv.server.get(keys.host("ams-1"))
    return decode(stored.value, Host) if stored else None


def drained(kv: MemoryKV) -> Drain | None:
    stored = kv.server.get(keys.drain("ams-1"))
    return decode(stored.value, Drain) if stored else None


async def begin(kv: MemoryKV, *, force: bool = False) -> Drain:
    return await upkeep.drain(kv, "ams-1", force=force, clock=CLOCK, entropy=CountedEntropy())


async def put_machine(kv: MemoryKV, config: MachineConfig | None = None) -> Machine:
    order = Order(app="web", config=config or MachineConfig(image="x"), host="ams-1", machine_id="m1")
    return await place(kv, order, clock=CLOCK, entropy=CountedEntropy())


def want_destroyed(kv: MemoryKV, machine: Machine) -> None:
    claim = msgspec.structs.replace(machine, desired=Desired.DESTROYED)
    kv.server.txn((), (Put(keys.machine("web", machine.id), encode(claim)),))


def lose(kv: MemoryKV) -> None:
    kv.server.txn((), (Delete(keys.alive("ams-1")),))


async def test_cordon_and_uncordon(kv: LosingKV):
    kv.lose = True
    assert (await upkeep.cordon(kv, "ams-1")).cordoned
    revision = kv.server.revision
    await upkeep.cordon(kv, "ams-1")
    assert kv.server.revision == revision, "repeated, it changes nothing"
    assert not (await upkeep.uncordon(kv, "ams-1")).cordoned
    with pytest.raises(NotFound) as raised:
        await upkeep.cordon(kv, "nowhere-1")
    assert "ams-1, iad-1" in raised.value.hint


async def test_a_drain_cordons_and_is_begun_once(kv: LosingKV):
    kv.lose = True
    first = await begin(kv)
    found = host(kv)
    assert found is not None
    assert found.cordoned
    again = await begin(kv, force=True)
    assert (again.id, again.force) == (first.id, True)


async def test_uncordoning_cancels_a_drain_and_forgets_one_that_is_over(kv: LosingKV):
    await begin(kv)
    await upkeep.uncordon(kv, "ams-1")
    found = drained(kv)
    assert found is not None
    assert found.state is DrainState.CANCELLED
    with pytest.raises(Conflict, match="taken back"):
        await begin(kv)
    over = msgspec.structs.replace(found, state=DrainState.DRAINED)
    await kv.put(keys.drain("ams-1"), encode(over))
    await upkeep.uncordon(kv, "ams-1")
    assert drained(kv) is None


async def test_the_grace_period_is_longer_than_a_sign_of_life(kv: LosingKV):
    assert await upkeep.set_grace(kv, 90.0) == LossRule(grace_s=90.0)
    for wrong in (0.0, LEASE_TTL_S, float("nan"), float("inf")):
        with pytest.raises(InvalidInput):
            await upkeep.set_grace(kv, wrong)


async def test_an_empty_host_is_removed_with_all_its_records(kv: LosingKV):
    await begin(kv)
    kv.lose = True
    await upkeep.remove(kv, "ams-1")
    left = [item.key for item in kv.server.list(keys.ROOT).items if "ams-1" in item.key]
    assert left == []


@pytest.mark.parametrize("alive", [True, False])
async def test_a_host_with_a_machine_or_a_volume_is_not_removed(kv: LosingKV, alive: bool):
    machine = await put_machine(kv, VOLUME)
    if not alive:
        lose(kv)
    with pytest.raises(Refused) as raised:
        await upkeep.remove(kv, "ams-1")
    assert "machine m1 of app web" in raised.value.message
    assert machine.config.mounts[0].volume in raised.value.message
    assert host(kv) is not None


async def test_a_living_host_ends_its_copies_itself(kv: LosingKV):
    machine = await put_machine(kv)
    kv.server.txn((), (Put(keys.machine("web", "m1"), encode(_moved(machine))),))
    with pytest.raises(Refused, match="a copy of machine m1"):
        await upkeep.remove(kv, "ams-1")
    lose(kv)
    await upkeep.remove(kv, "ams-1")  # it will not come back: nobody else can end that copy
    assert host(kv) is None


def _moved(machine: Machine) -> Machine:
    return msgspec.structs.replace(machine, host="iad-1", epoch=2)


async def test_a_dead_hosts_destroyed_machines_and_then_its_volumes_can_be_given_up(kv: LosingKV):
    machine = await put_machine(kv, VOLUME)
    volume_id = machine.config.mounts[0].volume
    want_destroyed(kv, machine)
    lose(kv)
    with pytest.raises(Refused, match=volume_id):
        await upkeep.remove(kv, "ams-1")
    assert kv.server.get(keys.machine("web", "m1")) is None, "who removes the host says that it is gone"
    await records.destroy(kv, "web", volume_id, 1.0, entropy=CountedEntropy())
    await upkeep.remove(kv, "ams-1")
    assert host(kv) is None
    assert kv.server.get(keys.reservations("ams-1")) is None
    assert await records.list_destroyed(kv) == (), "nothing can come back to a host that is gone"


async def test_a_volume_that_comes_back_at_the_same_moment_wins():
    class Racing(MemoryKV):
        async def _before(self, op: str) -> None:
            await super()._before(op)
            if op == "txn" and self.volume_id:
                volume_id, self.volume_id = self.volume_id, ""
                await records.undestroy(self, "web", volume_id, entropy=CountedEntropy())

        volume_id = ""

    kv = Racing()
    await join(kv, make_host("ams-1"))
    kv.server.txn((), (Put(keys.app("web"), encode(App(name="web"))),))
    volume = await create_volume(kv, "web", "d", "ams", 1, clock=CLOCK, entropy=CountedEntropy())
    await records.destroy(kv, "web", volume.id, 1.0, entropy=CountedEntropy())
    kv.volume_id = volume.id
    with pytest.raises(Refused, match=volume.id):
        await upkeep.remove(kv, "ams-1")
    assert host(kv) is not None


async def test_a_machine_placed_at_the_same_moment_wins(kv: LosingKV):
    class Racing(MemoryKV):
        async def _before(self, op: str) -> None:
            await super()._before(op)
            if op == "txn" and self.server.get(keys.machine("web", "m1")) is None:
                await put_machine(MemoryKV(self.server))

    with pytest.raises(Refused, match="m1"):
        await upkeep.remove(Racing(kv.server), "ams-1")
    stored = kv.server.get(keys.reservations("ams-1"))
    assert stored is not None
    assert "m1" in decode(stored.value, Reservations).machines
