"""A flyd that dies right after any effect, and the next one: every operation still ends as it should.

With fakes, and so also operations that fail on their way; on real drivers and real SQLite:
tests/conformance/test_crash_matrix.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
import pytest

from flyd.errors import Refused
from flyd.model import Check, Desired, ExitStatus, MachineConfig, MachineSpec, MachineState
from tests.support.host_world import (
    SOURCE,
    Crash,
    Crasher,
    World,
    assert_freed,
    machine,
    placed_with_volume,
)


async def crash_after(world: World, at: int, act: Callable[[], None], done: Callable[[], bool]) -> bool:
    """Run a flyd that dies after its `at`-th effect; True if it came to the end before."""
    finished = False
    try:
        async with world.flyd(Crasher(at)):
            act()
            await world.until(done)
            finished = True
    except* Crash:
        pass
    return finished and world.driver.crasher.seen < at


MAX_EFFECTS = 60  # more than any operation has


async def create_with_crash(at: int) -> bool:
    world = World()
    placed_with_volume(world)

    def done() -> bool:
        return world.state() is MachineState.STARTED and not world.run_log.open_runs()

    finished = await crash_after(world, at, lambda: None, done)
    async with world.flyd():
        await world.until(done)
        status = world.status()
    assert status is not None
    assert world.driver.starts == ["m1"], f"effect {at}"
    assert world.volumes.created == ["v1"], f"effect {at}"
    assert [event.type for event in status.events] == ["launch", "start"], f"effect {at}"
    return finished


async def end_with_crash(at: int, wish: Desired) -> bool:
    world = World()
    claim = placed_with_volume(world)
    wished = msgspec.structs.replace(claim, desired=wish)
    reached = MachineState.STOPPED if wish is Desired.STOPPED else None

    def done() -> bool:
        return world.state() is reached and not world.run_log.open_runs()

    async with world.flyd():
        await world.until_state(MachineState.STARTED)
    finished = await crash_after(world, at, lambda: world.claim(wished), done)
    async with world.flyd():
        await world.until(done)
    if wish is Desired.DESTROYED:
        assert_freed(world)
    assert world.driver.starts == ["m1"], f"effect {at}"
    return finished


async def restart_with_crash(at: int) -> bool:
    world = World()
    world.claim(machine())

    def done() -> bool:
        status = world.status()
        restarted = status is not None and status.events[-1].type == "restart"
        return restarted and world.state() is MachineState.STARTED and not world.run_log.open_runs()

    async with world.flyd():
        await world.until_state(MachineState.STARTED)
    finished = await crash_after(world, at, lambda: world.claim(machine(restart_nonce=1)), done)
    async with world.flyd():
        await world.until(done)
    assert len(world.driver.starts) == 2, f"effect {at}"
    return finished


async def update_with_crash(at: int) -> bool:
    world = World()
    claim = placed_with_volume(world)

    def done() -> bool:
        status = world.status()
        newest = status is not None and status.instance_id == "01B"
        return newest and world.state() is MachineState.STARTED and not world.run_log.open_runs()

    async with world.flyd():
        await world.until_state(MachineState.STARTED)
    newer = msgspec.structs.replace(claim, instance_id="01B")
    finished = await crash_after(world, at, lambda: world.claim(newer), done)
    async with world.flyd():
        await world.until(done)
    assert world.driver.seen["m1"].instance_id == "01B", f"effect {at}"
    assert world.driver.starts == ["m1", "m1"], f"effect {at}"
    assert world.volumes.created == ["v1"], f"effect {at}"
    assert world.volumes.held["v1"] == ("m1", 3), f"effect {at}"
    return finished


async def recycle_with_crash(at: int) -> bool:
    world = World()
    check = Check(kind="tcp", port=1, interval_s=0.005, grace_period_s=0.0, restart_limit=1)
    world.claim(machine(config=MachineConfig(image=SOURCE, cmd=("x",), checks={"up": check})))

    def well() -> bool:
        status = world.status()
        return status is not None and status.healthy()

    def recycled() -> bool:
        return well() and len(world.driver.starts) > 1 and not world.run_log.open_runs()

    async with world.flyd():
        await world.until(well)

    def sicken() -> None:
        world.probe_ok = False
        end = world.driver.end

        def cured(machine_id: str, exit: ExitStatus) -> None:
            world.probe_ok = True  # as soon as it has ended
            end(machine_id, exit)

        world.driver.end = cured

    finished = await crash_after(world, at, sicken, recycled)
    async with world.flyd():
        await world.until(recycled)
    status = world.status()
    assert status is not None
    assert len(world.driver.starts) == 2, f"effect {at}"
    assert [event.type for event in status.events] == ["launch", "start", "unhealthy", "start"], (
        f"effect {at}"
    )
    return finished


async def failing_create_with_crash(at: int) -> bool:
    world = World()
    placed_with_volume(world)
    create, refusals = world.driver.create, 1

    async def refused_once(spec: MachineSpec) -> None:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise Refused("no room")
        await create(spec)

    world.driver.create = refused_once

    def done() -> bool:
        return world.state() is MachineState.STARTED and not world.run_log.open_runs()

    finished = await crash_after(world, at, lambda: None, done)
    async with world.flyd():
        await world.until(done)
    assert world.driver.starts == ["m1"], f"effect {at}"
    assert world.volumes.held["v1"] == ("m1", 3), f"effect {at}"
    return finished


@pytest.mark.parametrize(
    "operation", ["create", "stop", "destroy", "restart", "update", "recycle", "failing create"]
)
async def test_every_operation_survives_a_crash_after_every_effect(operation: str) -> None:
    runs: dict[str, Callable[[int], Awaitable[bool]]] = {
        "create": create_with_crash,
        "stop": lambda at: end_with_crash(at, Desired.STOPPED),
        "destroy": lambda at: end_with_crash(at, Desired.DESTROYED),
        "restart": restart_with_crash,
        "update": update_with_crash,
        "recycle": recycle_with_crash,
        "failing create": failing_create_with_crash,
    }
    for at in range(1, MAX_EFFECTS):
        if await runs[operation](at):
            assert at > 5  # the crashes before were real ones
            return
    pytest.fail("every run crashed: the end was never reached")
