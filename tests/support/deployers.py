"""Real deployers over the in-memory etcd, in virtual time; hosts do at once what a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from flyd.deploy.appconfig import AppConfig
from flyd.deploy.deployer import Deployer
from flyd.deploy.releases import DeployRun, RunState, list_runs
from flyd.deploy.requests import start_deploy
from flyd.machines.free import free
from flyd.machines.leases import LEASES
from flyd.model import App, Desired, Machine, decode, encode
from flyd.placement.placer import Placer
from flyd.ports import KV, Put, Unchanged
from flyd.store import keys
from flyd.store.leader import lead
from flyd.store.memory import MemoryKV
from flyd.store.mirror import Mirror
from tests.simulation.loop import current, run
from tests.support.placing import PLACING, CountedEntropy, FixedClock, join, make_host
from tests.support.rollouts import Behaviour, status_of

PREFIXES = (*PLACING, LEASES, keys.STATUS, keys.RELEASES, keys.RUNS)


class LoopClock(FixedClock):
    """The simulation's clock."""

    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()


async def no_lines(machine: Machine, count: int) -> Sequence[str]:
    return [f"boom on {machine.region}"]


async def keep_hosts(kv: KV, behaviour: Behaviour) -> None:
    """All hosts: say of each machine what it does, a moment after its claim changed."""
    while True:
        listing = await kv.list(keys.MACHINES)
        for item in listing.items:
            machine = decode(item.value, Machine)
            if machine.desired is Desired.DESTROYED and behaviour(machine) != "silent":
                await free(kv, machine.host, machine)
                continue
            said = status_of(machine, behaviour(machine))
            key = keys.status(machine.app, machine.id)
            before = await kv.get(key)
            if said is not None and (before is None or before.value != encode(said)):
                await kv.txn([Unchanged(item.key, item.mod_revision)], [Put(key, encode(said))])
        await asyncio.sleep(0.2)


async def deployer_process(kv: KV, name: str, *, leases_seen: bool = True) -> None:
    """What the daemon runs."""
    mirror = Mirror(kv, [prefix for prefix in PREFIXES if leases_seen or prefix != LEASES])
    placer = Placer(kv, mirror, clock=LoopClock(), entropy=CountedEntropy(name))
    deployer = Deployer(kv, mirror, placer, clock=LoopClock(), last_lines=no_lines)
    async with asyncio.TaskGroup() as group:
        group.create_task(mirror.keep())
        await mirror.wait_synced()
        await lead(kv, "deployer", name, lambda held: deployer.keep_deploying(held.guard))


async def start(kv: KV, app: str, version: int, config: AppConfig) -> DeployRun:
    return await start_deploy(
        kv, app, f"image:{version}", config, clock=LoopClock(), entropy=CountedEntropy(f"{app}{version}")
    )


async def wait_ended(kv: KV, app: str) -> DeployRun:
    while True:
        newest = (await list_runs(kv, app))[-1]
        if newest.state is not RunState.RUNNING:
            return newest
        await asyncio.sleep(0.5)


async def new_cluster(behaviour: Behaviour, *apps: str) -> MemoryKV:
    kv = MemoryKV()
    await join(kv, make_host("ams-1"), make_host("iad-1"))
    for app in apps:
        await kv.put(keys.app(app), encode(App(name=app, regions=("ams", "iad"))))
    current().spawn("hosts", keep_hosts(MemoryKV(kv.server), behaviour))
    return kv


async def machines_of(kv: KV, app: str) -> list[Machine]:
    return [decode(item.value, Machine) for item in (await kv.list(f"{keys.MACHINES}{app}/")).items]


def all_well(_machine: Machine) -> str:
    return "ok"


def simulate(main: Callable[[], Awaitable[None]], seeds: int = 5) -> None:
    async def body() -> None:
        await main()

    for seed in range(seeds):
        run(seed, body)
