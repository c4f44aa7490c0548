"""Small hosts, machines and a clock for tests of placement and deploys."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence

from flyd.errors import FlydError
from flyd.model import Host, Machine, MachineConfig, Resources, encode
from flyd.placement.placer import Placer
from flyd.placement.scheduler import Order
from flyd.ports import KV, Clock, Entropy, Unchanged
from flyd.store import keys
from flyd.store.mirror import Mirror

PLACING = (keys.HOSTS, keys.ALIVE, keys.RESERVATIONS, keys.MACHINES, keys.VOLUMES)
"""What a placer's mirror has to hold."""


class FixedClock:
    """A clock that a test moves by hand."""

    def __init__(self, now_s: float = 1_700_000_000.0) -> None:
        self.now_s = now_s

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return self.now_s


class CountedEntropy:
    """Different every time, the same in every run."""

    def __init__(self, seed: str = "") -> None:
        self._seed = seed
        self._count = 0

    def token(self, n_bytes: int) -> str:
        self._count += 1
        return hashlib.shake_128(f"{self._seed}{self._count}".encode()).hexdigest(n_bytes)


def make_host(
    name: str, *, memory_mb: int = 2048, cpus: int = 2, disk_gb: int = 10, cordoned: bool = False
) -> Host:
    """A host named <region>-<n>."""
    return Host(
        name=name,
        region=name.partition("-")[0],
        api_address="127.0.0.1:1",
        address="127.11.0.1",
        subnet="127.11",
        capacity=Resources(cpus=cpus, memory_mb=memory_mb, disk_gb=disk_gb),
        driver="process",
        version="test",
        cordoned=cordoned,
    )


def make_machine(machine_id: str, host: Host, *, app: str = "chat", group: str = "app") -> Machine:
    """A started machine."""
    return Machine(
        id=machine_id,
        app=app,
        name=machine_id,
        region=host.region,
        host=host.name,
        instance_id="I" + machine_id,
        config=MachineConfig(image="host:", process_group=group),
        private_ip="127.11.0.2",
    )


async def place(
    kv: KV, order: Order, *, clock: Clock, entropy: Entropy, guards: Sequence[Unchanged] = ()
) -> Machine:
    """Place one machine, as a flyd would that has just started."""
    mirror = Mirror(kv, PLACING)
    outcome: Machine | FlydError
    async with asyncio.TaskGroup() as group:
        keeping = group.create_task(mirror.keep())
        await mirror.wait_synced()
        try:
            outcome = await Placer(kv, mirror, clock=clock, entropy=entropy).place(order, guards=guards)
        except FlydError as error:
            outcome = error  # raised below: a group would wrap it
        keeping.cancel()
    if isinstance(outcome, FlydError):
        raise outcome
    return outcome


async def join(kv: KV, *hosts: Host) -> None:
    """Hosts join the cluster, alive."""
    for host in hosts:
        await kv.put(keys.host(host.name), encode(host))
        await kv.put(keys.alive(host.name), b"true")
