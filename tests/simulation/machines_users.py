"""The people of the machines world: users with their machines and volumes, an operator with the hosts.

They act through the real placer, the real commands and the real upkeep, at random. Owned by
machines_world.py, which starts and crashes them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from flyd.errors import FlydError
from flyd.machines import commands, leases, updates
from flyd.model import (
    Check,
    Desired,
    Guest,
    Machine,
    MachineConfig,
    Mount,
    RestartPolicy,
    Service,
    StopConfig,
    Volume,
    decode,
)
from flyd.placement import upkeep, volumes
from flyd.placement.placer import Placer
from flyd.placement.scheduler import Order
from flyd.ports import Clock
from flyd.storage import records
from flyd.storage.records import KEPT_S
from flyd.store import keys
from tests.simulation.loop import Stream, current
from tests.simulation.network import SimulatedEntropy, SimulatedKV

APPS = ("web", "shop")
LATER_S = 60.0  # a volume is destroyed as if so much earlier, or later, than such as is due to go now


class User:
    """Somebody at the command line."""

    def __init__(
        self,
        name: str,
        kv: SimulatedKV,
        clock: Clock,
        entropy: SimulatedEntropy,
        chance: Stream,
        hosts: Sequence[str],
        placer: Placer,
    ) -> None:
        self._name = name
        self._kv = kv
        self._clock = clock
        self._entropy = entropy
        self._chance = chance
        self._hosts = hosts
        self._placer = placer

    async def work(self) -> None:
        """One thing after the other, for ever."""
        while True:
            await asyncio.sleep(self._chance.uniform(0, 3))
            app = self._chance.choice(APPS)
            try:
                match self._chance.randrange(12):
                    case 0 | 1 | 2:
                        order = self._order(app)
                        machine = await self._placer.place(order)
                        current().note(f"placed {machine.id} on {machine.host}")
                    case 3:
                        await self._create_volume(app)
                    case 4:
                        await self._destroy_volume(app)
                    case 5:
                        await self._undestroy_volume()
                    case 6:
                        await self._keep_up(self._chance.choice(self._hosts))
                    case _:
                        await self._change(app)
            except FlydError as error:
                current().note(f"refused: {type(error).__name__} {error}")

    def _order(self, app: str) -> Order:
        chance = self._chance
        mounts = (Mount(path="/data", name="data", size_gb=chance.randint(1, 3)),)
        config = MachineConfig(image="host:", cmd=("serve",), mounts=mounts if chance.random() < 0.4 else ())
        return Order(app=app, region=chance.choice((None, *self._hosts)), config=self._config(config))

    def _config(self, of: MachineConfig) -> MachineConfig:
        """One with the volumes of another."""
        chance = self._chance
        port = Service(internal_port=80, checks=(Check(kind="tcp", port=80),))
        alive = Check(
            kind="tcp", port=80, interval_s=chance.uniform(0.5, 5), restart_limit=chance.randint(1, 3)
        )
        policy = chance.choice(("always", "always", "on-failure", "no"))
        end = chance.choice(("destroy", "schedule", "schedule", "rest", "rest"))
        return msgspec.structs.replace(
            of,
            env={"N": str(chance.randrange(100))},
            guest=Guest(
                cpus=chance.randint(1, 2),
                memory_mb=chance.choice((256, 256, 384)),
                cpu_kind=chance.choice(("shared", "performance")),
            ),
            services=(port,) if chance.random() < 0.5 else (),
            checks={"alive": alive} if chance.random() < 0.5 else {},
            restart=RestartPolicy(policy=policy, max_retries=chance.choice((2, 10))),
            stop=StopConfig(timeout_s=chance.choice((0.0, 5.0, 5.0, 3600.0, 3600.0))),
            auto_destroy=end == "destroy",
            schedule="hourly" if end == "schedule" and policy != "always" else "",
        )

    async def _change(self, app: str) -> None:
        machines = [decode(i.value, Machine) for i in (await self._kv.list(f"{keys.MACHINES}{app}/")).items]
        if not machines:
            return
        machine = self._chance.choice(machines)
        if self._chance.random() < 0.75:
            await self._wish(machine, "")
            return
        held = await leases.acquire(
            self._kv,
            app,
            machine.id,
            owner=self._name,
            ttl_s=self._chance.randint(2, 10),
            clock=self._clock,
            entropy=self._entropy,
        )
        for _ in range(self._chance.randint(1, 3)):
            await asyncio.sleep(self._chance.uniform(0, 3))
            await self._wish(machine, held.nonce)
        match self._chance.randrange(3):
            case 0:
                await leases.release(self._kv, app, machine.id, held.nonce)
            case 1:
                await leases.renew(self._kv, app, machine.id, held.nonce, clock=self._clock)
            case _:
                current().note(f"{self._name} forgets its lease on {machine.id}")

    async def _wish(self, machine: Machine, nonce: str) -> None:
        kv, app, chance = self._kv, machine.app, self._chance
        stop = (
            StopConfig(timeout_s=chance.choice((0.0, 2.0, 3600.0, 3600.0))) if chance.random() < 0.5 else None
        )
        match chance.randrange(9):
            case 0:
                await commands.restart(kv, app, machine.id, stop=stop, nonce=nonce)
            case 1 | 2:
                await commands.set_desired(kv, app, machine.id, Desired.STOPPED, stop=stop, nonce=nonce)
            case 3 | 4:
                await commands.set_desired(kv, app, machine.id, Desired.STARTED, nonce=nonce)
            case 5 | 6:
                await updates.update(
                    kv,
                    app,
                    machine.id,
                    self._config(machine.config),
                    current_version=chance.choice(("", machine.instance_id)),
                    nonce=nonce,
                    clock=self._clock,
                    entropy=self._entropy,
                )
            case 7:
                await commands.set_cordoned(kv, app, machine.id, chance.random() < 0.5, nonce=nonce)
            case _:
                await commands.set_desired(kv, app, machine.id, Desired.DESTROYED, stop=stop, nonce=nonce)

    async def _create_volume(self, app: str) -> None:
        region, size_gb = self._chance.choice(self._hosts), self._chance.randint(1, 3)
        await volumes.create_volume(
            self._kv, app, "data", region, size_gb, clock=self._clock, entropy=self._entropy
        )

    async def _destroy_volume(self, app: str) -> None:
        found = [decode(i.value, Volume) for i in (await self._kv.list(f"{keys.VOLUMES}{app}/")).items]
        if found:
            volume = self._chance.choice(found)
            at_s = self._clock.wall_s() - KEPT_S - self._chance.uniform(-LATER_S, LATER_S)
            await records.destroy(self._kv, app, volume.id, at_s, entropy=self._entropy)

    async def _undestroy_volume(self) -> None:
        kept = await records.list_destroyed(self._kv)
        if kept:
            volume = self._chance.choice(kept).volume
            await records.undestroy(self._kv, volume.app, volume.id, entropy=self._entropy)

    async def _keep_up(self, host: str) -> None:
        """What an operator does with a host; most of the time all hosts are in use."""
        match self._chance.randrange(4):
            case 0:
                force = self._chance.random() < 0.2
                await upkeep.drain(self._kv, host, force=force, clock=self._clock, entropy=self._entropy)
            case 1:
                await upkeep.cordon(self._kv, host)
            case _:
                await upkeep.uncordon(self._kv, host)
