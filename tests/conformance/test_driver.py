"""What every driver does (ports.Driver).

Add a rig (tests/support/drivers.py) to HOSTS to put a driver through it.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from flyd.errors import Conflict, InvalidInput, NotFound, Refused
from tests.support.drivers import (
    WAIT_S,
    Rig,
    collected,
    first_lines,
    process_host,
    spec,
)
from tests.support.engine import docker_host

HOSTS: dict[str, Callable[[], AbstractContextManager[Rig]]] = {
    "docker": docker_host,
    "process": process_host,
}

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(params=sorted(HOSTS))
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with HOSTS[request.param]() as host:
        yield host


# --------------------------------------------------------------------------- lifecycle


async def test_a_machine_lives_from_create_to_destroy(rig: Rig) -> None:
    driver = rig.driver()
    machine = spec(rig.runs())
    await driver.create(machine)
    created = (await driver.observe())["m1"]
    assert (created.running, created.pid, created.exit, created.instance_id) == (False, 0, None, "i1")

    started = await driver.start(machine)
    assert started.running
    assert started.pid > 0
    assert started.started_at_s > 0
    assert (await driver.observe()) == {"m1": started}

    await first_lines(driver, "m1", 1)  # a container's init loses a signal that comes before it runs
    status = await driver.stop("m1", "SIGTERM", 5.0)
    assert status is not None
    assert (status.signal, status.code, status.requested) == (signal.SIGTERM, None, True)
    stopped = (await driver.observe())["m1"]
    assert (stopped.running, stopped.exit) == (False, status)

    await driver.destroy("m1")
    assert await driver.observe() == {}


async def test_a_look_at_one_machine_shows_what_a_look_at_all_does(rig: Rig) -> None:
    driver = rig.driver()
    assert await driver.look("m1") is None
    await driver.create(spec(rig.runs()))
    await driver.create(spec(rig.ends(3), "m2"))
    await driver.start(spec(rig.runs()))
    await driver.start(spec(rig.ends(3), "m2"))
    async with asyncio.timeout(WAIT_S):
        assert await anext(driver.exits()) == "m2"
    seen = await driver.observe()
    assert {m: await driver.look(m) for m in ("m1", "m2")} == seen
    assert (seen["m1"].running, seen["m2"].running) == (True, False)
    await driver.destroy("m1")
    assert await driver.look("m1") is None


async def test_a_signal_reaches_the_main_process(rig: Rig) -> None:
    driver = rig.driver()
    with pytest.raises(InvalidInput, match="SIGNONSENSE"):
        await driver.signal("m1", "SIGNONSENSE")
    await driver.create(spec(rig.runs()))
    with pytest.raises(Refused, match="not running"):
        await driver.signal("m1", "SIGTERM")
    await driver.start(spec(rig.runs()))
    await first_lines(driver, "m1", 1)
    await driver.signal("m1", "SIGTERM")
    async with asyncio.timeout(WAIT_S):
        assert await anext(driver.exits()) == "m1"
    seen = await driver.look("m1")
    assert seen is not None
    assert seen.exit is not None
    assert (seen.exit.signal, seen.exit.requested) == (signal.SIGTERM, False)


async def test_processes_of_a_machine(rig: Rig) -> None:
    driver = rig.driver()
    await driver.create(spec(rig.runs()))
    assert await driver.processes("m1") == ()
    await driver.start(spec(rig.runs()))
    await first_lines(driver, "m1", 1)
    found = await driver.processes("m1")
    assert any("sleep" in process.command for process in found)
    assert all(process.pid > 0 and process.memory_kb > 0 for process in found)
    await driver.stop("m1", "SIGTERM", 5.0)
    assert await driver.processes("m1") == ()


async def test_every_call_can_be_repeated(rig: Rig) -> None:
    driver = rig.driver()
    machine = spec(rig.runs())
    await driver.create(machine)
    await driver.create(machine)
    started = await driver.start(machine)
    assert await driver.start(machine) == started
    await driver.create(machine)
    assert (await driver.observe())["m1"] == started
    assert await driver.stop("m1", "SIGTERM", 5.0) is not None
    assert await driver.stop("m1", "SIGTERM", 5.0) is None
    await driver.destroy("m1")
    await driver.destroy("m1")
    assert await driver.stop("m1", "SIGTERM", 5.0) is None


async def test_two_starts_at_once_start_one_machine(rig: Rig) -> None:
    driver = rig.driver()
    machine = spec(rig.runs())
    await driver.create(machine)
    first, second = await asyncio.gather(driver.start(machine), driver.start(machine))
    assert first == second


async def test_a_stopped_machine_starts_again(rig: Rig) -> None:
    driver = rig.driver()
    machine = spec(rig.runs())
    await driver.create(machine)
    first = await driver.start(machine)
    await driver.stop("m1", "SIGTERM", 5.0)
    second = await driver.start(machine)
    assert second.running
    assert second.pid != first.pid
    assert second.exit is None


async def test_an_instance_must_be_stopped_before_the_next(rig: Rig) -> None:
    driver = rig.driver()
    await driver.create(spec(rig.runs()))
    await driver.start(spec(rig.runs()))
    following = spec(rig.runs(), instance_id="i2")
    with pytest.raises(Conflict, match="still runs instance i1"):
        await driver.create(following)
    await driver.stop("m1", "SIGTERM", 5.0)
    await driver.create(following)
    created = (await driver.observe())["m1"]
    assert (created.instance_id, created.exit) == ("i2", None)
    assert (await driver.start(following)).instance_id == "i2"


async def test_destroy_kills_what_runs(rig: Rig) -> None:
    driver = rig.driver()
    await driver.create(spec(rig.runs()))
    await driver.start(spec(rig.runs()))
    await driver.destroy("m1")
    assert await driver.observe() == {}
    with pytest.raises(NotFound):
        await anext(aiter(driver.logs("m1", tail=1, follow=False)))


# --------------------------------------------------------------------------- ends


@pytest.mark.parametrize("code", [0, 3, 255])
async def test_exit_codes(rig: Rig, code: int) -> None:
    driver = rig.driver()
    machine = spec(rig.ends(code))
    await driver.create(machine)
    await driver.start(machine)
    async with asyncio.timeout(WAIT_S):
        assert await anext(driver.exits()) == "m1"
    seen = (await driver.observe())["m1"]
    assert not seen.running
    assert seen.exit is not None
    assert (seen.exit.code, seen.exit.signal, seen.exit.requested) == (code, None, False)
    assert seen.exit.at_s > 0


async def test_sigkill_after_the_timeout(rig: Rig) -> None:
    driver = rig.driver()
    machine = spec(rig.ignores_sigterm())
    await driver.create(machine)
    await driver.start(machine)
    await first_lines(driver, "m1", 1)
    status = await driver.stop("m1", "SIGTERM", 0.2)
    assert status is not None
    assert (status.signal, status.requested) == (signal.SIGKILL, True)


async def test_an_unknown_signal_is_refused(rig: Rig) -> None:
    driver = rig.driver()
    with pytest.raises(InvalidInput, match="SIGNONSENSE"):
        await driver.stop("m1", "SIGNONSENSE", 1.0)


async def test_a_command_that_is_not_there(rig: Rig) -> None:
    driver = rig.driver()
    machine = spec(("no-such-program", "--fast"))
    await driver.create(machine)
    await driver.start(machine)
    async with asyncio.timeout(WAIT_S):
        assert await anext(driver.exits()) == "m1"
    seen = (await driver.observe())["m1"]
    assert seen.exit is not None
    assert seen.exit.code == 127
    (line,) = await first_lines(driver, "m1", 1)
    assert "no-such-program" in line.text


async def test_exits_tells_of_each_machine_once(rig: Rig) -> None:
    driver = rig.driver()
    for name in ("m1", "m2", "m3"):
        await driver.create(spec(rig.runs(), name))
        await driver.start(spec(rig.runs(), name))
    await driver.stop("m2", "SIGTERM", 5.0)
    await driver.destroy("m3")
    exits = driver.exits()
    async with asyncio.timeout(WAIT_S):
        assert [await anext(exits), await anext(exits)] == ["m2", "m3"]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await anext(exits)


# --------------------------------------------------------------------------- adoption


async def test_a_new_driver_adopts_what_runs(rig: Rig) -> None:
    driver = rig.driver()
    machine = spec(rig.runs())
    await driver.create(machine)
    started = await driver.start(machine)

    adopting = rig.driver()
    assert (await adopting.observe())["m1"] == started
    assert await adopting.start(machine) == started
    exits = adopting.exits()
    assert await adopting.stop("m1", "SIGTERM", 5.0) is not None
    async with asyncio.timeout(WAIT_S):
        assert await anext(exits) == "m1"


async def test_a_new_driver_knows_how_the_last_run_ended(rig: Rig) -> None:
    driver = rig.driver()
    machine = spec(rig.ends(7))
    await driver.create(machine)
    await driver.start(machine)
    async with asyncio.timeout(WAIT_S):
        await anext(driver.exits())
    before = await driver.observe()
    assert await rig.driver().observe() == before
    assert before["m1"].exit is not None
    assert before["m1"].exit.code == 7


# --------------------------------------------------------------------------- logs


async def test_logs_tail_then_follow(rig: Rig) -> None:
    driver = rig.driver()
    machine = spec(rig.prints(20))
    await driver.create(machine)
    await driver.start(machine)
    everything = await first_lines(driver, "m1", 20)
    assert [line.text for line in everything] == [f"line {n}" for n in range(1, 21)]
    assert all(line.at_s > 0 and line.machine_id == "m1" for line in everything)
    assert [line.text async for line in driver.logs("m1", tail=3, follow=False)] == [
        "line 18",
        "line 19",
        "line 20",
    ]
    assert [line async for line in driver.logs("m1", tail=0, follow=False)] == []


async def test_following_sees_the_next_run(rig: Rig) -> None:
    driver = rig.driver()
    machine = spec(rig.prints(2))
    await driver.create(machine)
    following = asyncio.gather(first_lines(driver, "m1", 4, tail=0))
    await asyncio.sleep(0)
    await driver.start(machine)
    await first_lines(driver, "m1", 2)
    await driver.stop("m1", "SIGKILL", 1.0)
    await driver.start(machine)
    ((*_, last),) = await following
    assert last.text == "line 2"


# --------------------------------------------------------------------------- exec


async def test_exec_streams_and_ends_with_the_code(rig: Rig) -> None:
    driver = rig.driver()
    await driver.create(spec(rig.runs()))
    await driver.start(spec(rig.runs()))
    outputs = driver.exec("m1", rig.shell("echo hello; echo trouble >&2; exit 5"), 10.0)
    assert await collected(outputs) == (b"hello\n", b"trouble\n", 5)


async def test_exec_of_nothing_there(rig: Rig) -> None:
    driver = rig.driver()
    await driver.create(spec(rig.runs()))
    await driver.start(spec(rig.runs()))
    _, stderr, code = await collected(driver.exec("m1", ("no-such-program",), 10.0))
    assert b"no-such-program" in stderr
    assert code == 127


async def test_exec_has_a_deadline(rig: Rig) -> None:
    driver = rig.driver()
    await driver.create(spec(rig.runs()))
    await driver.start(spec(rig.runs()))
    stdout, stderr, code = await collected(driver.exec("m1", rig.shell("echo begun; sleep 1000"), 1.0))
    assert stdout == b"begun\n"
    assert b"longer than 1 s" in stderr
    assert code == 124


async def test_exec_needs_a_running_machine(rig: Rig) -> None:
    driver = rig.driver()
    with pytest.raises(NotFound):
        await collected(driver.exec("m1", rig.shell("echo hello"), 1.0))
    await driver.create(spec(rig.runs()))
    with pytest.raises(Refused, match="not running"):
        await collected(driver.exec("m1", rig.shell("echo hello"), 1.0))
