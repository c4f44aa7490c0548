"""What flyd adds to Docker: a machine through the driver against the same by `docker`, in pairs.

    python bench/docker_driver.py

Each pair makes and starts a container of flyd-base:bookworm (scripts/base-image.sh) with `docker run -d`
and with the driver's create and start, in turns; then the same for a stopped one with `docker start`.
Exit code 1 if the median overhead is over 120 ms for create and start, or over 60 ms for a start.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import support
from flyd.drivers.docker.driver import DockerDriver
from flyd.drivers.docker.spec import HostNetwork
from flyd.model import MachineSpec
from flyd.store.system import SystemClock

PAIRS = 20
MAX_CREATE_MS = 120.0
MAX_START_MS = 60.0
IMAGE = "flyd-base:bookworm"
COMMAND = ("sleep", "1000")
NETWORK = HostNetwork(host_name=f"bench-{os.getpid()}", subnet="10.62", gateway="10.62.0.1")


def docker(*arguments: str) -> None:
    subprocess.run(["docker", *arguments], check=True, stdout=subprocess.DEVNULL)


async def milliseconds(act: Callable[[], Awaitable[object]]) -> float:
    began_s = time.monotonic()
    await act()
    return (time.monotonic() - began_s) * 1000


async def by_docker(*arguments: str) -> float:
    return await milliseconds(lambda: asyncio.to_thread(docker, *arguments))


def machine(number: int) -> MachineSpec:
    return MachineSpec(
        machine_id=f"b{number}",
        app="bench",
        instance_id="i1",
        command=COMMAND,
        env={},
        private_ip=f"{NETWORK.subnet}.1.{number + 1}",
        image=IMAGE,
    )


async def measure(driver: DockerDriver) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {"docker run": [], "create": [], "docker start": [], "start": []}
    for number in range(-1, PAIRS):  # the first pair warms up
        spec = machine(number + 1)
        plain = f"{NETWORK.name}-plain-{number + 1}"

        async def create_and_start(spec: MachineSpec = spec) -> None:
            await driver.create(spec)
            await driver.start(spec)

        async def start(spec: MachineSpec = spec) -> None:
            await driver.start(spec)

        try:
            pair = {
                "docker run": await by_docker("run", "-d", "--name", plain, IMAGE, *COMMAND),
                "create": await milliseconds(create_and_start),
            }
            await asyncio.to_thread(docker, "kill", plain)
            await driver.stop(spec.machine_id, "SIGKILL", 5.0)
            pair["docker start"] = await by_docker("start", plain)
            pair["start"] = await milliseconds(start)
        finally:
            await asyncio.to_thread(docker, "rm", "-f", plain)
            await driver.destroy(spec.machine_id)
        if number >= 0:
            for name, value in pair.items():
                taken[name].append(value)
    return taken


def overhead_ms(with_flyd: Sequence[float], plain: Sequence[float]) -> float:
    return statistics.median(ours - theirs for ours, theirs in zip(with_flyd, plain, strict=True))


async def run() -> dict[str, list[float]]:
    state_dir = tempfile.mkdtemp(prefix="flyd-bench-")
    driver = DockerDriver(NETWORK, Path(state_dir), SystemClock(), {})
    try:
        return await measure(driver)
    finally:
        driver.close()
        docker("network", "rm", NETWORK.name)
        shutil.rmtree(state_dir)


def main() -> int:
    subprocess.run([str(support.ROOT / "scripts" / "base-image.sh")], check=True)
    taken = asyncio.run(run())
    print(f"{PAIRS} pairs; milliseconds.\n")
    print(f"{'':<28}{'MEDIAN':>8}{'MIN':>8}{'MAX':>8}")
    names = {
        "docker run": "docker run -d",
        "create": "driver: create and start",
        "docker start": "docker start",
        "start": "driver: start",
    }
    for key, name in names.items():
        values = taken[key]
        print(f"{name:<28}{statistics.median(values):>8.0f}{min(values):>8.0f}{max(values):>8.0f}")
    create_ms = overhead_ms(taken["create"], taken["docker run"])
    start_ms = overhead_ms(taken["start"], taken["docker start"])
    print(f"\nmedian overhead: create and start {create_ms:.0f} ms, start {start_ms:.0f} ms\n")
    figures = {f"{key.replace(' ', '_')}_ms": round(statistics.median(v), 1) for key, v in taken.items()}
    figures |= {"create_overhead_ms": round(create_ms, 1), "start_overhead_ms": round(start_ms, 1)}
    support.report(
        "docker_driver", figures, pairs=PAIRS, max_create_ms=MAX_CREATE_MS, max_start_ms=MAX_START_MS
    )
    return 1 if create_ms > MAX_CREATE_MS or start_ms > MAX_START_MS else 0


if __name__ == "__main__":
    sys.exit(main())
