"""A flyd that dies right after any effect, and the next one: every operation still ends as it should."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
import pytest

from flyd.model import Desired, MachineState
from tests.support.host_world import Crash, Crasher, World, assert_freed, machine, placed_with_volume


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


@pytest.mark.parametrize("operation", ["create", "stop", "destroy", "restart"])
async def test_every_operation_survives_a_crash_after_every_effect(operation: str) -> None:
    runs: dict[str, Callable[[int], Awaitable[bool]]] = {
        "create": create_with_crash,
        "stop": lambda at: end_with_crash(at, Desired.STOPPED),
        "destroy": lambda at: end_with_crash(at, Desired.DESTROYED),
        "restart": restart_with_crash,
    }
    for at in range(1, MAX_EFFECTS):
        if await runs[operation](at):
            assert at > 5  # the crashes before were real ones
            return
    pytest.fail("every run crashed: the end was never reached")
