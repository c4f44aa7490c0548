"""kill -9, and a full disk, before every change of the disk, on both back ends; and disks really full.

A child process lives through every operation and kills itself before the n-th change. A new store over
the same disk must then find each thing whole or absent, and the same life must end as if nothing had
happened.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

import volumes.btrfs
import volumes.directory
from flyd.errors import Unavailable
from tests.support.volume_pools import btrfs_pool
from volumes.btrfs import BtrfsTrees, BtrfsVolumes
from volumes.directory import DirectoryVolumes
from volumes.files import run
from volumes.folders import Folders
from volumes.pool import why_none
from volumes.store import VolumeStore

MIN_POINTS = {"btrfs": 60, "directory": 60}
CHANGES = ("replace", "fsync", "mkdir", "rmdir", "unlink")
TOOLS = (volumes.btrfs, volumes.directory)
MEMORY = Path("/dev/shm")  # nothing here cuts the power: no need to wait for a disk
KEPT = b"kept" * 1000


SLOWLY = ["directory", pytest.param("btrfs", marks=pytest.mark.soak)]  # a change of a pool takes its time


@pytest.fixture(params=["btrfs", "directory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[tuple[str, Path]]:
    if request.param == "directory":
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.exists() else None) as folder:
            yield "directory", Path(folder)
        return
    with btrfs_pool(tmp_path, size_gb=1) as at:
        yield "btrfs", at


def opened(kind: str, root: Path) -> VolumeStore:
    return (BtrfsVolumes if kind == "btrfs" else DirectoryVolumes)(root)


async def live(store: VolumeStore) -> None:
    """Every operation; can be lived again from any point of it."""
    await store.create("vol1", 1)
    data = Path(await store.attach("vol1", "m1", 1))
    with open(data / "file", "wb") as file:
        file.write(KEPT)
        file.flush()
        os.fsync(file.fileno())
    await store.extend("vol1", 2)
    await store.snapshot("vol1", "s1", 1.0)
    await store.fork("vol1", "vol2", 1, "s1")
    await store.detach("vol1", "m1", 1)
    await store.fork("vol1", "vol3", 2)
    await store.destroy("vol3", 5.0)
    await store.undestroy("vol3")
    await store.destroy("vol3", 6.0)
    await store.purge(6.0)
    await store.delete_snapshot("vol1", "s1")


def check_whole(root: Path) -> None:
    """Nothing half made is seen under a name, and nothing is lost that was told to be there."""
    store = DirectoryVolumes(root)  # reads the same records
    for held in asyncio.run(store.held()):
        data = root / held.id / "data"
        assert data.is_dir()
        if held.record.size_gb == 2 or held.record.origin:
            assert (data / "file").read_bytes() == KEPT, held
        for snapshot in asyncio.run(store.snapshots(held.id)):
            assert (root / held.id / "snapshots" / snapshot.id / "data" / "file").read_bytes() == KEPT


def check_ended(root: Path) -> None:
    held = asyncio.run(DirectoryVolumes(root).held())
    found = [(h.id, h.record.size_gb, h.record.origin, h.record.attached) for h in held]
    assert found == [("vol1", 2, "", False), ("vol2", 1, "vol1@s1", False)]
    assert sorted(os.listdir(root)) == ["vol1", "vol2"]
    assert os.listdir(root / "vol1" / "snapshots") == []


class Fault:
    """Does `act` before the n-th change of the disk; counts them."""

    def __init__(self, at: int, act: Callable[[], None]) -> None:
        self.at, self.act, self.count = at, act, 0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in CHANGES:
            patch.setattr(os, name, self._before(getattr(os, name)))
        for module in TOOLS:
            patch.setattr(module, "run", self._before(module.run))

    def _before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                self.act()
            return function(*args, **kwargs)

        return call


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def disk_is_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def clear(kind: str, root: Path) -> None:
    if kind == "btrfs":
        folders = Folders(root, BtrfsTrees())
        for name in os.listdir(root):
            folders.clear(root / name)


def points_of(kind: str, root: Path) -> int:
    """How many changes a whole life makes."""
    fault = Fault(0, kill)
    with pytest.MonkeyPatch.context() as patch:
        fault.install(patch)
        asyncio.run(live(opened(kind, root)))
    check_ended(root)
    clear(kind, root)
    return fault.count


def live_in_child(kind: str, root: Path, point: int) -> int:
    """How a process ended that was to die before a change: its wait status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            Fault(point, kill).install(pytest.MonkeyPatch())
            asyncio.run(live(opened(kind, root)))
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


