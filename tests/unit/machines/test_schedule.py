"""Schedules: when the next start is due, and a host that keeps to it, whatever happens."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyd.machines import host as host_module
from flyd.machines.schedule import SCHEDULES, next_start_s, wait_s
from flyd.model import Desired, ExitStatus, MachineConfig, MachineState, RestartPolicy
from tests.support.host_world import SOURCE, Crash, Crasher, LoopClock, World, machine

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S

NEXT = [
    ("hourly", "2026-03-01T10:20:30", "2026-03-01T11:20:30"),
    ("daily", "2026-12-31T23:00:00", "2027-01-01T23:00:00"),
    ("weekly", "2026-02-25T00:00:00", "2026-03-04T00:00:00"),
    ("monthly", "2026-02-03T04:05:06", "2026-03-03T04:05:06"),
    ("monthly", "2026-12-15T01:00:00", "2027-01-15T01:00:00"),
    ("monthly", "2026-01-31T12:00:00", "2026-02-28T12:00:00"),
    ("monthly", "2028-01-30T12:00:00", "2028-02-29T12:00:00"),
    ("monthly", "2026-02-28T12:00:00", "2026-03-28T12:00:00"),
]


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


@pytest.mark.parametrize(("schedule", "started", "due"), NEXT)
def test_the_next_start(schedule: str, started: str, due: str) -> None:
    assert next_start_s(schedule, at(started)) == at(due)
    assert wait_s(schedule, at(due), at(started)) == at(due) - at(started)
    assert wait_s(schedule, at(due), at(due)) == 0.0


def test_without_a_schedule_there_is_none() -> None:
    assert next_start_s("", at("2026-01-01T00:00:00")) == 0.0


@given(
    schedule=st.sampled_from(SCHEDULES),
    started_s=st.floats(0, 4e9),
    wrong_s=st.floats(-3e9, 3e9),
)
def test_no_clock_makes_a_machine_wait_for_longer_than_its_schedule(
    schedule: str, started_s: float, wrong_s: float
) -> None:
    due_s = next_start_s(schedule, started_s)
    assert HOUR_S - 1.0 <= due_s - started_s <= 31 * DAY_S + 1.0
    left_s = wait_s(schedule, due_s, started_s + wrong_s)
    assert 0.0 <= left_s <= 31 * DAY_S + 1.0
    if 0.0 <= wrong_s < due_s - started_s - 1.0:
        assert left_s > 0.0, "not before its time, while the clock goes forward"
    if wrong_s > due_s - started_s + 1.0:
        assert left_s == 0.0


# --------------------------------------------------------------------------- a host that keeps to it


class Wall(LoopClock):
    """A wall clock that the test sets."""

    now_s = 1_000_000.0

    def wall_s(self) -> float:
        return self.now_s


class Scheduled(World):
    """A machine that ends at once, each time, under an hourly schedule."""

    def __init__(self, policy: str = "on-failure", code: int = 0) -> None:
        super().__init__()
        self.clock: Wall = Wall()
        self._code = code
        restart = RestartPolicy(policy=policy)
        self.config = MachineConfig(image=SOURCE, cmd=("x",), schedule="hourly", restart=restart)

    def end(self) -> None:
        """The process comes to its end."""
        self.driver.end("m1", ExitStatus(code=self._code))

    async def until_rest(self, starts: int) -> None:
        """Until it has been started so often in all, has ended, and rests."""
        await self.until(lambda: len(self.driver.starts) >= starts and self.state() is MachineState.STARTED)
        self.end()
        await self.until_state(MachineState.STOPPED)

    def starts(self) -> int:
        return len(self.driver.starts)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts look at their clock often."""
    monkeypatch.setattr(host_module, "RESYNC_S", 0.02)


@asynccontextmanager
async def resting(world: Scheduled) -> AsyncGenerator[None]:
    """A flyd, and the machine at rest after its first start."""
    world.claim(machine(config=world.config))
    async with world.flyd():
        await world.until_rest(1)
        yield


async def looked(world: Scheduled) -> None:
    """Return once the host has looked at the machine a few times more."""
    looks = world.driver.looks
    await world.until(lambda: world.driver.looks > looks + 3)


async def test_one_that_rests_is_started_when_it_is_due() -> None:
    world = Scheduled()
    async with resting(world):
        status = world.status()
        assert status is not None
        assert status.next_start_s == world.clock.now_s + HOUR_S
        world.clock.now_s += HOUR_S - 1
        await looked(world)
        assert world.starts() == 1
        world.clock.now_s += 1
        await world.until_rest(2)
        await looked(world)
        assert world.starts() == 2


async def test_after_a_long_absence_one_start_makes_up_for_all() -> None:
    world = Scheduled()
    async with resting(world):
        pass
    world.clock.now_s += 5.5 * HOUR_S
    async with world.flyd():
        await world.until_rest(2)
        await looked(world)
        assert world.starts() == 2
        status = world.status()
        assert status is not None
        assert status.next_start_s == world.clock.now_s + HOUR_S


async def test_one_that_runs_on_is_left_alone_when_it_is_due() -> None:
    world = Scheduled()
    world.claim(machine(config=world.config))
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
        world.clock.now_s += 2 * HOUR_S
        await looked(world)
        assert world.starts() == 1
        world.end()
        await world.until(lambda: world.starts() == 2)


async def test_one_that_somebody_stopped_stays_so() -> None:
    world = Scheduled()
    async with resting(world):
        world.claim(machine(config=world.config, desired=Desired.STOPPED))
        await looked(world)
        world.clock.now_s += 2 * HOUR_S
        await looked(world)
        assert world.starts() == 1


async def test_one_that_gave_up_tries_again_when_it_is_due() -> None:
    world = Scheduled(policy="no", code=1)
    async with resting(world):
        world.clock.now_s += HOUR_S
        await world.until_rest(2)


async def test_a_clock_set_back_by_more_than_its_hour_holds_up_nothing() -> None:
    world = Scheduled()
    async with resting(world):
        world.clock.now_s -= DAY_S
        await world.until_rest(2)


async def test_a_new_home_waits_for_the_time_that_the_old_one_told() -> None:
    world = Scheduled()
    world.claim(machine(config=world.config, starts_at_s=world.clock.now_s + 60.0))
    async with world.flyd():
        await world.until_state(MachineState.CREATED)
        await looked(world)
        assert world.starts() == 0
        world.clock.now_s += 60.0
        await world.until_rest(1)
        await looked(world)
        assert world.starts() == 1


MAX_EFFECTS = 40


async def test_a_crash_after_any_effect_neither_repeats_nor_loses_a_start() -> None:
    for number in range(1, MAX_EFFECTS):
        world = Scheduled()
        async with resting(world):
            pass
        world.clock.now_s += HOUR_S
        crasher = Crasher(number)

        def started(world: Scheduled = world) -> bool:
            return world.starts() == 2 and world.state() is MachineState.STARTED

        try:
            async with world.flyd(crasher):
                await world.until(started)
                await looked(world)
        except* Crash:
            pass
        crashed = crasher.seen >= number
        async with world.flyd():
            await world.until(
                lambda started=started, world=world: started() and not world.run_log.open_runs()
            )
            await looked(world)
        assert world.starts() == 2, f"effect {number}"
        status = world.status()
        assert status is not None
        assert status.next_start_s == world.clock.now_s + HOUR_S, f"effect {number}"
        if not crashed:
            assert number > 5
            return
    pytest.fail("every run crashed: the end was never reached")
