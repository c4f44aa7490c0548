"""What the Docker driver promises beyond the port: limits, addresses, adoption, and errors that say why."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from flyd.drivers.docker.driver import DockerDriver
from flyd.errors import Conflict, InvalidInput, NotFound, Unavailable
from flyd.model import Guest, MachineSpec
from flyd.network.addresses import address6
from flyd.store.system import SystemClock
from tests.support.drivers import WAIT_S, collected, first_lines, running, spec, until
from tests.support.engine import DockerRig, Wire, docker_host

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def rig() -> Iterator[DockerRig]:
    with docker_host() as host:
        yield host


def with_(machine: MachineSpec, **changes: object) -> MachineSpec:
    return msgspec.structs.replace(machine, **changes)


async def started(driver: DockerDriver, machine: MachineSpec) -> None:
    await driver.create(machine)
    await driver.start(machine)


async def printed(driver: DockerDriver, script: str, machine_id: str = "m1") -> str:
    stdout, stderr, code = await collected(driver.exec(machine_id, ("sh", "-c", script), WAIT_S))
    assert code == 0, stderr
    return stdout.decode().strip()


async def ended(driver: DockerDriver) -> None:
    async with asyncio.timeout(WAIT_S):
        await anext(driver.exits())


# --------------------------------------------------------------------------- what a machine is given


async def test_address_names_and_environment(rig: DockerRig) -> None:
    driver = rig.driver()
    address = f"{rig.network.subnet}.3.7"
    await started(driver, with_(spec(rig.runs()), private_ip=address))
    assert (await printed(driver, "hostname -i")).split() == [address6(address), address]
    assert await printed(driver, "getent ahostsv4 fly-local-6pn | head -n 1 | cut -d' ' -f1") == address
    assert await printed(driver, "echo $(hostname) $COLOUR $FLYD_HOST") == "m1 blue rig"
    inspected = rig.client.inspect_container("flyd-m1")
    assert inspected["HostConfig"]["Dns"] == [rig.network.gateway]
    assert Path(f"/sys/class/net/{rig.network.bridge}").exists()


async def test_limits(rig: DockerRig) -> None:
    driver = rig.driver()
    guest = Guest(cpus=2, memory_mb=64, cpu_kind="performance")
    await started(driver, with_(spec(rig.runs()), guest=guest))
    config = rig.client.inspect_container("flyd-m1")["HostConfig"]
    assert (config["Memory"], config["MemorySwap"]) == (64 << 20, 64 << 20)
    assert (config["NanoCpus"], config["RestartPolicy"]["Name"]) == (2_000_000_000, "no")


async def test_out_of_memory_is_said(rig: DockerRig) -> None:
    driver = rig.driver()
    hungry = with_(spec(rig.shell("head -c 300m /dev/zero | tail")), guest=Guest(memory_mb=32))
    await started(driver, hungry)
    await ended(driver)
    status = (await driver.observe())["m1"].exit
    assert status is not None
    assert (status.oom_killed, status.signal, status.requested) == (True, signal.SIGKILL, False)


async def test_mounts_are_the_hosts_own_directories(rig: DockerRig, tmp_path: Path) -> None:
    driver = rig.driver()
    machine = spec(rig.shell("echo kept > /data/file; exec sleep 1000"), mounts=((str(tmp_path), "/data"),))
    await started(driver, machine)
    await until(lambda: (tmp_path / "file").exists(), "the machine has written to its mount")
    await driver.destroy("m1")
    assert (tmp_path / "file").read_text() == "kept\n"


async def test_an_empty_command_is_the_images_own(rig: DockerRig) -> None:
    driver = rig.driver()
    await started(driver, spec(()))  # the base image's own is bash, which ends without a terminal
    await ended(driver)
    status = (await driver.observe())["m1"].exit
    assert status is not None
    assert status.code == 0


async def test_an_image_by_digest(rig: DockerRig) -> None:
    driver = rig.driver()
    digest = rig.client.inspect_image("flyd-base:bookworm")["Id"]
    await started(driver, with_(spec(rig.runs()), image=f"image:{digest}"))
    assert rig.client.inspect_container("flyd-m1")["Image"] == digest


async def test_a_changed_spec_takes_effect_at_the_next_start(rig: DockerRig) -> None:
    driver = rig.driver()
    machine = spec(rig.runs())
    await started(driver, machine)
    changed = with_(machine, env={"COLOUR": "red"})
    await driver.start(changed)
    assert await printed(driver, "echo $COLOUR") == "blue"
    await driver.stop("m1", "SIGTERM", 5.0)
    await driver.start(changed)
    assert await printed(driver, "echo $COLOUR") == "red"


async def test_a_log_is_read_on_over_a_stop(rig: DockerRig) -> None:
    driver = rig.driver()
    machine = spec(rig.shell("echo out; echo err >&2; exec sleep 1000"))
    await started(driver, machine)
    assert sorted(line.text for line in await first_lines(driver, "m1", 2)) == ["err", "out"]
    following = asyncio.gather(first_lines(driver, "m1", 2, tail=0))
    await driver.stop("m1", "SIGTERM", 5.0)
    await driver.start(machine)
    (lines,) = await following
    assert sorted(line.text for line in lines) == ["err", "out"]


# --------------------------------------------------------------------------- whose containers


async def test_a_flyd_without_its_database_finds_its_own_and_only_those(rig: DockerRig) -> None:
    driver = rig.driver()
    await started(driver, spec(rig.runs()))
    config = {"Image": "flyd-base:bookworm", "Cmd": ["sleep", "1000"]}
    name = f"flyd-other-{rig.network.host_name}"
    foreign = rig.client.create_container_from_config(config, name)["Id"]
    try:
        rig.client.start(foreign)
        rig.close()
        for path in rig.state_dir.iterdir():
            path.unlink()
        other = f"other-{rig.network.host_name}"
        driver = rig.driver()
        assert sorted(await driver.observe()) == ["m1"]
        assert await driver.stop(other, "SIGKILL", 0.0) is None
        await driver.destroy(other)
        with pytest.raises(Conflict, match="already in use"):
            await driver.create(spec(rig.runs(), other))
        assert rig.client.inspect_container(foreign)["State"]["Running"]
    finally:
        rig.client.remove_container(foreign, force=True)


async def test_ends_while_flyd_was_away_are_seen(rig: DockerRig) -> None:
    driver = rig.driver()
    await started(driver, spec(rig.runs()))
    await started(driver, spec(rig.runs(), "m2"))
    rig.close()
    rig.client.kill("flyd-m1", "SIGTERM")
    rig.client.wait("flyd-m1")
    driver = rig.driver()
    seen = await driver.observe()
    assert [(m, seen[m].running) for m in sorted(seen)] == [("m1", False), ("m2", True)]
    status = seen["m1"].exit
    assert status is not None
    assert (status.signal, status.requested) == (signal.SIGTERM, False)


async def test_what_somebody_else_starts_is_watched_too(rig: DockerRig) -> None:
    driver = rig.driver()
    await started(driver, spec(rig.runs()))
    exits = driver.exits()
    for _ in range(2):
        rig.client.kill("flyd-m1", "SIGKILL")
        async with asyncio.timeout(WAIT_S):
            assert await anext(exits) == "m1"
        rig.client.start("flyd-m1")
        assert (await driver.observe())["m1"].running


async def test_a_command_leaves_nothing_when_its_reader_goes(rig: DockerRig) -> None:
    driver = rig.driver()
    await started(driver, spec(rig.runs()))
    outputs = driver.exec("m1", ("sh", "-c", "sleep 999 & echo begun; wait"), WAIT_S)
    assert (await anext(outputs)).stdout == b"begun\n"
    pids = [
        int(process[1])
        for process in rig.client.top("flyd-m1")["Processes"]
        if process[-1].startswith(("sleep 999", "sh -c sleep 999"))
    ]
    assert len(pids) == 2
    await outputs.aclose()  # type: ignore[attr-defined]
    await until(lambda: not any(running(pid) for pid in pids), "the command and its child are gone")
    assert (await driver.observe())["m1"].running


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"image": "nobody-has:this"}, NotFound, "No such image: nobody-has:this"),
        ({"image": "source:sha256:ab"}, InvalidInput, "no container image"),
        ({"mounts": (("/nowhere/at/all", "/data"),)}, NotFound, "/nowhere/at/all"),
        ({"guest": Guest(memory_mb=1)}, InvalidInput, "memory"),
        ({"env": {"A": "b\0c"}}, InvalidInput, "NUL"),
    ],
)
async def test_what_can_not_be_made(
    rig: DockerRig, changes: dict[str, object], kind: type[Exception], words: str
) -> None:
    driver = rig.driver()
    with pytest.raises(kind, match=words):
        await driver.create(with_(spec(rig.runs()), **changes))
    assert rig.containers() == []


async def test_what_can_not_be_started(rig: DockerRig) -> None:
    driver = rig.driver()
    nobody = spec(rig.runs(), user="no-such-user")
    await driver.create(nobody)
    with pytest.raises(InvalidInput, match="no-such-user"):
        await driver.start(nobody)
    address = f"{rig.network.subnet}.0.9"
    await started(driver, with_(spec(rig.runs(), "m2"), private_ip=address))
    taken = with_(spec(rig.runs(), "m3"), private_ip=address)
    await driver.create(taken)
    with pytest.raises(Conflict, match="Address already in use"):
        await driver.start(taken)
    await driver.destroy("m2")
    assert (await driver.start(taken)).running


async def test_an_engine_that_is_not_there(tmp_path: Path, rig: DockerRig) -> None:
    nowhere = f"unix://{tmp_path}/docker.sock"
    driver = DockerDriver(rig.network, tmp_path / "state", SystemClock(), {}, url=nowhere)
    try:
        with pytest.raises(Unavailable, match=f"Docker engine of host {rig.network.host_name}") as raised:
            await driver.observe()
        assert "docker" in raised.value.hint
    finally:
        driver.close()


async def test_an_end_while_the_engine_was_out_of_reach_is_told_later(rig: DockerRig, tmp_path: Path) -> None:
    wire = Wire(tmp_path / "docker.sock")
    await wire.join()
    driver = rig.driver(wire.url)
    for name in ("m1", "m2"):
        await started(driver, spec(rig.runs(), name))
    following = asyncio.gather(first_lines(driver, "m2", 2))
    exits = driver.exits()
    await wire.cut()
    with pytest.raises(Unavailable, match="does not answer"):
        await driver.observe()
    rig.client.kill("flyd-m1", "SIGKILL")
    rig.client.wait("flyd-m1")
    await wire.join()
    async with asyncio.timeout(WAIT_S):
        assert await anext(exits) == "m1"
    seen = await driver.observe()
    assert [seen[name].running for name in ("m1", "m2")] == [False, True]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await anext(exits)
    with pytest.raises(Unavailable):
        await following
    await wire.cut()


async def test_a_network_of_another_subnet_is_not_used(rig: DockerRig, tmp_path: Path) -> None:
    await rig.driver().observe()
    moved = msgspec.structs.replace(rig.network, subnet="10.63", gateway="10.63.0.1")
    driver = DockerDriver(moved, tmp_path / "state", SystemClock(), {})
    try:
        with pytest.raises(Conflict, match=r"was given 10\.63\.0\.0/16"):
            await driver.observe()
    finally:
        driver.close()
