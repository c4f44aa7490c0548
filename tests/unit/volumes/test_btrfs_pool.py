"""A real btrfs pool: what it refuses to be made on, that its limits hold, and what only btrfs can do."""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from pathlib import Path

import pytest

import volumes.pool
from flyd.errors import InvalidInput, Refused, Unavailable
from tests.support.volume_pools import btrfs_pool
from volumes.btrfs import ALL, BtrfsTrees, BtrfsVolumes, referenced_bytes
from volumes.files import run
from volumes.pool import capacity_gb, close_pool, is_mounted, mounted_kind, open_pool, why_none

MB = 1 << 20


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path]:
    with btrfs_pool(tmp_path_factory.mktemp("pool"), size_gb=1) as at:
        yield at


def write(path: Path, n_bytes: int) -> int:
    """How much of it could be written and flushed."""
    written = 0
    with open(path, "ab", buffering=0) as file:
        try:
            while written < n_bytes:
                written += file.write(bytes(min(MB, n_bytes - written)))
                os.fsync(file.fileno())
        except OSError as error:
            assert error.errno == errno.EDQUOT  # noqa: PT017
    return written


async def test_a_volume_holds_no_more_than_its_size_and_grows_while_it_is_used(pool: Path) -> None:
    store, trees = BtrfsVolumes(pool / "limits"), BtrfsTrees()
    await store.create("vol1", 1)
    await store.create("other", 1)
    data = Path(await store.attach("vol1", "m1", 1))
    listed = run("btrfs", "qgroup", "show", "--raw", "-r", "-f", str(data)).split()
    assert str(1 << 30) in listed  # the limit, in bytes
    trees.limit(data, 20 * MB)
    assert 15 * MB < write(data / "file", 40 * MB) < 20 * MB
    assert write(pool / "limits" / "other" / "data" / "file", 30 * MB) == 30 * MB  # the others never notice
    trees.limit(data, 60 * MB)
    assert write(data / "file", 20 * MB) == 20 * MB


async def test_a_snapshot_has_what_was_not_flushed_yet(pool: Path) -> None:
    store = BtrfsVolumes(pool / "unflushed")
    await store.create("vol1", 1)
    data = Path(await store.attach("vol1", "m1", 1))
    with open(data / "file", "wb", buffering=0) as file:
        file.write(b"x" * MB)
        await store.snapshot("vol1", "s1", 1.0)
        file.write(b"y" * MB)
    copy = pool / "unflushed/vol1/snapshots/s1/data/file"
    assert copy.read_bytes() == b"x" * MB
    with pytest.raises(OSError, match="Read-only"):
        copy.write_bytes(b"")


async def test_subvolumes_that_a_machine_made_go_with_its_volume(pool: Path) -> None:
    store = BtrfsVolumes(pool / "nested")
    await store.create("vol1", 1)
    data = Path(await store.attach("vol1", "m1", 1))
    (data / "folder").mkdir()
    for inner in ("folder/inner", "folder/inner/innermost"):
        run("btrfs", "subvolume", "create", str(data / inner))
    await store.snapshot("vol1", "s1", 1.0)
    await store.detach("vol1", "m1", 1)
    await store.destroy("vol1", 1.0)
    assert await store.purge(1.0) == ("vol1",)
    assert os.listdir(pool / "nested") == []


def test_opening_again_changes_nothing(pool: Path, tmp_path: Path) -> None:
    open_pool(pool, tmp_path / "not needed", 1)
    assert not (tmp_path / "not needed").exists()
    assert capacity_gb(pool) == 0  # of 1 GB a part is btrfs's own
    assert referenced_bytes(run("btrfs", "qgroup", "show", "--raw", str(pool)), ALL) > 0


def test_a_pool_outlives_its_mount(tmp_path: Path) -> None:
    with btrfs_pool(tmp_path, size_gb=1) as at:
        (at / "file").write_text("kept")
        close_pool(at)
        close_pool(at)
        assert not is_mounted(at)
        open_pool(at, tmp_path / "pool.btrfs")
        assert (at / "file").read_text() == "kept"


@pytest.mark.skipif(bool(why_none()), reason=why_none() or "-")
def test_what_a_pool_is_not_made_on(tmp_path: Path) -> None:
    foreign, at, used = tmp_path / "foreign", tmp_path / "at", tmp_path / "used"
    foreign.write_bytes(b"somebody's" * 100)
    with pytest.raises(Refused, match="is not a pool of flyd's"):
        open_pool(at, foreign, 1)
    assert foreign.read_bytes() == b"somebody's" * 100
    used.mkdir()
    (used / "vol_1").mkdir()
    with pytest.raises(Refused, match="would hide them"):
        open_pool(used, tmp_path / "new", 1)
    for size_gb in (0, -1):
        with pytest.raises(InvalidInput, match="can not be made"):
            open_pool(at, tmp_path / "new", size_gb)
    with pytest.raises(Unavailable, match="laid aside"):
        open_pool(at, tmp_path / "new", 10 * 1024 * 1024)
    with pytest.raises(InvalidInput, match="there is no disk"):
        open_pool(at, Path("/dev/nothing"), 1)
    with pytest.raises(InvalidInput, match="neither a disk nor a file"):
        open_pool(at, used, 1)
    assert not is_mounted(at)
    assert sorted(os.listdir(tmp_path)) == ["at", "foreign", "used"]


def test_without_root_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Refused, match="needs root") as refused:
        open_pool(tmp_path / "at", tmp_path / "new", 1)
    assert 'volumes = "directory"' in refused.value.hint
    monkeypatch.undo()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(volumes.pool.shutil, "which", lambda tool: None)  # pyright: ignore
    assert "apt-get install" in why_none()
    assert "btrfs-progs" in why_none()


def test_mountinfo_is_read() -> None:
    line = "107 29 0:45 / /var/lib/flyd/volumes rw,noatime shared:1 - btrfs /dev/loop3 rw,space_cache=v2"
    assert mounted_kind(line) == "btrfs"


def test_qgroups_are_read() -> None:
    listed = (
        "Qgroupid    Referenced    Exclusive   Path\n--------    ----------    ---------   ----\n"
        "0/5  16384 16384 <toplevel>\n0/257 52445184 16384 s\n1/1 99 99 <1 member qgroups>\n"
    )
    assert referenced_bytes(listed, "0/257") == 52445184
    assert referenced_bytes(listed, ALL) == 99
    with pytest.raises(Unavailable, match="no quota group 1/2"):
        referenced_bytes(listed, "1/2")
