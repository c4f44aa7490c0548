"""The machines world: three real hosts' loops over fake hardware, users, and faults.

Owns the hosts and the fault schedule. Checkers are always on (checkers.py, copies.py); after the
faults everything must converge within CONVERGE_S: what is wanted runs, nothing is leaked. In some
runs one host never comes back: then what it could lose must run elsewhere, as far as there is room.

Called by tests/simulation/runner.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, cast

import msgspec

from flyd.errors import FlydError
from flyd.hosts.membership import keep_membership
from flyd.machines.halts import stop_of
from flyd.machines.host import HostLoop
from flyd.machines.leases import LEASES
from flyd.model import App, Check, Host, Machine, Resources, StopConfig, decode, encode
from flyd.model.cluster import Drain, DrainState, LossRule
from flyd.placement.placer import Placer
from flyd.placement.repairs import Repairs
from flyd.ports import KV, Clock, Delete, Entropy, Put
from flyd.storage.keeper import VolumeKeeper
from flyd.store import keys
from flyd.store.leader import CONTROLLER, lead
from flyd.store.mirror import Mirror
from tests.simulation.checkers import Checkers
from tests.simulation.conduct import Conduct
from tests.simulation.copies import Copies
from tests.simulation.disk import SimulatedVolumes
from tests.simulation.driver import (
    BAD,
    EVEN,
    Hardware,
    SimulatedDriver,
    SimulatedSources,
)
from tests.simulation.ledger import Violation
from tests.simulation.loop import current, stream
from tests.simulation.machines_users import APPS, User
from tests.simulation.network import (
    CALM,
    ETCD,
    ROUGH,
    Network,
    SimulatedClock,
    SimulatedEntropy,
    SimulatedKV,
    Store,
)

HOSTS = ("ams", "iad", "sin")
USERS = ("user1", "user2")
MIRRORED = (
    keys.HOSTS,
    keys.ALIVE,
    keys.APPS,
    keys.SECRETS,
    keys.MACHINES,
    keys.STATUS,
    keys.VOLUMES,
    keys.VOLUME_COPIES,
    keys.VOLUME_MOVES,
    keys.RESERVATIONS,
    keys.LOSSES,
    keys.DRAINS,
    keys.SETTINGS,
    keys.RUNS,
    LEASES,
)
CAPACITY = Resources(cpus=4, memory_mb=1024, disk_gb=6)
GRACE_S = 12.0
FAULTS_S = 60.0
CONVERGE_S = 180.0
QUIET_S = 5.0
HURRIED_S = 5.0
ONE_IS_GONE = 0.25
SKEW_S = 900.0
HOURS = 8.0  # times SKEW_S
UP_S = (4096.0, 8000.0)  # well apart from the loop's own time, so that one taken for the other shows


class MachinesWorld:
    """Everything of one run."""

    capacity = CAPACITY
    converge_s = CONVERGE_S
    user = User

    def __init__(self, faults_s: float = FAULTS_S) -> None:
        loop = current()
        self.chance = stream(loop.seed, "faults")
        self.network = Network()
        self.store = Store()
        self.hardware = {name: Hardware(name) for name in HOSTS}
        self.clocks = {name: SimulatedClock() for name in HOSTS}
        self.checkers, self.copies = self._checkers()
        self.checkers.attach()
        self.copies.attach()
        Conduct(self.store, self.hardware, USERS).attach()
        self.store.txn((), [Put(keys.app(app), encode(App(name=app))) for app in APPS])
        self.store.txn((), (Put(keys.HOST_LOSS, encode(LossRule(grace_s=GRACE_S))),))
        self._faults_s = faults_s
        self._incarnations: int = 0
        self._healed = False

    def _checkers(self) -> tuple[Checkers, Copies]:
        checkers = Checkers(self.store, self.hardware, self.clocks)
        return checkers, Copies(self.store, self.network, self.hardware)

    # ------------------------------------------------------------------ hosts

    def start_flyd(self, name: str) -> None:
        """Start flyd on a host, unless it runs or the host is gone for good."""
        loop = current()
        if not loop.alive(f"{name}/flyd") and name != self.checkers.gone:
            loop.spawn(f"{name}/flyd", self._flyd(name))
            self.copies.born(name)

    async def _flyd(self, name: str) -> None:
        """flyd as flyd/composition.py composes it, without API and edge."""
        self._incarnations += 1
        hardware = self.hardware[name]
        number = HOSTS.index(name) + 1
        host = Host(
            name=name,
            region=name,
            api_address=f"{name}:80",
            address=f"127.{number}.0.1",
            subnet=f"127.{number}",
            capacity=self.capacity,
            driver="simulated",
            version="0",
        )
        kv = SimulatedKV(self.network, self.store, name)
        clock = SimulatedClock(self.chance.uniform(-SKEW_S, SKEW_S), self.chance.uniform(*UP_S))
        self.clocks[name] = clock
        entropy = SimulatedEntropy(f"{name}/{self._incarnations}")
        mirror = Mirror(kv, MIRRORED)
        volumes = self._volumes(hardware)
        host_loop = HostLoop(
            host=host,
            kv=kv,
            mirror=mirror,
            driver=SimulatedDriver(hardware),
            run_log=hardware.run_log,
            volumes=volumes,
            sources=SimulatedSources(hardware),
            clock=clock,
            entropy=entropy,
            probe=partial(self._probe, hardware),
        )
        placer = Placer(kv, mirror, clock=clock, entropy=entropy)
        repairs = Repairs(kv, mirror, placer, clock=clock, entropy=entropy)
        keeper = VolumeKeeper(name, kv, cast(Any, volumes), clock=SimulatedClock(), entropy=entropy)
        async with asyncio.TaskGroup() as group:
            group.create_task(mirror.keep())
            group.create_task(keep_membership(kv, host))
            group.create_task(host_loop.run())
            group.create_task(repairs.watch_silences())
            group.create_task(self._keep_volumes(keeper))
            group.create_task(lead(kv, CONTROLLER, name, lambda term: repairs.keep_repairing(term.guard)))
            for loop in self._loops_besides(host, kv, mirror, volumes, clock, entropy):
                group.create_task(loop)

    def _volumes(self, hardware: Hardware) -> SimulatedVolumes:
        return SimulatedVolumes(hardware.volumes, hardware.purged, hardware.work)

    def _loops_besides(
        self, host: Host, kv: KV, mirror: Mirror, volumes: Any, clock: Clock, entropy: Entropy
    ) -> Sequence[Coroutine[Any, Any, None]]:
        """What else this flyd runs, in a world that needs it (volumes_world.py)."""
        return ()

    async def _keep_volumes(self, keeper: VolumeKeeper) -> None:
        """As the keeper does it, but oftener than once a minute."""
        while True:
            try:
                await keeper.round()
            except FlydError as error:
                current().note(f"volumes: {error}")
            await asyncio.sleep(self.chance.uniform(1, 10))

    async def _probe(self, hardware: Hardware, _check: Check, address: str) -> tuple[bool, str]:
        await asyncio.sleep(0.01)
        return (True, "ok") if hardware.answers(address) else (False, "no answer")

    def start_user(self, name: str) -> None:
        """A user at the command line, unless there is one."""
        loop = current()
        if not loop.alive(name) and not self._healed:
            self._incarnations += 1
            loop.spawn(name, self._user(name, self._incarnations))

    async def _user(self, name: str, number: int) -> None:
        """Somebody, and the part of a flyd's API that does what they ask for."""
        kv = SimulatedKV(self.network, self.store, name)
        clock, entropy = SimulatedClock(), SimulatedEntropy(f"{name}/{number}")
        mirror = Mirror(kv, MIRRORED)
        placer = Placer(kv, mirror, clock=clock, entropy=entropy)
        async with asyncio.TaskGroup() as group:
            group.create_task(mirror.keep())
            await mirror.wait_synced()
            group.create_task(self.user(name, kv, clock, entropy, self.chance, HOSTS, placer).work())

    # ------------------------------------------------------------------ the run

    async def run(self) -> object:
        """Let users work while things break, then heal and check."""
        loop = current()
        for name in HOSTS:
            self.start_flyd(name)
        for name in USERS:
            self.start_user(name)
        await self._break_things(loop.time() + self._faults_s)
        await self._heal()
        return self._told()

    def _told(self) -> object:
        claims = len(self.store.list(keys.MACHINES).items)
        return f"{claims} machines at the end, etcd revision {self.store.revision}"

    async def _break_things(self, end_s: float) -> None:
        while current().time() < end_s:
            await asyncio.sleep(self.chance.uniform(0.1, 6))
            self.chance.choice(self._faults())(self.chance.choice(HOSTS))

    def _faults(self) -> tuple[Callable[[str], None], ...]:
        return (
            self._power_cut,
            self._power_cut,
            self._crash_flyd,
            self._crash_flyd,
            self._freeze_flyd,
            self._cut_from_etcd,
            self._cut_from_etcd,
            self._etcd_outage,
            self._crash_user,
            self._compact,
            self._bad_weather,
            self._bad_hardware,
            self._bad_hardware,
            self._turn_clock,
        )

    def _later(self, span_s: tuple[float, float], action: Callable[[], object]) -> None:
        loop = current()
        loop.call_later(self.chance.uniform(*span_s), action, context=loop.world_context())

    def _for_long(self) -> tuple[float, float]:
        """How long something is away: a moment, or longer than the grace period."""
        return self.chance.choice(((0.3, 10.0), (GRACE_S, 3 * GRACE_S)))

    def _power_cut(self, name: str) -> None:
        self._crash(name)
        self.hardware[name].power_cut()
        self._later(self._for_long(), lambda: self.start_flyd(name))

    def _crash_flyd(self, name: str) -> None:
        self._crash(name)
        self._later((0.1, 5), lambda: self.start_flyd(name))

    def _crash(self, name: str) -> None:
        current().crash(f"{name}/flyd")
        self.copies.see_hosts()

    def _freeze_flyd(self, name: str) -> None:
        current().pause(f"{name}/flyd")
        self.copies.see_hosts()
        self._later(self._for_long(), lambda: self._thaw_flyd(name))

    def _thaw_flyd(self, name: str) -> None:
        current().resume(f"{name}/flyd")
        self.copies.see_hosts()

    def _crash_user(self, _name: str) -> None:
        user = self.chance.choice(USERS)
        current().crash(user)
        self._later((0.1, 3), lambda: self.start_user(user))

    def _cut_from_etcd(self, name: str) -> None:
        self.network.cut(self.chance.choice((name, name, *USERS)), ETCD)
        self._later(self._for_long(), self.network.heal)

    def _etcd_outage(self, _name: str) -> None:
        for place in (*HOSTS, *USERS):
            self.network.cut(place, ETCD)
        self._later((0.3, 10), self.network.heal)

    def _compact(self, _name: str) -> None:
        self.store.compact(self.store.revision - self.chance.randrange(3))

    def _bad_weather(self, _name: str) -> None:
        self.network.weather = ROUGH
        self._later((1, 20), self._calm)

    def _calm(self) -> None:
        self.network.weather = CALM

    def _bad_hardware(self, name: str) -> None:
        self.hardware[name].temper = BAD

    def _turn_clock(self, name: str) -> None:
        self.clocks[name].skew_s += self.chance.choice((1.0, 1.0, HOURS)) * self.chance.uniform(
            -SKEW_S, SKEW_S
        )

    # ------------------------------------------------------------------ the end

    async def _heal(self) -> None:
        loop = current()
        self._healed = True
        for user in USERS:
            loop.crash(user)
        if self.chance.random() < ONE_IS_GONE:
            self._lose(self.chance.choice(HOSTS))
        self.network.heal()
        self._calm()
        for name in HOSTS:
            self.hardware[name].temper = EVEN
            self._thaw_flyd(name)
            self.start_flyd(name)
            self._uncordon(name)
            self.clocks[name].skew_s += self.chance.choice((0.0, HOURS * SKEW_S))
        loop.note("healed")
        deadline = loop.time() + self.converge_s
        quiet_since = loop.time()
        while loop.time() - quiet_since < QUIET_S:
            self._hurry()
            if self.checkers.problems():
                quiet_since = loop.time()
            if loop.time() > deadline:
                raise Violation(f"not converged within {self.converge_s:.0f} s: {self.checkers.problems()}")
            await asyncio.sleep(0.5)

    def _hurry(self) -> None:
        """No stop may take its hours any more, those under way included."""
        for item in self.store.list(keys.MACHINES).items:
            claim = decode(item.value, Machine)
            if stop_of(claim).timeout_s > HURRIED_S:
                stop = StopConfig(timeout_s=self.chance.uniform(0, HURRIED_S))
                self.store.txn((), (Put(item.key, encode(msgspec.structs.replace(claim, stop=stop))),))

    def _lose(self, name: str) -> None:
        """The host never comes back."""
        self._crash(name)
        self.checkers.gone = name
        self.hardware[name].power_cut()
        current().note(f"{name} is gone for good")

    def _uncordon(self, name: str) -> None:
        """As the operator's last word: every host takes machines, no drain goes on."""
        host, drain = self.store.get(keys.host(name)), self.store.get(keys.drain(name))
        effects: list[Put | Delete] = []
        if host is not None:
            free = decode(host.value, Host)
            effects.append(Put(host.key, encode(msgspec.structs.replace(free, cordoned=False))))
        if drain is not None:
            ended = msgspec.structs.replace(decode(drain.value, Drain), state=DrainState.CANCELLED)
            effects.append(Put(drain.key, encode(ended)))
        self.store.txn((), effects)
