"""The volumes world: the machines world's hosts, with volumes that are copied, moved and brought back.

Owns the schedules: a run is a row of them, SCHEDULE_S each. In each several things are drawn (partitions,
frozen and killed flyds, power cuts, an etcd that is away, moves, recoveries), each with its moment; what one
schedule has broken may still be so in the next. Checkers: those of the machines world, and mounts.py. At
rest no move is under way, and every promise for copies is for a volume that is known.

Called by tests/simulation/runner.py.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from msgspec.structs import replace

from flyd.errors import FlydError
from flyd.machines import commands
from flyd.model import Desired, Host, Machine, MachineConfig, Mount, Reservations, Resources, Volume, decode
from flyd.placement.ids import new_volume_id
from flyd.placement.scheduler import Order
from flyd.ports import KV, Clock, Entropy
from flyd.storage import records
from flyd.storage.copier import VolumeCopier
from flyd.storage.copies import VolumeCopy, copied_volume, copies_prefix, is_copy, newest
from flyd.storage.moving import FAILED, VolumeMove, VolumeMover, begin_move
from flyd.storage.receiver import CopyReceiver
from flyd.storage.recovery import Recovery
from flyd.store import keys
from flyd.store.mirror import Mirror
from tests.simulation.checkers import Checkers
from tests.simulation.copies import Copies
from tests.simulation.disk import SimulatedVolumes
from tests.simulation.driver import Hardware
from tests.simulation.ledger import Violation
from tests.simulation.loop import current
from tests.simulation.machines_users import APPS, User
from tests.simulation.machines_world import GRACE_S, HOSTS, MachinesWorld
from tests.simulation.mounts import Mounts
from tests.simulation.network import ETCD, SimulatedClock, SimulatedEntropy, SimulatedKV
from tests.simulation.volume_disk import CopiedVolumes, Office, SimulatedPeers

SCHEDULE_S = 6.0
EVENTS = (1, 4)  # of one schedule
MACHINES = 6  # with a volume each; more are not made
COPY_EVERY_S = (1.0, 20.0)


class MovingCopies(Copies):
    """As `Copies`, but a machine may leave with its volume: mounts.py says when."""

    def _check_move(self, before: Machine, after: Machine) -> None:
        if not before.config.mounts:
            super()._check_move(before, after)
        elif before.config.mounts[0].volume == after.config.mounts[0].volume:
            raise Violation(f"double placement: {before.id} left {before.host}, where its volume is")

    def _check_twice(self, machine_id: str, host: str, other: str) -> None:
        """Each of the two has a volume of its own, and the stale one ends in time (see_copies)."""


class CopiesCheckers(Checkers):
    """As `Checkers`, with copies: they are promised disk for as long as their volume is known."""

    def problems(self) -> list[str]:
        moves = [decode(item.value, VolumeMove) for item in self._store.list(keys.VOLUME_MOVES).items]
        under_way = [m for m in moves if m.phase != FAILED and m.volume.host != self.gone]
        return super().problems() + [f"the move of {m.volume.id} never ends ({m.phase})" for m in under_way]

    def _kept_besides(self, host: str) -> set[str]:
        stored = self._store.get(keys.reservations(host))
        promised = decode(stored.value, Reservations).volumes_gb if stored is not None else {}
        known = {keys.last_part(item.key) for item in self._store.list(keys.VOLUMES).items}
        known |= {keys.last_part(item.key) for item in self._store.list(records.DESTROYED).items}
        return {name for name in promised if is_copy(name) and copied_volume(name) in known}


class VolumeUser(User):
    """Somebody whose machines all have volumes."""

    async def work(self) -> None:
        """One thing after the other, for ever."""
        while True:
            await asyncio.sleep(self._chance.uniform(0, 4))
            app = self._chance.choice(APPS)
            try:
                await self._do(app)
            except FlydError as error:
                current().note(f"refused: {type(error).__name__} {error}")

    async def _do(self, app: str) -> None:
        chance, kv = self._chance, self._kv
        machines = [decode(i.value, Machine) for i in (await kv.list(keys.MACHINES)).items]
        volumes = [decode(i.value, Volume) for i in (await kv.list(keys.VOLUMES)).items]
        match chance.randrange(10):
            case 0 | 1 | 2 if len(machines) < MACHINES:
                free = [v.name for v in volumes if not v.attached_machine and v.app == app]
                mount = Mount(path="/data", name=chance.choice(("data", *free)), size_gb=1)
                config = self._config(MachineConfig(image="host:", cmd=("serve",), mounts=(mount,)))
                await self._placer.place(Order(app=app, config=config))
            case 3 | 4 if volumes:
                volume, every_s = chance.choice(volumes), chance.uniform(*COPY_EVERY_S)

                def policy(now: Volume) -> Volume:
                    return replace(now, replicas=chance.randint(1, 2), copy_every_s=every_s)

                await records.set_policy(kv, volume.app, volume.id, policy, entropy=self._entropy)
            case 5 if machines and chance.random() < 0.25:
                machine = chance.choice(machines)
                await commands.set_desired(kv, machine.app, machine.id, Desired.DESTROYED)
            case 6:
                await self._destroy_volume(app)
            case _ if machines:
                machine = chance.choice(machines)
                if chance.random() < 0.5:
                    await commands.restart(kv, machine.app, machine.id)
                else:
                    wish = chance.choice((Desired.STARTED, Desired.STARTED, Desired.STOPPED))
                    await commands.set_desired(kv, machine.app, machine.id, wish)
            case _:
                pass


class VolumesWorld(MachinesWorld):
    """Everything of one run."""

    capacity = Resources(cpus=8, memory_mb=4096, disk_gb=60)
    user = VolumeUser
    converge_s = 400.0  # moves to a host that is gone are given up one after the other, a minute each

    def __init__(self, faults_s: float = 10 * SCHEDULE_S) -> None:
        self._offices: dict[str, Office] = {}
        self._tally: Counter[str] = Counter()
        super().__init__(faults_s)
        self.mounts = Mounts(self.store, self.hardware)
        self.mounts.attach(self.copies.born_s, self.copies.sees_since)

    def _checkers(self) -> tuple[Checkers, Copies]:
        checkers = CopiesCheckers(self.store, self.hardware, self.clocks)
        return checkers, MovingCopies(self.store, self.network, self.hardware)

    def _volumes(self, hardware: Hardware) -> SimulatedVolumes:
        return CopiedVolumes(hardware.volumes, hardware.purged, hardware.work)

    def _loops_besides(
        self, host: Host, kv: KV, mirror: Mirror, volumes: Any, clock: Clock, entropy: Entropy
    ) -> Sequence[Coroutine[Any, Any, None]]:
        peers = SimulatedPeers(host.name, self.network, self.hardware, self._offices)
        copier = VolumeCopier(host.name, kv, mirror, volumes, peers, clock=clock)
        mover = VolumeMover(host.name, kv, mirror, copier, peers, clock=clock)
        self._offices[host.name] = Office(
            Recovery(host, kv, volumes, clock=clock, entropy=entropy),
            CopyReceiver(host.name, kv, volumes, peers.fetch, clock=clock, entropy=entropy),
            contextvars.copy_context(),
        )
        return copier.keep_copying(), mover.keep_moving()

    # ------------------------------------------------------------------ schedules

    async def _break_things(self, end_s: float) -> None:
        loop, chance = current(), self.chance
        while loop.time() < end_s - SCHEDULE_S / 2:
            self._tally["schedules"] += 1
            begins_s = loop.time()
            drawn = [
                (chance.uniform(0, SCHEDULE_S), chance.choice(self._faults()), chance.choice(HOSTS))
                for _ in range(chance.randint(*EVENTS))
            ]
            for after_s, fault, host in sorted(drawn, key=lambda one: one[0]):
                await asyncio.sleep(begins_s + after_s - loop.time())
                self._tally["events"] += 1
                fault(host)
            await asyncio.sleep(begins_s + SCHEDULE_S - loop.time())

    def _faults(self) -> tuple[Callable[[str], None], ...]:
        return (
            self._power_cut,
            self._crash_flyd,
            self._freeze_flyd,
            self._cut_from_etcd,
            self._cut_hosts,
            self._return_in_the_dark,
            self._etcd_outage,
            self._bad_weather,
            self._bad_hardware,
            self._compact,
            self._move,
            self._move,
            self._move,
            self._recover,
            self._recover,
            self._recover,
        )

    def _cut_hosts(self, name: str) -> None:
        self.network.cut(name, self.chance.choice([other for other in HOSTS if other != name]))
        self._later(self._for_long(), self.network.heal)

    def _return_in_the_dark(self, name: str) -> None:
        """It loses its power, and comes back to an etcd that it can not reach for a good while."""
        self._power_cut(name)
        self.network.cut(name, ETCD)
        self._later((2 * GRACE_S, 4 * GRACE_S), self.network.heal)

    def _move(self, name: str) -> None:
        self._ask(self._begin_move(name))

    def _recover(self, _name: str) -> None:
        self._ask(self._recover_lost())

    def _ask(self, what: Coroutine[Any, Any, None]) -> None:
        """Somebody asks for it, once."""

        async def ask() -> None:
            try:
                await what
            except FlydError as error:
                current().note(f"refused: {type(error).__name__} {error}")

        self._incarnations += 1
        current().spawn(f"operator{self._incarnations}", ask())

    async def _begin_move(self, target: str) -> None:
        """As MoveVolume begins it (api/volume_moves.py)."""
        name = f"operator{self._incarnations}"
        kv, clock = SimulatedKV(self.network, self.store, name), SimulatedClock()
        found = [decode(i.value, Volume) for i in (await kv.list(keys.VOLUMES)).items]
        volumes = [v for v in found if v.attached_machine and v.host != target]
        if volumes:
            new_id = new_volume_id(SimulatedEntropy(name))
            await begin_move(kv, self.chance.choice(volumes), target, new_id, clock=clock)

    async def _recover_lost(self) -> None:
        """As RecoverVolume does it (api/volumes.py), for any volume whose host is lost."""
        name = f"operator{self._incarnations}"
        kv = SimulatedKV(self.network, self.store, name)
        alive = [keys.last_part(item.key) for item in (await kv.list(keys.ALIVE)).items]
        found = [decode(i.value, Volume) for i in (await kv.list(keys.VOLUMES)).items]
        for volume in [v for v in found if v.host not in alive]:
            copies = [decode(i.value, VolumeCopy) for i in (await kv.list(copies_prefix(volume))).items]
            copy = newest([c for c in copies if c.host in alive])
            if copy is not None:
                peers = SimulatedPeers(name, self.network, self.hardware, self._offices)
                await peers.recover(copy.host, volume.app, volume.id)
                return

    def _told(self) -> Counter[str]:
        self.mounts.check_recorded()
        self._tally["mounts"] = len(self.mounts.recorded)
        self._tally["moves"], self._tally["recoveries"] = self.mounts.moved, self.mounts.recovered
        return self._tally
