"""Which ends the Docker driver tells of, whatever the event stream does: twice, late, or not at all."""

from __future__ import annotations

import asyncio

import pytest

from flyd.drivers.docker.events import EngineEvent
from flyd.drivers.docker.runs import Runs
from flyd.drivers.docker.spec import Seen
from flyd.errors import Conflict


class SetClock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def runs(clock: SetClock) -> Runs:
    return Runs("ams-1", clock)


def event(action: str, at_ns: int, container_id: str = "c1") -> EngineEvent:
    return EngineEvent(action=action, machine_id="m1", container_id=container_id, at_ns=at_ns)


def up(started_at: str = "1970-01-01T00:00:01Z", container_id: str = "c1") -> Seen:
    return Seen(
        container_id=container_id,
        machine_id="m1",
        app="web",
        instance_id="i1",
        spec_digest="",
        running=True,
        ever_started=True,
        pid=7,
        started_at=started_at,
        finished_at_s=0.0,
        exit_code=0,
        oom_killed=False,
    )


def told(runs: Runs) -> int:
    return runs.exited.qsize()


def test_an_end_is_told_once(runs: Runs) -> None:
    run = runs.begin("m1", "c1")
    runs.began("m1", run, 10)
    runs.happened(event("die", 11))
    runs.happened(event("die", 11))
    assert (told(runs), run.ended.is_set(), runs.get("m1")) == (1, True, None)


def test_an_end_of_the_run_before_does_not_count(runs: Runs) -> None:
    run = runs.begin("m1", "c1")
    runs.happened(event("die", 9))
    runs.began("m1", run, 10)
    runs.happened(event("die", 9))
    runs.happened(event("die", 99, "c0"))
    assert told(runs) == 0
    runs.happened(event("die", 12))
    assert told(runs) == 1


def test_an_end_may_come_before_the_answer_to_the_start(runs: Runs) -> None:
    run = runs.begin("m1", "c1")
    runs.happened(event("start", 10))
    runs.happened(event("die", 11))
    assert told(runs) == 0
    runs.began("m1", run, 10)
    assert told(runs) == 1


def test_what_others_start_is_watched(runs: Runs) -> None:
    runs.happened(event("start", 10))
    runs.happened(event("die", 11))
    assert told(runs) == 1


async def test_a_listing_adopts_and_tells_of_what_has_ended(runs: Runs, clock: SetClock) -> None:
    runs.listed([up()], 99.0)
    await runs.wait_connected()
    assert runs.get("m1") is not None
    clock.now_s = 200.0
    runs.listed([up()], 199.0)
    assert told(runs) == 0
    runs.listed([], 199.0)
    assert told(runs) == 1


def test_a_listing_from_before_the_start_says_nothing(runs: Runs, clock: SetClock) -> None:
    run = runs.begin("m1", "c1")
    runs.listed([], 101.0)
    clock.now_s = 102.0
    runs.began("m1", run, 10)
    runs.listed([], 101.0)
    assert told(runs) == 0
    runs.listed([], 103.0)
    assert told(runs) == 1


def test_restarted_while_the_stream_was_broken(runs: Runs) -> None:
    runs.listed([up()], 99.0)
    runs.listed([up("1970-01-01T00:00:09Z")], 101.0)
    run = runs.get("m1")
    assert told(runs) == 1
    assert run is not None
    assert run.started_ns == 9_000_000_000


async def test_while_the_engine_is_down_its_last_error_is_said(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flyd.drivers.docker.runs.CONNECT_TIMEOUT_S", 0.01)
    runs.listed([], 99.0)
    runs.down(Conflict("another subnet", hint="remove it"))
    with pytest.raises(Conflict, match="another subnet"):
        await runs.wait_connected()
    runs.listed([], 101.0)
    async with asyncio.timeout(1):
        await runs.wait_connected()
