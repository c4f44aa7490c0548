"""Disks of hosts in containers: of their size, sparse, there again after a reboot, gone when released."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flyd.cluster import disks

MB = 1 << 20
LET_GO_S = 10.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Path]:
    """A cluster's folder with one host's in it; nothing stays mounted."""
    if reason := disks.why_none():
        pytest.skip(reason)
    (tmp_path / "ams-1").mkdir()
    yield tmp_path
    disks.release(tmp_path)


def in_use(file: Path) -> int:
    return file.stat().st_blocks * 512


def loops(file: Path) -> str:
    command = ("losetup", "--noheadings", "--associated", str(file))
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def wait_let_go(file: Path) -> None:
    """Return once no device is made of the file; the kernel takes a moment after the unmounting."""
    give_up_at = time.monotonic() + LET_GO_S
    while left := loops(file):
        assert time.monotonic() < give_up_at, left
        time.sleep(0.02)


def test_a_disk_is_full_before_the_machines(cluster: Path) -> None:
    host = cluster / "ams-1"
    at = disks.make(host, 1)
    free_before = os.statvfs(cluster).f_bavail * os.statvfs(cluster).f_frsize
    assert in_use(disks.image(host)) < 64 * MB
    with (at / "filler").open("wb") as file, pytest.raises(OSError) as raised:
        os.posix_fallocate(file.fileno(), 0, 1100 * MB)
    assert raised.value.errno == errno.ENOSPC
    (at / "filler").unlink()
    with (at / "half").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 500 * MB)
    free_after = os.statvfs(cluster).f_bavail * os.statvfs(cluster).f_frsize
    assert free_before - free_after < 300 * MB  # the machine's own disk takes only what is written
    assert os.statvfs(at).f_bavail * os.statvfs(at).f_frsize < 500 * MB


def test_what_is_deleted_is_given_back(cluster: Path) -> None:
    host = cluster / "ams-1"
    at = disks.make(host, 1)
    (at / "data").write_bytes(os.urandom(64 * MB))
    os.sync()
    assert in_use(disks.image(host)) > 64 * MB
    (at / "data").unlink()
    os.sync()
    assert in_use(disks.image(host)) < 64 * MB


def test_it_is_there_again_after_a_reboot(cluster: Path) -> None:
    host = cluster / "ams-1"
    at = disks.make(host, 1)
    (at / "kept").write_text("yes")
    assert disks.mount(host) == at  # once is enough
    subprocess.run(["umount", str(at)], check=True)  # what a reboot leaves
    wait_let_go(disks.image(host))
    assert (disks.mount(host) / "kept").read_text() == "yes"


def test_release_leaves_nothing_whatever_state_it_finds(cluster: Path) -> None:
    for name in ("iad-1", "sin-1", "fra-1"):
        (cluster / name).mkdir()
        disks.make(cluster / name, 1)
    subprocess.run(["umount", str(disks.mount_point(cluster / "iad-1"))], check=True)
    subprocess.run(["umount", str(disks.mount_point(cluster / "sin-1"))], check=True)
    subprocess.run(["losetup", "--find", str(disks.image(cluster / "sin-1"))], check=True)
    for _ in range(2):
        disks.release(cluster)
        for name in ("iad-1", "sin-1", "fra-1"):
            assert not disks.mount_point(cluster / name).is_mount()
            wait_let_go(disks.image(cluster / name))


def test_losetups_list() -> None:
    assert disks.loop_devices("/dev/loop3\n/dev/loop7 \n\n") == ["/dev/loop3", "/dev/loop7"]
    assert disks.loop_devices("") == []