@pytest.mark.parametrize("place", SLOWLY, indirect=True)
def test_killed_before_every_change(place: tuple[str, Path]) -> None:
    kind, top = place
    total = points_of(kind, top / "whole")
    assert total >= MIN_POINTS[kind]
    for point in range(1, total + 1):
        root = top / str(point)
        assert os.WTERMSIG(live_in_child(kind, root, point)) == signal.SIGKILL
        check_whole(root)
        again = opened(kind, root)
        asyncio.run(again.tidy())
        left = [path.name for path in (*root.glob(".*"), *root.glob("*/snapshots/.*"))]
        assert left == [], f"point {point}"
        check_whole(root)
        asyncio.run(live(again))
        check_ended(root)
        clear(kind, root)
    print(f"{kind}: killed at {total} points")


@pytest.mark.parametrize("place", SLOWLY, indirect=True)
def test_a_full_disk_before_every_change(place: tuple[str, Path]) -> None:
    kind, top = place
    total = points_of(kind, top / "whole")
    for point in range(1, total + 1):
        root = top / str(point)
        store = opened(kind, root)
        with pytest.MonkeyPatch.context() as patch:
            Fault(point, disk_is_full).install(patch)
            try:
                asyncio.run(live(store))
            except Unavailable as error:
                assert "No space left on device" in error.message  # noqa: PT017
            except OSError as error:
                assert error.filename is None  # noqa: PT017 - the application's own fsync
        check_whole(root)
        asyncio.run(live(store))
        check_ended(root)
        clear(kind, root)


@pytest.fixture(params=["btrfs", "directory"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[tuple[str, Path]]:
    if reason := why_none():
        pytest.skip(f"no disk of its own: {reason}")
    if request.param == "btrfs":
        with btrfs_pool(tmp_path, size_gb=1) as at:
            yield "btrfs", at / "volumes"
        return
    at = tmp_path / "tmpfs"
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", at], check=True)
    try:
        yield "directory", at / "volumes"
    finally:
        subprocess.run(["umount", at], check=True)


def fill(data: Path) -> None:
    """Write until the disk takes no more, in smaller and smaller pieces."""
    with open(data / "fat", "ab", buffering=0) as file:
        for piece in (1 << 20, 4096):
            try:
                while True:
                    file.write(bytes(piece))
                    os.fsync(file.fileno())
            except OSError as error:
                assert error.errno in (errno.ENOSPC, errno.EDQUOT)  # noqa: PT017


@pytest.mark.parametrize("small_disk", SLOWLY, indirect=True)
async def test_a_disk_that_is_really_full(small_disk: tuple[str, Path]) -> None:
    kind, root = small_disk
    store = opened(kind, root)
    await store.create("vol1", 1)
    await store.create("other", 64)
    data = Path(await store.attach("vol1", "m1", 1))
    (data / "file").write_bytes(KEPT)
    await store.detach("vol1", "m1", 1)
    fill(root / "other" / "data")
    refused = 0
    for number in range(3):
        for operation in (
            store.create(f"new{number}", 1),
            store.extend("vol1", 2 + number),
            store.snapshot("other", f"s{number}", 1.0),
            store.fork("other", f"fork{number}", 64),
            store.attach("vol1", "m1", 2 + number),
        ):
            try:
                await operation
            except Unavailable:
                refused += 1
    if kind == "directory":
        assert refused > 0  # btrfs keeps room for its own books: it may take all of these
    assert [p.name for p in root.glob(".*")] == []
    assert (data / "file").read_bytes() == KEPT
    if kind == "directory":  # nothing is kept free for records: somebody must make room
        (root / "other" / "data" / "fat").unlink()
    await store.destroy("other", 1.0)  # btrfs: a volume can be given up while all is full
    assert await store.purge(1.0) == ("other",)
    if kind == "btrfs":  # the kernel gives the room back in its own time
        run("btrfs", "filesystem", "sync", str(root))
        run("btrfs", "subvolume", "sync", str(root))
    await store.create("later", 1)
    await store.snapshot("vol1", "later", 1.0)
    await store.fork("vol1", "copy", 9, "later")
    assert (Path(await store.attach("copy", "m2", 1)) / "file").read_bytes() == KEPT
