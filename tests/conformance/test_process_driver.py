"""What the process driver promises beyond the port: nothing is left behind, and flyd may be killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flyd.drivers.process import driver as process_driver
from flyd.drivers.process.directory import MachineDirectory
from flyd.model import MachineSpec, encode
from tests.support.drivers import (
    WAIT_S,
    ProcessRig,
    collected,
    first_lines,
    process_host,
    running,
    spec,
    until,
)

pytestmark = pytest.mark.timeout(60)

# A child of its own group and session whose environment and command line say nothing of the machine,
# as Postgres' are; it holds on to stdout.
DAEMON = "env -i setsid sleep 999 & echo $!; sleep 998 & echo $!; echo up; exec sleep 1000"


@pytest.fixture
def rig() -> Iterator[ProcessRig]:
    with process_host() as host:
        yield host


def shim_of(rig: ProcessRig, machine_id: str = "m1") -> int:
    run = MachineDirectory(rig.root / machine_id).newest_run()
    assert run is not None
    return run.shim


async def family(rig: ProcessRig) -> tuple[int, list[int]]:
    """Start a machine with two children; answers its pid and theirs."""
    driver = rig.driver()
    machine = spec(rig.shell(DAEMON))
    await driver.create(machine)
    started = await driver.start(machine)
    lines = await first_lines(driver, "m1", 3)
    return started.pid, [int(line.text) for line in lines[:2]]


# --------------------------------------------------------------------------- nothing is left behind


async def test_stop_kills_the_children_of_children(rig: ProcessRig) -> None:
    main, children = await family(rig)
    assert all(running(pid) for pid in (main, *children))
    assert await rig.driver().stop("m1", "SIGINT", 5.0) is not None
    assert not any(running(pid) for pid in (main, *children))
    with pytest.raises(ProcessLookupError):  # not even a zombie: Postgres looks for its old pid
        os.kill(main, 0)


async def test_a_machine_that_ends_by_itself_takes_its_children_along(rig: ProcessRig) -> None:
    main, children = await family(rig)
    os.kill(main, signal.SIGKILL)
    async with asyncio.timeout(WAIT_S):
        await anext(rig.driver().exits())
    assert not any(running(pid) for pid in children)


async def test_a_killed_shim_is_a_killed_machine(rig: ProcessRig) -> None:
    main, children = await family(rig)
    driver = rig.driver()
    os.kill(shim_of(rig), signal.SIGKILL)
    async with asyncio.timeout(WAIT_S):
        assert await anext(driver.exits()) == "m1"
    assert not any(running(pid) for pid in (main, *children))
    seen = (await driver.observe())["m1"]
    assert (seen.running, seen.exit and seen.exit.signal) == (False, signal.SIGKILL)
    assert (await rig.driver().observe())["m1"] == seen
    assert (await rig.driver().start(spec(rig.runs()))).running


async def test_a_shim_killed_while_no_driver_looked(rig: ProcessRig) -> None:
    main, children = await family(rig)
    rig.close()
    os.kill(shim_of(rig), signal.SIGKILL)
    await until(lambda: not running(main), "the main process dies with its shim")
    seen = (await rig.driver().observe())["m1"]
    assert (seen.running, seen.exit and seen.exit.signal) == (False, signal.SIGKILL)
    assert not any(running(pid) for pid in children)


async def test_a_frozen_machine_and_shim_are_stopped(
    rig: ProcessRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_driver, "KILL_TIMEOUT_S", 0.3)
    main, children = await family(rig)
    for pid in (shim_of(rig), main):
        os.kill(pid, signal.SIGSTOP)
    status = await rig.driver().stop("m1", "SIGTERM", 0.1)
    assert status is not None
    assert (status.signal, status.requested) == (signal.SIGKILL, True)
    assert not any(running(pid) for pid in (main, *children))


async def test_stop_ends_an_exec_that_a_killed_flyd_left(rig: ProcessRig) -> None:
    await family(rig)
    driver = rig.driver()
    outputs = driver.exec("m1", rig.shell("echo $$; exec sleep 997"), 30.0)
    pid = int((await anext(outputs)).stdout)
    await driver.stop("m1", "SIGINT", 5.0)
    assert not running(pid)
    await collected(outputs)


async def test_a_reader_that_goes_away_ends_the_exec(rig: ProcessRig) -> None:
    await family(rig)
    driver = rig.driver()
    outputs = driver.exec("m1", rig.shell("echo $$; exec sleep 997"), 30.0)
    pid = int((await anext(outputs)).stdout)
    await outputs.aclose()  # type: ignore[attr-defined]
    await until(lambda: not running(pid), "the command is killed")


async def test_a_run_of_another_boot_has_ended(rig: ProcessRig) -> None:
    driver = rig.driver()
    await driver.create(spec(rig.runs()))
    await driver.start(spec(rig.runs()))
    main = (await driver.observe())["m1"].pid
    record = rig.root / "m1/run/pid.json"
    real = record.read_text()
    shim = shim_of(rig)
    os.kill(shim, signal.SIGKILL)
    await until(lambda: not running(main), "the machine is gone")
    rig.close()
    record.write_text(real.replace('"boot_id": "', '"boot_id": "before-'))
    record.write_text(record.read_text().replace(f'"shim": {shim}', f'"shim": {os.getpid()}'))
    (rig.root / "m1/run/exit.json").unlink(missing_ok=True)
    seen = (await rig.driver().observe())["m1"]
    assert (seen.running, seen.exit and seen.exit.signal) == (False, signal.SIGKILL)


# --------------------------------------------------------------------------- flyd is killed

CHILD = """
import asyncio, os, sys
from pathlib import Path
from flyd.drivers.process.driver import ProcessDriver
from flyd.store.system import SystemClock
from flyd.model import MachineSpec, decode

