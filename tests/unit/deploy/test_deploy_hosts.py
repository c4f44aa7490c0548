"""Deploys through real host loops on simulated hardware, while hosts, deployers and etcd's network break.

The machines world (tests/simulation) gives the hosts, the faults and the checkers, which are always
on: capacity, volumes and claims. Here: whatever happens, every run ends, and once all is healed the
next deploy completes and leaves exactly its own machines.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from flyd.deploy.appconfig import AppConfig
from flyd.deploy.deployer import Deployer
from flyd.deploy.releases import DeployRun, RunState, list_runs
from flyd.deploy.requests import start_deploy
from flyd.errors import FlydError, Refused
from flyd.machines.leases import LEASES
from flyd.model import App, Desired, Machine, decode, encode
from flyd.placement.placer import Placer
from flyd.ports import Delete, Put, TxnResult, Unchanged
from flyd.store import keys
from flyd.store.leader import lead
from flyd.store.mirror import Mirror
from tests.simulation.loop import current
from tests.simulation.machines_world import HOSTS, MachinesWorld
from tests.simulation.network import SimulatedClock, SimulatedEntropy, SimulatedKV
from tests.simulation.runner import simulate
from tests.support.placing import PLACING
from tests.support.rollouts import STATEFUL, WEB, WORKER, make_config

APP = "web"
RUN_ENDS_S = 1500.0  # a volume on a host that is gone for good is waited for twice
MIRRORED = (*PLACING, LEASES, keys.STATUS, keys.RELEASES, keys.RUNS)
CONFIG = make_config(app=WEB, stateful=STATEFUL, worker=WORKER)

SLOTS = (("ams", "app"), ("ams", "stateful"), ("ams", "worker"), ("iad", "app"), ("iad", "stateful"))


async def no_lines(_machine: Machine, _count: int) -> Sequence[str]:
    return ()


class DeployerKV(SimulatedKV):
    """A deployer's client: on its host's network, but what it destroys no host has given up."""

    async def txn(self, compares: Sequence[Unchanged], effects: Sequence[Put | Delete]) -> TxnResult:
        writer = f"{self._host}/deployer"
        return await self._call("txn", lambda: self._store.by(writer, compares, effects), writes=True)


class DeploysWorld(MachinesWorld):
    """The machines world with a deployer on each host and a developer instead of users."""

    over = False  # the faults are, and the developer has gone home

    def start_deployer(self, name: str) -> None:
        loop = current()
        if not loop.alive(f"{name}/deployer"):
            self._incarnations += 1
            loop.spawn(f"{name}/deployer", self._deployer(name, self._incarnations))

    async def _deployer(self, name: str, number: int) -> None:
        kv = DeployerKV(self.network, self.store, name)
        mirror = Mirror(kv, MIRRORED)
        clock, entropy = SimulatedClock(), SimulatedEntropy(f"deployer/{name}/{number}")
        placer = Placer(kv, mirror, clock=clock, entropy=entropy)
        deployer = Deployer(kv, mirror, placer, clock=clock, last_lines=no_lines)
        async with asyncio.TaskGroup() as group:
            group.create_task(mirror.keep())
            await mirror.wait_synced()
            await lead(kv, "deployer", name, lambda held: deployer.keep_deploying(held.guard))

    def _crash_deployer(self, name: str) -> None:
        current().crash(f"{name}/deployer")
        self._later((0.1, 5), lambda: self.start_deployer(name))

    def _freeze_deployer(self, name: str) -> None:
        loop = current()
        loop.pause(f"{name}/deployer")
        self._later((0.5, 15), lambda: loop.resume(f"{name}/deployer"))

    def _faults(self) -> tuple[Callable[[str], None], ...]:
        return (*super()._faults(), self._crash_deployer, self._freeze_deployer, self._crash_deployer)

    def start_user(self, name: str) -> None:
        loop = current()
        if name == "user1" and not self.over and not loop.alive(name):
            loop.spawn(name, self._developer(SimulatedKV(self.network, self.store, name)))

    async def _developer(self, kv: SimulatedKV) -> None:
        while True:
            await asyncio.sleep(self.chance.uniform(0, 10))
            try:
                await self._deploy(kv)
            except FlydError as error:
                current().note(f"refused: {type(error).__name__} {error}")

    async def _deploy(self, kv: SimulatedKV, config: AppConfig = CONFIG) -> DeployRun:
        self._incarnations += 1
        entropy = SimulatedEntropy(f"developer/{self._incarnations}")
        return await start_deploy(kv, APP, "host:", config, clock=SimulatedClock(), entropy=entropy)

    async def deploy_through_faults(self) -> str:
        kv = SimulatedKV(self.network, self.store, "developer")
        await kv.put(keys.app(APP), encode(App(name=APP, regions=HOSTS[:2])))
        for name in HOSTS:
            self.start_deployer(name)
        await self.run()
        self.over = True
        current().crash("user1")
        for name in HOSTS:
            current().resume(f"{name}/deployer")
            self.start_deployer(name)
        await self._ended(kv)
        complete = [r.version for r in await list_runs(kv, APP) if r.state is RunState.COMPLETE]
        # Some may have been moved off a lost host, to another region.
        found = Counter((m.config.process_group, m.release) for m in await self._settled(kv))
        wanted = Counter((group, version) for _, group in SLOTS for version in complete[-1:])
        lost = (
            self.checkers.gone in HOSTS[:2]
        )  # a region of the app has no host any more, and its volume went
        lacking = Counter(("stateful", version) for version in complete[-1:] if lost)
        assert wanted - lacking <= found <= wanted, (found, wanted)
        try:
            begun = await self._deploy(kv)
        except Refused:
            assert lost  # its data is gone: refused before anything was touched
            return "lost data"
        last = await self._ended(kv)
        assert last.id == begun.id
        machines = await self._settled(kv)
        if lost:
            assert last.state is RunState.FAILED
            assert Counter((m.config.process_group, m.release) for m in machines) == found
        else:
            assert last.state is RunState.COMPLETE, last.error
            left = sorted((m.region, m.config.process_group, m.release) for m in machines)
            assert left == sorted((region, group, last.version) for region, group in SLOTS)
        assert not self.checkers.problems()
        return f"{len(await list_runs(kv, APP))} runs"

    async def _settled(self, kv: SimulatedKV) -> list[Machine]:
        """All machines, once what a run did not wait for is gone too; none is half-way.

        Those that a host which is gone for good should end are left out: it never will.
        """
        await asyncio.sleep(120)
        found = [decode(i.value, Machine) for i in (await kv.list(f"{keys.MACHINES}{APP}/")).items]
        found = [m for m in found if (m.host, m.desired) != (self.checkers.gone, Desired.DESTROYED)]
        assert all(m.desired is Desired.STARTED and not m.cordoned for m in found)
        return found

    async def _ended(self, kv: SimulatedKV) -> DeployRun:
        async with asyncio.timeout(RUN_ENDS_S):
            while True:
                newest = (await list_runs(kv, APP))[-1]
                if newest.state is not RunState.RUNNING:
                    return newest
                await asyncio.sleep(0.5)


@pytest.mark.parametrize("seed", range(15))
def test_every_run_ends_and_the_next_deploy_completes(seed: int) -> None:
    async def main() -> str:
        return await DeploysWorld().deploy_through_faults()

    finished = simulate(main, seed, limit_s=3000.0)
    assert not finished.failures, "\n".join((*finished.trace[-40:], *finished.failures))
