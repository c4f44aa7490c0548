"""The machines world: three real hosts' loops over fake hardware, users, and faults.

Owns the hosts, the users' random commands (through the real placer and the real commands)
and the fault schedule. Checkers are always on (checkers.py); after the faults everything
must converge within CONVERGE_S: what is wanted runs, nothing is leaked.

Called by tests/simulation/runner.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from flyd.errors import FlydError
from flyd.hosts.membership import keep_membership
from flyd.machines import commands
from flyd.machines.host import HostLoop
from flyd.model import (
    Check,
    Desired,
    Guest,
    Host,
    Machine,
    MachineConfig,
    Mount,
    Resources,
    RestartPolicy,
    Service,
    Volume,
    decode,
)
from flyd.placement import placer, volumes
from flyd.placement.placer import Order
from flyd.store import keys
from flyd.store.mirror import Mirror
from tests.simulation.checkers import Checkers
from tests.simulation.driver import (
    BAD,
    EVEN,
    Hardware,
    SimulatedDriver,
    SimulatedSources,
    SimulatedVolumes,
)
from tests.simulation.ledger import Violation
from tests.simulation.loop import current, stream
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
APPS = ("web", "shop")
MIRRORED = (keys.HOSTS, keys.ALIVE, keys.APPS, keys.SECRETS, keys.MACHINES, keys.STATUS, keys.VOLUMES)
CAPACITY = Resources(cpus=4, memory_mb=1024, disk_gb=6)
FAULTS_S = 60.0
CONVERGE_S = 180.0
QUIET_S = 5.0

Place = Callable[..., Awaitable[Machine]]


class MachinesWorld:
    """Everything of one run. `place` is the placer, so that a broken one can be tried."""

    def __init__(self, place: Place = placer.place) -> None:
        loop = current()
        self.chance = stream(loop.seed, "faults")
        self.network = Network()
        self.store = Store()
        self.hardware = {name: Hardware(name) for name in HOSTS}
        self.checkers = Checkers(self.store, self.hardware)
        self.checkers.attach()
        self._place = place
        self._incarnations = 0

    # ------------------------------------------------------------------ hosts

    def start_flyd(self, name: str) -> None:
        """Start flyd on a host, unless it runs."""
        loop = current()
        if not loop.alive(f"{name}/flyd"):
            loop.spawn(f"{name}/flyd", self._flyd(name))

    async def _flyd(self, name: str) -> None:
        """flyd as flyd/daemon.py composes it, without API and edge."""
        self._incarnations += 1
        hardware = self.hardware[name]
        number = HOSTS.index(name) + 1
        host = Host(
            name=name,
            region=name,
            api_address=f"{name}:80",
            address=f"127.{number}.0.1",
            subnet=f"127.{number}",
            capacity=CAPACITY,
            driver="simulated",
            version="0",
        )
        kv = SimulatedKV(self.network, self.store, name)
        mirror = Mirror(kv, MIRRORED)
        host_loop = HostLoop(
            host=host,
            kv=kv,
            mirror=mirror,
            driver=SimulatedDriver(hardware),
            run_log=hardware.run_log,
            volumes=SimulatedVolumes(hardware),
            sources=SimulatedSources(hardware),
            clock=SimulatedClock(),
            entropy=SimulatedEntropy(f"{name}/{self._incarnations}"),
            probe=self._probe,
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(mirror.keep())
            group.create_task(keep_membership(kv, host))
            group.create_task(host_loop.run())

    async def _probe(self, _check: Check, _address: str) -> tuple[bool, str]:
        await asyncio.sleep(0.01)
        return True, "ok"

    # ------------------------------------------------------------------ users

    def start_user(self, name: str) -> None:
        """A user at the command line, unless there is one."""
        loop = current()
        if not loop.alive(name):
            self._incarnations += 1
            loop.spawn(name, self._user(name, SimulatedEntropy(f"{name}/{self._incarnations}")))

    async def _user(self, name: str, entropy: SimulatedEntropy) -> None:
        kv = SimulatedKV(self.network, self.store, name)
        clock = SimulatedClock()
        while True:
            await asyncio.sleep(self.chance.uniform(0, 3))
            app = self.chance.choice(APPS)
            try:
                match self.chance.randrange(10):
                    case 0 | 1 | 2:
                        machine = await self._place(kv, self._order(app), clock=clock, entropy=entropy)
                        current().note(f"placed {machine.id} on {machine.host}")
                    case 3:
                        region, size_gb = self.chance.choice(HOSTS), self.chance.randint(1, 3)
                        await volumes.create_volume(
                            kv, app, "data", region, size_gb, clock=clock, entropy=entropy
                        )
                    case 4:
                        await self._destroy_volume(kv, app, entropy)
                    case _:
                        await self._change(kv, app)
            except FlydError as error:
                current().note(f"refused: {type(error).__name__} {error}")

    def _order(self, app: str) -> Order:
        chance = self.chance
        mounts = (Mount(path="/data", name="data", size_gb=chance.randint(1, 3)),)
        port = Service(internal_port=80, checks=(Check(kind="tcp", port=80),))
        cpu_kind = chance.choice(("shared", "performance"))
        return Order(
            app=app,
            region=chance.choice((None, *HOSTS)),
            config=MachineConfig(
                image="host:",
                cmd=("serve",),
                guest=Guest(cpus=chance.randint(1, 2), memory_mb=256, cpu_kind=cpu_kind),
                mounts=mounts if chance.random() < 0.4 else (),
                services=(port,) if chance.random() < 0.5 else (),
                restart=RestartPolicy(policy=chance.choice(("always", "always", "on-failure", "no"))),
            ),
        )

    async def _change(self, kv: SimulatedKV, app: str) -> None:
        machines = [decode(i.value, Machine) for i in (await kv.list(f"{keys.MACHINES}{app}/")).items]
        if not machines:
            return
        machine = self.chance.choice(machines)
        match self.chance.randrange(6):
            case 0:
                await commands.restart(kv, app, machine.id)
            case 1 | 2:
                await commands.set_desired(kv, app, machine.id, Desired.STOPPED)
            case 3 | 4:
                await commands.set_desired(kv, app, machine.id, Desired.STARTED)
            case _:
                await commands.set_desired(kv, app, machine.id, Desired.DESTROYED)

    async def _destroy_volume(self, kv: SimulatedKV, app: str, entropy: SimulatedEntropy) -> None:
        found = [decode(i.value, Volume) for i in (await kv.list(f"{keys.VOLUMES}{app}/")).items]
        if found:
            await volumes.destroy_volume(kv, app, self.chance.choice(found).id, entropy=entropy)

    # ------------------------------------------------------------------ the run

    async def run(self) -> str:
        """Let users work while things break, then heal and check."""
        loop = current()
        for name in HOSTS:
            self.start_flyd(name)
        for name in USERS:
            self.start_user(name)
        end = loop.time() + FAULTS_S
        while loop.time() < end:
            await asyncio.sleep(self.chance.uniform(0.1, 6))
            self.chance.choice(self._faults())(self.chance.choice(HOSTS))
        await self._heal()
        claims = len(self.store.list(keys.MACHINES).items)
        return f"{claims} machines at the end, etcd revision {self.store.revision}"

    def _faults(self) -> tuple[Callable[[str], None], ...]:
        return (
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
        )

    def _later(self, span_s: tuple[float, float], action: Callable[[], object]) -> None:
        loop = current()
        loop.call_later(self.chance.uniform(*span_s), action, context=loop.world_context())

    def _power_cut(self, name: str) -> None:
        current().crash(f"{name}/flyd")
        self.hardware[name].power_cut()
        self._later((0.5, 20), lambda: self.start_flyd(name))

    def _crash_flyd(self, name: str) -> None:
        current().crash(f"{name}/flyd")
        self._later((0.1, 5), lambda: self.start_flyd(name))

    def _freeze_flyd(self, name: str) -> None:
        loop = current()
        loop.pause(f"{name}/flyd")
        self._later((0.5, 15), lambda: loop.resume(f"{name}/flyd"))

    def _crash_user(self, _name: str) -> None:
        user = self.chance.choice(USERS)
        current().crash(user)
        self._later((0.1, 3), lambda: self.start_user(user))

    def _cut_from_etcd(self, name: str) -> None:
        self.network.cut(self.chance.choice((name, name, *USERS)), ETCD)
        self._later((0.3, 12), self.network.heal)

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

    # ------------------------------------------------------------------ the end

    async def _heal(self) -> None:
        loop = current()
        for user in USERS:
            loop.crash(user)
        self.network.heal()
        self._calm()
        for name in HOSTS:
            self.hardware[name].temper = EVEN
            loop.resume(f"{name}/flyd")
            self.start_flyd(name)
        loop.note("healed")
        deadline = loop.time() + CONVERGE_S
        quiet_since = loop.time()
        while loop.time() - quiet_since < QUIET_S:
            if self.checkers.problems():
                quiet_since = loop.time()
            if loop.time() > deadline:
                raise Violation(f"not converged within {CONVERGE_S:.0f} s: {self.checkers.problems()}")
            await asyncio.sleep(0.5)
