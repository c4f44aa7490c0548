"""Each operation × a crash of flyd after each of its effects, on real drivers and real SQLite.

Whatever flyd had done last, the next one brings the machine to what is wanted, begins no run twice
and leaves nothing behind. The same with fakes, faster and with operations that fail:
tests/unit/machines/test_host_crash.py.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest

from flyd.drivers.docker.driver import DockerDriver
from flyd.drivers.process.driver import ProcessDriver
from flyd.errors import Unavailable
from flyd.machines import operations
from flyd.machines.operations import Facts, Task
from flyd.ports import Driver
from flyd.store.system import SystemClock
from tests.support.crash_matrix import (
    CREATE,
    DESTROY,
    LANES,
    RESTART,
    START,
    STOP,
    UPDATE,
    Hardware,
    OneMachine,
    point,
    points_of,
)
from tests.support.drivers import BASE_IMAGE, running
from tests.support.engine import DockerRig, docker_host

MEMORY = Path("/dev/shm")
MINE = f"matrix{os.getpid()}"  # names of containers are the whole engine's
READY_S = 60.0
AT_ONCE = 6  # machines that are put through a point side by side

pytestmark = pytest.mark.timeout(600)  # of a machine with other work; alone it takes a tenth


class Processes:
    """The process driver; each machine has a host, that is a folder, of its own."""

    name, image, command = "process", "host:", ("sleep", "1000")
    every_effect = True

    def __init__(self, top: Path) -> None:
        self._top = top / "hosts"

    def driver(self, machine_id: str) -> Driver:
        environment = {"PATH": os.environ["PATH"], "FLYD_HOST": "matrix"}
        return ProcessDriver(self._top / machine_id, SystemClock(), environment)

    def close(self, driver: Driver) -> None:
        assert isinstance(driver, ProcessDriver)
        driver.close()

    def left(self, machine_id: str) -> list[str]:
        directory = self._top / machine_id / machine_id
        mark = f"FLYD_MACHINE_DIR={directory}".encode()
        return [machine_id] if directory.exists() else [f"process {pid}" for pid in _with_mark(mark)]


def _with_mark(mark: bytes) -> list[str]:
    found: list[str] = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found += [entry.name] if running(int(entry.name)) else []
        except OSError:
            continue
    return found


class Containers:
    """The Docker driver on this machine's engine; each flyd has a driver of its own."""

    name, image, command = "docker", BASE_IMAGE, ("sleep", "1000")
    every_effect = False

    def __init__(self, rig: DockerRig, top: Path) -> None:
        self._rig = rig
        self._state_dir = top / "docker"

    def driver(self, machine_id: str) -> Driver:
        return DockerDriver(self._rig.network, self._state_dir, SystemClock(), {"FLYD_HOST": "matrix"})

    def close(self, driver: Driver) -> None:
        assert isinstance(driver, DockerDriver)
        driver.close()

    def left(self, machine_id: str) -> list[str]:
        filters = {"label": f"flyd.machine={machine_id}"}
        return [machine_id for _ in self._rig.client.containers(all=True, filters=filters)]


@contextmanager
def _folder() -> Generator[Path]:
    # In memory where there is a place for it: flyd dies here, not the host, so no test needs a slow disk.
    top = Path(tempfile.mkdtemp(prefix="flyd-matrix-", dir=MEMORY if MEMORY.is_dir() else None))
    top.chmod(0o755)
    try:
        yield top
    finally:
        shutil.rmtree(top)


@contextmanager
def _processes() -> Generator[tuple[Hardware, Path]]:
    with _folder() as top:
        yield Processes(top), top


@contextmanager
def _containers() -> Generator[tuple[Hardware, Path]]:
    with docker_host() as rig, _folder() as top:
        yield Containers(rig, top), top


KINDS = {"docker": _containers, "process": _processes}


@pytest.fixture(params=sorted(KINDS))
def host(request: pytest.FixtureRequest) -> Generator[tuple[Hardware, Path]]:
    with KINDS[request.param]() as made:
        yield made


async def test_every_operation_survives_a_crash_after_every_effect(
    host: tuple[Hardware, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    hardware, top = host
    began = time.monotonic()
    await _made_ready(hardware)
    room = asyncio.Semaphore(AT_ONCE)
    numbers = count(1)

    def maker(with_volume: bool) -> Callable[[], OneMachine]:
        def make() -> OneMachine:
            name = f"{MINE}n{next(numbers)}"
            return OneMachine(hardware, top / name, name, with_volume)

        return make

    async with asyncio.TaskGroup() as group:
        lanes = {
            with_volume: [
                group.create_task(points_of(maker(with_volume), prepare, disturbed, room))
                for prepare, disturbed in LANES
            ]
            for with_volume in (False, True)
        }
    points = {
        name + (" with volume" if with_volume else ""): number
        for with_volume, walked in lanes.items()
        for lane in walked
        for name, number in lane.result().items()
    }
    with capsys.disabled():
        print(f"\ncrash matrix, {hardware.name}: {len(points)} operations, {sum(points.values())} points "
              f"in {time.monotonic() - began:.1f} s: {points}")  # fmt: skip
    assert min(points.values()) > 4, points


async def test_every_step_done_twice_gives_the_same(
    host: tuple[Hardware, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hardware, top = host
    done: list[str] = []

    def twice(name: str, act: Callable[[Task], Awaitable[Facts]]) -> Callable[[Task], Awaitable[Facts]]:
        async def acted(task: Task) -> Facts:
            first = await act(task)
            second = await act(task)
            assert second == first, f"step {name}: {first}, then {second}"
            done.append(name)
            return second

        return acted

    for name, act in operations.DO.items():
        monkeypatch.setitem(operations.DO, name, twice(name, act))
    machine = OneMachine(hardware, top / MINE, MINE, with_volume=True)
    for operation in (CREATE, START, RESTART, UPDATE, STOP, START, DESTROY):
        await point(machine, operation, None)
    assert set(done) == set(operations.DO)


async def _made_ready(hardware: Hardware) -> None:
    """What a host has before its first machine, the engine's network for one."""
    driver = hardware.driver("none")
    async with asyncio.timeout(READY_S):
        while True:
            try:
                await driver.observe()
                break
            except Unavailable:
                continue  # it has waited; others keep the engine busy
    hardware.close(driver)


def test_the_matrix_has_every_operation() -> None:
    named = {operation.name for _, disturbed in LANES for operation in disturbed}
    assert named == set(operations.OPERATIONS) - {"recycle"}  # it ends like a stop: test_host_crash.py