calls = 0
def counted(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(sys.argv[3]):
            os._exit(9)
        return function(*args, **kwargs)
    return call

async def main():
    spec = decode(sys.argv[2].encode(), MachineSpec)
    driver = ProcessDriver(Path(sys.argv[1]), SystemClock(), {"PATH": os.environ["PATH"]})
    for name in ("replace", "fsync", "unlink", "mkdir", "symlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    await driver.create(spec)
    print("created", flush=True)
    if sys.argv[4] == "start":
        await driver.start(spec)
        print("up", flush=True)
        await asyncio.sleep(1000)

asyncio.run(main())
"""


async def child(
    rig: ProcessRig, machine: MachineSpec, crash_at: int, verb: str
) -> asyncio.subprocess.Process:
    arguments = ("-c", CHILD, str(rig.root), encode(machine).decode(), str(crash_at), verb)
    return await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )


def machine_processes(rig: ProcessRig) -> list[int]:
    """All living processes whose environment says that they are m1's."""
    mark = f"FLYD_MACHINE_DIR={rig.root}/m1".encode()
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes().split(b"\0") and running(int(path.parent.name)):
                found.append(int(path.parent.name))
    return found


async def test_kill_9_of_flyd_leaves_machines_running(rig: ProcessRig) -> None:
    machine = spec(rig.shell("while :; do echo tick; sleep 0.05; done"))
    flyd = await child(rig, machine, 0, "start")
    assert flyd.stdout is not None
    assert await flyd.stdout.readline() == b"created\n"
    assert await flyd.stdout.readline() == b"up\n"
    before = MachineDirectory(rig.root / "m1").observe()
    os.killpg(flyd.pid, signal.SIGKILL)
    await flyd.wait()

    driver = rig.driver()
    assert before is not None
    assert before.running
    assert (await driver.observe())["m1"] == before
    assert await driver.start(machine) == before
    await first_lines(driver, "m1", 3, tail=0)  # it still writes, with nobody but its shim to read


async def test_flyd_killed_while_it_starts_a_machine(rig: ProcessRig) -> None:
    machine = spec(("sleep", "1000"))
    for delay_ms in range(0, 40, 8):
        flyd = await child(rig, machine, 0, "start")
        assert flyd.stdout is not None
        assert await flyd.stdout.readline() == b"created\n"
        await asyncio.sleep(delay_ms / 1000)
        flyd.kill()
        driver = rig.driver()
        started = await driver.start(machine)
        await flyd.wait()
        assert started.running
        assert machine_processes(rig) == [started.pid]
        assert await driver.stop("m1", "SIGTERM", 5.0) is not None
        assert machine_processes(rig) == []


async def test_a_cancelled_start_is_not_forgotten(rig: ProcessRig) -> None:
    driver = rig.driver()
    machine = spec(("sleep", "1000"))
    await driver.create(machine)
    for delay_ms in range(0, 40, 8):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_ms / 1000):
                await driver.start(machine)
        await driver.stop("m1", "SIGTERM", 5.0)
        assert machine_processes(rig) == []


@pytest.mark.parametrize("existed", [False, True])
async def test_create_goes_on_from_every_crash(rig: ProcessRig, tmp_path: Path, existed: bool) -> None:
    """The process is ended before each change of the file system in turn; then create works."""
    source, volume = tmp_path / "source", tmp_path / "volume"
    for directory in (source / "sub", volume):
        directory.mkdir(parents=True)
    (source / "sub/file").write_text("content")
    machine = spec(rig.runs(), source_path=str(source), mounts=((str(volume), "/data"),), instance_id="i2")
    earlier = spec(rig.runs(), instance_id="i1")
    crashes = 0
    while True:
        if existed:
            await rig.driver().create(earlier)
        flyd = await child(rig, machine, crashes + 1, "create")
        await flyd.communicate()
        code = flyd.returncode
        driver = rig.driver()
        seen = (await driver.observe()).get("m1")
        assert seen is None or seen.instance_id in ("i1", "i2")
        await driver.create(machine)
        assert (rig.root / "m1/work/sub/file").read_text() == "content"
        assert (rig.root / "m1/work/data").resolve() == volume
        assert not (rig.root / "m1/work.new").exists()
        await driver.destroy("m1")
        assert list(rig.root.iterdir()) == []
        if code == 0:
            break
        assert code == 9
        crashes += 1
    assert crashes > 10
