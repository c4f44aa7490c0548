"""A real repairer over a store in memory, in virtual time; a test speaks for its hosts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import msgspec

from flyd.model import (
    Event,
    Machine,
    MachineConfig,
    MachineState,
    MachineStatus,
    Reservations,
    decode,
    encode,
)
from flyd.model.cluster import Drain, Loss, LossRule
from flyd.placement.placer import Placer
from flyd.placement.repairs import Repairs
from flyd.placement.scheduler import Order
from flyd.ports import Delete, Put, Unchanged
from flyd.store import keys
from flyd.store.leader import CONTROLLER
from flyd.store.memory import MemoryKV
from flyd.store.mirror import Mirror
from tests.simulation.loop import run
from tests.support.placing import CountedEntropy, FixedClock, join, make_host, place

GRACE_S = 20.0
HOSTS = tuple(make_host(name, memory_mb=1024) for name in ("ams-1", "iad-1", "sin-1"))


class LoopClock(FixedClock):
    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()

    def wall_s(self) -> float:
        return self.now_s + asyncio.get_running_loop().time()


class World:
    """Three hosts without flyds: the test says what they say."""

    def __init__(self) -> None:
        self.kv = MemoryKV()
        self.etcd = self.kv.server
        self.clock, self.entropy = LoopClock(), CountedEntropy()
        self.term = 0

    async def begin(self) -> None:
        await join(self.kv, *(msgspec.structs.replace(h, subnet=f"127.{n}") for n, h in enumerate(HOSTS)))
        await self.kv.put(keys.HOST_LOSS, encode(LossRule(grace_s=GRACE_S)))

    async def lead(self, repairs: Repairs) -> None:
        """One term of leadership."""
        self.term = await self.kv.put(keys.leader(CONTROLLER), b"x")
        await repairs.keep_repairing(Unchanged(keys.leader(CONTROLLER), self.term))

    async def start(self, group: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        """A flyd's repairer that leads at once."""
        mirror = Mirror(self.kv, (keys.ROOT,))
        placer = Placer(self.kv, mirror, clock=self.clock, entropy=self.entropy)
        repairs = Repairs(self.kv, mirror, placer, clock=self.clock, entropy=self.entropy)
        tasks = [group.create_task(mirror.keep()), group.create_task(repairs.watch_silences())]
        await mirror.wait_synced()
        return [*tasks, group.create_task(self.lead(repairs))]

    async def place(self, machine_id: str, host: str = "ams-1", config: MachineConfig | None = None) -> None:
        order = Order(
            app="web", config=config or MachineConfig(image="host:"), host=host, machine_id=machine_id
        )
        await place(self.kv, order, clock=self.clock, entropy=self.entropy)

    def say(self, machine_id: str, state: MachineState = MachineState.STARTED) -> None:
        """The machine's host says so."""
        claim = self.claims()[machine_id]
        status = MachineStatus(
            id=claim.id,
            app=claim.app,
            host=claim.host,
            instance_id=claim.instance_id,
            epoch=claim.epoch,
            state=state,
        )
        self.etcd.txn((), (Put(keys.status(claim.app, claim.id), encode(status)),))

    def end(self, machine_id: str) -> None:
        """The machine's host has destroyed it."""
        claim = self.claims()[machine_id]
        gone = (keys.machine("web", machine_id), keys.status("web", machine_id))
        held = self.promised(claim.host)
        freed = msgspec.structs.replace(
            held, machines={m: r for m, r in held.machines.items() if m != machine_id}
        )
        self.etcd.txn((), (*map(Delete, gone), Put(keys.reservations(claim.host), encode(freed))))

    def claims(self) -> dict[str, Machine]:
        listed = self.etcd.list(keys.MACHINES).items
        return {m.id: m for m in (decode(item.value, Machine) for item in listed)}

    def promised(self, host: str) -> Reservations:
        stored = self.etcd.get(keys.reservations(host))
        return decode(stored.value, Reservations) if stored else Reservations(host=host)

    def lose(self, *hosts: str) -> None:
        self.etcd.txn((), [Delete(keys.alive(host)) for host in hosts])

    def loss(self, host: str) -> Loss | None:
        stored = self.etcd.get(keys.loss(host))
        return decode(stored.value, Loss) if stored else None

    def drain(self, **more: object) -> None:
        """What `fly hosts drain ams-1` writes."""
        drain = msgspec.structs.replace(Drain(id="d1", host="ams-1", begun_at_s=0.0), **more)
        cordoned = msgspec.structs.replace(HOSTS[0], cordoned=True)
        effects = (Put(keys.drain("ams-1"), encode(drain)), Put(keys.host("ams-1"), encode(cordoned)))
        self.etcd.txn((), effects)

    def drained(self) -> Drain:
        stored = self.etcd.get(keys.drain("ams-1"))
        assert stored is not None
        return decode(stored.value, Drain)

    def events(self, kind: str) -> list[Event]:
        found = (decode(item.value, Event) for item in self.etcd.list(keys.EVENTS).items)
        return [event for event in found if event.kind == kind]


async def until(condition: Callable[[], object], within_s: float = 30.0) -> float:
    """Wait for a condition; how long it took."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    while not condition():
        assert loop.time() - began_s < within_s, "not within the time"
        await asyncio.sleep(0.1)
    return loop.time() - began_s


def repaired(test: Callable[[World], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test in virtual time with a repairer at work."""

    async def main() -> None:
        world = World()
        await world.begin()
        with suppress(asyncio.CancelledError):
            async with asyncio.TaskGroup() as group:
                tasks = await world.start(group)
                await test(world)
                for task in tasks:
                    task.cancel()

    def in_virtual_time() -> None:
        run(1, main)

    in_virtual_time.__name__ = test.__name__
    return in_virtual_time
