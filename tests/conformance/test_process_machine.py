"""What a machine of the process driver sees and leaves: directory, user, mounts, bounded logs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flyd.drivers.process import driver as process_driver
from flyd.errors import InvalidInput, NotFound
from tests.support.drivers import WAIT_S, ProcessRig, collected, first_lines, process_host, spec

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def rig() -> Iterator[ProcessRig]:
    with process_host() as host:
        yield host


# --------------------------------------------------------------------------- what a machine sees


async def test_environment_directory_and_private_copy(rig: ProcessRig, tmp_path: Path) -> None:
    (tmp_path / "app.txt").write_text("as released")
    (tmp_path / "run.sh").write_text(
        "#!/bin/sh\n[ -e kept ] || echo changed | tee app.txt > kept\nenv | sort\npwd\nexec sleep 1000\n"
    )
    (tmp_path / "run.sh").chmod(0o755)
    driver = rig.driver()
    machine = spec(("./run.sh",), source_path=str(tmp_path))
    await driver.create(machine)
    await driver.start(machine)
    work = str(rig.root / "m1/work")
    names = [
        "COLOUR=blue",
        "FLYD_HOST=rig",
        f"FLYD_MACHINE_DIR={rig.root}/m1",
        f"HOME={work}",
        "LANG=C.UTF-8",
    ]
    lines = [line.text for line in await first_lines(driver, "m1", 8)]
    assert lines == [*names, f"PATH={os.environ['PATH']}", f"PWD={work}", work]
    assert (tmp_path / "app.txt").read_text() == "as released"

    await driver.stop("m1", "SIGKILL", 1.0)
    await driver.start(machine)  # the same instance keeps its directory
    assert (rig.root / "m1/work/app.txt").read_text() == "changed\n"


async def test_a_command_that_may_not_be_run(rig: ProcessRig, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("text")
    driver = rig.driver()
    machine = spec(("./plain",), source_path=str(tmp_path))
    await driver.create(machine)
    seen = await driver.start(machine)
    async with asyncio.timeout(WAIT_S):
        await anext(driver.exits())
    seen = (await driver.observe())["m1"]
    assert seen.exit is not None
    assert seen.exit.code == 126
    (line,) = await first_lines(driver, "m1", 1)
    assert "cannot run './plain': Permission denied" in line.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
async def test_root_is_dropped_for_a_user(rig: ProcessRig, tmp_path: Path) -> None:
    volume = rig.root.parent / "volume"
    volume.mkdir(mode=0o700)
    driver = rig.driver()
    script = "id -un; echo mine > data/file && echo mine > file && echo written; exec sleep 1000"
    machine = spec(rig.shell(script), mounts=((str(volume), "/data"),), user="nobody")
    await driver.create(machine)
    await driver.start(machine)
    assert [line.text for line in await first_lines(driver, "m1", 2)] == ["nobody", "written"]
    assert (volume / "file").read_text() == "mine\n"
    assert await collected(driver.exec("m1", rig.shell("id -un; id -G | wc -w"), 10.0)) == (
        b"nobody\n1\n",
        b"",
        0,
    )
    with pytest.raises(InvalidInput, match="no user"):
        await driver.create(spec(rig.runs(), "m2", user="no-such-user"))


async def test_mounts_are_links_and_cannot_lead_out(rig: ProcessRig, tmp_path: Path) -> None:
    source, volume, outside = tmp_path / "source", tmp_path / "volume", tmp_path / "outside"
    for directory in (source / "var/data", volume, outside):
        directory.mkdir(parents=True)
    (source / "var/data/hidden").write_text("by the mount")
    (source / "out").symlink_to(outside)
    driver = rig.driver()
    await driver.create(spec(rig.runs(), source_path=str(source), mounts=((str(volume), "/var/data"),)))
    assert os.readlink(rig.root / "m1/work/var/data") == str(volume)
    assert (source / "var/data/hidden").exists()
    for path in ("/", "/../x", "/out/x"):
        with pytest.raises(InvalidInput):
            await driver.create(
                spec(rig.runs(), "m2", source_path=str(source), mounts=((str(volume), path),))
            )
    with pytest.raises(NotFound, match="no volume"):
        await driver.create(spec(rig.runs(), "m2", mounts=((str(tmp_path / "none"), "/data"),)))
    await driver.destroy("m1")
    assert volume.exists()


async def test_bad_machines_are_refused(rig: ProcessRig) -> None:
    driver = rig.driver()
    with pytest.raises(InvalidInput, match="no machine id"):
        await driver.destroy("../m1")
    with pytest.raises(InvalidInput, match="no command"):
        await driver.create(spec(()))
    with pytest.raises(InvalidInput, match="NUL"):
        await driver.create(spec(("a\0b",)))
    with pytest.raises(NotFound, match="source tree"):
        await driver.create(spec(rig.runs(), source_path="/no/such/tree"))


# --------------------------------------------------------------------------- logs are bounded


async def test_logs_rotate_and_are_followed_across(rig: ProcessRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_driver, "LOG_MAX_BYTES", 20_000)
    driver = rig.driver()
    paced = "for i in $(seq 1500); do echo line $i; [ $((i % 100)) = 0 ] && sleep 0.05; done; exec sleep 1000"
    machine = spec(rig.shell(paced))
    await driver.create(machine)
    following = asyncio.gather(first_lines(driver, "m1", 1500, tail=0))
    await asyncio.sleep(0)
    await driver.start(machine)
    ((*lines,),) = await following
    assert [line.text for line in lines] == [f"line {n}" for n in range(1, 1501)]
    sizes = [path.stat().st_size for path in sorted((rig.root / "m1/log").glob("output.log*"))]
    assert len(sizes) == 2
    assert all(size <= 20_000 for size in sizes)
    recent = [line.text async for line in driver.logs("m1", tail=600, follow=False)]
    assert recent == [f"line {n}" for n in range(901, 1501)]


async def test_long_broken_and_unended_lines(rig: ProcessRig) -> None:
    driver = rig.driver()
    machine = spec(rig.shell(r"head -c 40000 /dev/zero | tr '\0' x; echo; printf '\377\n\n'; printf end"))
    await driver.create(machine)
    await driver.start(machine)
    async with asyncio.timeout(WAIT_S):
        await anext(driver.exits())
    texts = [line.text async for line in driver.logs("m1", tail=100, follow=False)]
    assert texts[-3:] == ["\ufffd", "", "end"]
    assert "".join(texts[:-3]) == "x" * 40000
