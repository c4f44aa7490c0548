"""A deploy that meets a machine somebody holds: waits, then fails with who holds it and until when."""

from __future__ import annotations

import asyncio

import pytest

from flyd.deploy.plan import StepName
from flyd.deploy.releases import RunState, list_runs
from flyd.machines import leases
from flyd.machines.leases import MachineLease
from flyd.store.memory import MemoryKV
from tests.simulation.loop import current
from tests.support.deployers import (
    LoopClock,
    all_well,
    deployer_process,
    machines_of,
    new_cluster,
    simulate,
    start,
    wait_ended,
)
from tests.support.placing import CountedEntropy
from tests.support.rollouts import STATEFUL, PureWorld, ended_well, make_config

BOTH = {"ams": ["app@1"], "iad": ["app@1"]}


def lease_on(world: PureWorld, region: str) -> MachineLease:
    machine = next(m for m in world.of_release(1) if m.region == region)
    held = MachineLease(
        machine=machine.id,
        nonce="n",
        owner="ann",
        description="a dump",
        ttl_s=60,
        lease=7,
        expires_at_s=3661.0,
    )
    world.leases[machine.id] = held
    return held


@pytest.mark.parametrize("group", [None, STATEFUL])
@pytest.mark.parametrize("region", ["ams", "iad"])
def test_a_deploy_fails_once_it_has_waited_and_leaves_what_was_there(region: str, group: object) -> None:
    config = make_config(app=STATEFUL) if group else make_config()
    world = PureWorld()
    assert ended_well(world.deploy(config, 1))
    world.history.clear()
    held = lease_on(world, region)
    run = world.deploy(config, 2)
    assert (run.state, world.running()) == (RunState.FAILED, BOTH)
    assert run.error == (
        f"machine {held.machine} is leased by ann for a dump until 01:01:01 UTC; "
        "the deploy has waited 60 s for it"
    )
    assert not any("@1" in line for line in world.history if line.split()[1] == region)


@pytest.mark.parametrize("at", [StepName.CORDON_OLD, StepName.DESTROY_OLD])
def test_one_taken_at_any_moment_is_kept_and_one_given_back_is_not_waited_for(at: StepName) -> None:
    world = PureWorld()
    assert ended_well(world.deploy(make_config(), 1))
    world.before[at] = lambda: lease_on(world, "ams")
    run = world.deploy(make_config(), 2)
    assert (run.state, world.running()) == (RunState.FAILED, BOTH)
    world.leases.clear()
    assert ended_well(world.deploy(make_config(), 3))


def test_a_real_deployer_says_whom_it_waits_for_and_goes_on() -> None:
    async def main() -> None:
        kv = await new_cluster(all_well, "chat")
        current().spawn("only", deployer_process(MemoryKV(kv.server), "only"))
        await start(kv, "chat", 1, make_config())
        await wait_ended(kv, "chat")
        held = (await machines_of(kv, "chat"))[0]
        taken = await leases.acquire(
            kv, "chat", held.id, owner="ann", ttl_s=3600, clock=LoopClock(), entropy=CountedEntropy("lease")
        )
        await start(kv, "chat", 2, make_config())
        while "leased by ann" not in (await list_runs(kv, "chat"))[-1].doing:
            await asyncio.sleep(0.5)
        await leases.renew(kv, "chat", held.id, taken.nonce, clock=LoopClock())
        await asyncio.sleep(5)
        run = (await list_runs(kv, "chat"))[-1]
        assert sum("leased by ann" in line.text for line in run.lines) == 1
        assert held in await machines_of(kv, "chat")
        await leases.release(kv, "chat", held.id, taken.nonce)
        assert (await wait_ended(kv, "chat")).state is RunState.COMPLETE

    simulate(main, seeds=3)


def test_a_lease_that_the_deployer_has_not_heard_of_is_respected_by_etcd() -> None:
    async def main() -> None:
        kv = await new_cluster(all_well, "chat")
        current().spawn("only", deployer_process(MemoryKV(kv.server), "only", leases_seen=False))
        await start(kv, "chat", 1, make_config())
        await wait_ended(kv, "chat")
        held = (await machines_of(kv, "chat"))[0]
        await leases.acquire(
            kv, "chat", held.id, owner="ann", ttl_s=30, clock=LoopClock(), entropy=CountedEntropy("lease")
        )
        await start(kv, "chat", 2, make_config())
        await asyncio.sleep(20)
        assert held in await machines_of(kv, "chat")
        assert (await wait_ended(kv, "chat")).state is RunState.COMPLETE

    simulate(main, seeds=2)
