"""Places on a host for machines that were never on it are given back, and no others."""

from __future__ import annotations

import asyncio

from flyd.machines.leftovers import free_leftovers, leftovers
from flyd.model import Machine, Reservations, Resources, decode, encode
from flyd.ports import Put
from flyd.store import keys
from flyd.store.memory import MemoryKV
from flyd.store.mirror import Mirror
from tests.support.host_world import machine

SIZE = Resources(memory_mb=256)
PROMISED = Reservations(
    host="h1",
    machines={"mine": SIZE, "moved": SIZE, "gone": SIZE, "copy": SIZE},
    addresses={"mine": 1, "moved": 2, "gone": 3, "copy": 4},
    volumes_gb={"v1": 3},
)
CLAIMS: dict[str, Machine] = {
    "mine": machine(id="mine"),
    "moved": machine(id="moved", host="h2", epoch=2),
    "copy": machine(id="copy", host="h2", epoch=2),
}


def test_only_what_is_neither_claimed_nor_here_is_left_over() -> None:
    assert leftovers(PROMISED, CLAIMS, {"copy"}) == ("gone", "moved")
    assert leftovers(PROMISED, CLAIMS, set(PROMISED.machines)) == ()


async def test_leftovers_are_freed_unless_a_machine_is_placed_meanwhile() -> None:
    kv = MemoryKV()
    records = [Put(keys.machine("web", m), encode(claim)) for m, claim in CLAIMS.items()]
    kv.server.txn((), (*records, Put(keys.reservations("h1"), encode(PROMISED))))
    mirror = Mirror(kv, (keys.MACHINES, keys.RESERVATIONS))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(mirror.keep())
        await mirror.wait_synced()
        kv.server.txn((), (Put(keys.reservations("h1"), encode(PROMISED)),))  # not in the mirror yet
        assert await free_leftovers(kv, mirror, "h1", {"copy"}) == ()
        version = mirror.version
        if mirror.revision < kv.server.revision:
            await mirror.wait_change(version)
        assert await free_leftovers(kv, mirror, "h1", {"copy"}) == ("gone", "moved")
        task.cancel()
    stored = kv.server.get(keys.reservations("h1"))
    assert stored is not None
    kept = decode(stored.value, Reservations)
    assert (sorted(kept.machines), sorted(kept.addresses)) == (["copy", "mine"], ["copy", "mine"])
    assert kept.volumes_gb == PROMISED.volumes_gb
