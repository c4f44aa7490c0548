"""What hosts do about updates, long stops, sick machines and machines that are not to stay."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from flyd.machines import host as host_module
from flyd.machines.operations import SICK_STOP_S
from flyd.model import (
    Check,
    Desired,
    ExitStatus,
    Machine,
    MachineConfig,
    MachineState,
    Mount,
    RestartPolicy,
    StopConfig,
)
from flyd.store import keys
from tests.support.host_world import SOURCE, World, machine, placed_with_volume


@pytest.fixture
def world() -> World:
    return World()


def newer(claim: Machine, **more: object) -> Machine:
    return msgspec.structs.replace(claim, instance_id="01B", **more)


# --------------------------------------------------------------------------- update


async def test_an_update_replaces_the_instance_on_its_volume(world: World) -> None:
    claim = placed_with_volume(world)
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
        world.claim(newer(claim))
        await world.until(lambda: (s := world.status()) is not None and s.instance_id == "01B")
        status = await world.until_state(MachineState.STARTED)
    assert world.driver.seen["m1"].instance_id == "01B"
    assert world.driver.starts == ["m1", "m1"]
    assert [e.type for e in status.events] == ["launch", "start", "update", "start"]
    assert world.volumes.held["v1"] == ("m1", 3)
    assert world.volumes.created == ["v1"]


async def test_an_update_of_a_stopped_machine_starts_nothing(world: World) -> None:
    world.claim(machine(desired=Desired.STOPPED))
    async with world.flyd():
        await world.until_state(MachineState.CREATED)
        world.claim(newer(machine(desired=Desired.STOPPED)))
        status = await world.until_state(MachineState.STOPPED)
        assert (status.instance_id, world.driver.starts) == ("01B", [])
        assert world.driver.specs["m1"].instance_id == "01B"


async def test_an_update_that_fails_is_tried_again_until_the_new_one_runs(world: World) -> None:
    world.claim(machine())
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
        world.sources.fails = 2
        world.claim(newer(machine()))
        status = await world.until_state(MachineState.FAILED)
        assert status.detail == "source: no host has it"
        assert world.driver.seen["m1"].running, "the old version runs while the new one can not be had"
        await world.until_state(MachineState.STARTED)
    assert world.driver.seen["m1"].instance_id == "01B"


async def test_one_that_ended_for_good_runs_again_in_a_new_version(world: World) -> None:
    once = MachineConfig(image=SOURCE, cmd=("x",), restart=RestartPolicy(policy="no"))
    world.claim(machine(config=once))
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
        world.driver.end("m1", ExitStatus(code=0))
        await world.until_state(MachineState.STOPPED)
        world.claim(newer(machine(config=once)))
        await world.until_state(MachineState.STARTED)
    assert world.driver.starts == ["m1", "m1"]


# --------------------------------------------------------------------------- stops that last


class SlowStops(World):
    """A driver whose machines end only when `release` is set, or their stop's timeout is short."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, str, float]] = []
        stop = self.driver.stop

        async def slow(machine_id: str, signal: str, timeout_s: float) -> ExitStatus | None:
            self.asked.append((machine_id, signal, timeout_s))
            if timeout_s > 1:
                await asyncio.Event().wait()
            return await stop(machine_id, signal, timeout_s)

        self.driver.stop = slow


def draining(claim: Machine, timeout_s: float = 7200.0) -> Machine:
    stop = StopConfig(signal="SIGTERM", timeout_s=timeout_s)
    return msgspec.structs.replace(claim, desired=Desired.STOPPED, stop=stop)


async def test_a_long_stop_is_hurried_by_the_next_wish() -> None:
    world = SlowStops()
    world.claim(machine())
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
        world.claim(draining(machine()))
        await world.until(lambda: world.asked == [("m1", "SIGTERM", 7200.0)])
        world.claim(draining(machine(cordoned=True)))
        await asyncio.sleep(0.02)
        assert len(world.asked) == 1, "another change of the claim disturbs no stop"
        world.claim(draining(machine(), timeout_s=0.5))
        await world.until_state(MachineState.STOPPED)
    assert world.asked == [("m1", "SIGTERM", 7200.0), ("m1", "SIGTERM", 0.5)]


async def test_a_stop_goes_on_after_flyd(world: World) -> None:
    slow = SlowStops()
    slow.claim(machine())
    async with slow.flyd():
        await slow.until_state(MachineState.STARTED)
        slow.claim(draining(machine()))
        await slow.until(lambda: slow.asked)
    async with slow.flyd():
        await slow.until(lambda: len(slow.asked) == 2)
        await slow.until_state(MachineState.STOPPING)  # told a moment after the driver was asked
        slow.claim(draining(machine(), timeout_s=0.1))
        await slow.until_state(MachineState.STOPPED)


async def test_stops_that_wait_hold_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "MAX_PARALLEL", 2)
    world = SlowStops()
    names = [f"m{number}" for number in range(4)]
    for name in names:
        world.claim(machine(id=name))
    async with world.flyd():
        await world.until(lambda: sorted(world.driver.starts) == names)
        for name in names:
            world.claim(draining(machine(id=name)))
        await world.until(lambda: len(world.asked) == 4)
        world.claim(machine(id="new"))
        await world.until(lambda: "new" in world.driver.starts)


# --------------------------------------------------------------------------- sick machines


def checked(policy: str = "always", limit: int = 2, grace_period_s: float = 0.0) -> MachineConfig:
    check = Check(kind="tcp", port=1, interval_s=0.02, grace_period_s=grace_period_s, restart_limit=limit)
    return MachineConfig(
        image=SOURCE, cmd=("x",), checks={"up": check}, restart=RestartPolicy(policy=policy, max_retries=1)
    )


async def test_a_failing_check_restarts_the_machine_with_a_back_off(world: World) -> None:
    world.claim(machine(config=checked()))
    async with world.flyd():
        await world.until(lambda: (s := world.status()) is not None and s.healthy())
        world.probe_ok = False
        status = await world.until_state(MachineState.RESTARTING)
        assert "check up failed 2 times in a row: refused" in status.detail
        await world.until(lambda: (s := world.status()) is not None and s.retry_at_s > 1000.0)
        world.probe_ok = True
        await world.until(lambda: len(world.driver.starts) == 2)
        status = await world.until_state(MachineState.STARTED)
    assert [e.type for e in status.events] == ["launch", "start", "unhealthy", "start"]
    assert (status.restarts, status.recent_exits, status.retry_at_s) == (1, 1, 0.0)
    assert status.events[2].exit is not None


async def test_a_sick_machine_is_not_waited_for_as_long_as_one_that_drains() -> None:
    world = SlowStops()
    world.probe_ok = False
    config = msgspec.structs.replace(checked(), stop=StopConfig(timeout_s=7200.0))
    world.claim(machine(config=config))
    async with world.flyd():
        await world.until(lambda: world.asked)
    assert world.asked == [("m1", "SIGINT", SICK_STOP_S)]


async def test_what_asks_for_nothing_shortens_no_back_off(world: World) -> None:
    world.claim(machine())
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
        for starts in (2, 3, 4):
            world.driver.end("m1", ExitStatus(code=1))
            await world.until(lambda starts=starts: len(world.driver.starts) == starts)
            await world.until(
                lambda starts=starts: (s := world.status()) is not None and s.pid >= 99 + starts
            )
        world.driver.end("m1", ExitStatus(code=1))
        await world.until_state(MachineState.RESTARTING)  # for two seconds now
        world.claim(machine(cordoned=True))
        await asyncio.sleep(0.05)
        assert world.state() is MachineState.RESTARTING
        world.claim(machine(cordoned=True, restart_nonce=1))
        await world.until_state(MachineState.STARTED)
    assert len(world.driver.starts) == 5


@pytest.mark.parametrize(("policy", "starts"), [("no", 1), ("on-failure", 2)])
async def test_a_sick_machine_rests_when_its_policy_says_so(world: World, policy: str, starts: int) -> None:
    world.probe_ok = False
    world.claim(machine(config=checked(policy)))
    async with world.flyd():
        status = await world.until_state(MachineState.STOPPED)
        assert len(world.driver.starts) == starts
        assert "check up failed" in status.detail
        await asyncio.sleep(0.05)
        assert world.state() is MachineState.STOPPED


async def test_a_check_without_a_limit_or_in_its_grace_restarts_nothing(world: World) -> None:
    world.probe_ok = False
    world.claim(machine(config=checked(limit=0)))
    world.claim(machine(id="m2", config=checked(grace_period_s=60.0)))
    async with world.flyd():
        await world.until(lambda: world.probes > 6)
        await asyncio.sleep(0.1)
    assert sorted(world.driver.starts) == ["m1", "m2"]


# --------------------------------------------------------------------------- not to stay


async def test_a_machine_that_is_not_to_stay_goes_with_all_it_held(world: World) -> None:
    claim = placed_with_volume(world)
    config = MachineConfig(
        image=SOURCE,
        cmd=("x",),
        mounts=(Mount(path="/data", volume="v1"),),
        restart=RestartPolicy(policy="on-failure"),
        auto_destroy=True,
    )
    world.claim(msgspec.structs.replace(claim, config=config))
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
        world.driver.end("m1", ExitStatus(code=1))
        await world.until(lambda: len(world.driver.starts) == 2)
        await world.until_state(MachineState.STARTED)
        world.driver.end("m1", ExitStatus(code=0))
        await world.until(lambda: world.etcd.get(keys.machine("web", "m1")) is None)
    assert world.driver.specs == {}
    assert world.volumes.held["v1"] == ("", 3)


async def test_without_etcd_it_goes_once_etcd_is_back(world: World) -> None:
    config = MachineConfig(image=SOURCE, cmd=("x",), restart=RestartPolicy(policy="no"), auto_destroy=True)
    world.claim(machine(config=config))
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
        world.kv.away = True
        world.driver.end("m1", ExitStatus(code=0))
        await asyncio.sleep(0.05)
        assert "m1" in world.driver.specs
        world.kv.away = False
        await world.until(lambda: world.etcd.get(keys.machine("web", "m1")) is None)


async def test_a_stopped_machine_stays_although_it_is_not_to_stay_after_its_end(world: World) -> None:
    config = MachineConfig(image=SOURCE, cmd=("x",), auto_destroy=True)
    world.claim(machine(config=config))
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
        world.claim(machine(config=config, desired=Desired.STOPPED))
        await world.until_state(MachineState.STOPPED)
        await asyncio.sleep(0.05)
        assert "m1" in world.driver.specs
