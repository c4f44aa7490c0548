"""What every volume store does (ports.VolumeStore, storage.local.LocalVolumes), on each back end.

btrfs is a real pool in a file of its own, mounted for this module; without root, btrfs-progs or a
kernel that has it, its tests are skipped and say which.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path

import pytest

from flyd.errors import Conflict, InvalidInput, NotFound, Refused
from flyd.storage.local import LocalVolumes
from tests.support.volume_pools import btrfs_pool
from volumes.btrfs import BtrfsTrees, BtrfsVolumes
from volumes.directory import DirectoryVolumes
from volumes.folders import Folders
from volumes.streams import StreamStore

Open = Callable[[], StreamStore]
NAMES = ["", ".", "..", "../x", "a/b", "/etc", ".hidden", "a\0b", ".new-v", "x" * 129]
SIZES = [0, -1, 10 * 1024 * 1024]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path]:
    with btrfs_pool(tmp_path_factory.mktemp("pool"), size_gb=1) as at:
        yield at


@pytest.fixture(params=["btrfs", "directory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Path]:
    if request.param == "directory":
        yield tmp_path / "directory"
        return
    mounted: Path = request.getfixturevalue("pool")
    at = mounted / "btrfs"
    yield at
    folders = Folders(at, BtrfsTrees())
    for name in os.listdir(at):
        folders.clear(at / name)


@pytest.fixture
def open_store(root: Path) -> Open:
    """Each call answers a new store over the same disk, as after a restart of flyd."""
    return lambda: (BtrfsVolumes if root.name == "btrfs" else DirectoryVolumes)(root)


def test_it_is_what_flyd_asks_for(open_store: Open) -> None:
    store: LocalVolumes = open_store()
    assert store.abilities().atomic == store.abilities().limited  # both or, on any directory, neither


async def test_data_outlives_machines_and_flyd(open_store: Open) -> None:
    store = open_store()
    await store.create("vol1", 1)
    path = await store.attach("vol1", "m1", 1)
    (Path(path) / "file").write_text("kept")
    await store.detach("vol1", "m1", 1)
    await store.create("vol1", 1)
    assert await open_store().attach("vol1", "m2", 2) == path
    assert (Path(path) / "file").read_text() == "kept"


async def test_attach_can_be_repeated_and_restarted(open_store: Open) -> None:
    store = open_store()
    await store.create("vol1", 1)
    path = await store.attach("vol1", "m1", 3)
    assert await store.attach("vol1", "m1", 3) == path
    assert await open_store().attach("vol1", "m1", 3) == path
    await store.detach("vol1", "m1", 3)
    await store.detach("vol1", "m1", 3)
    assert await store.attach("vol1", "m1", 3) == path


async def test_an_older_epoch_is_refused(open_store: Open) -> None:
    store = open_store()
    await store.create("vol1", 1)
    await store.attach("vol1", "m1", 1)
    await store.attach("vol1", "m2", 2)  # m1's host's flyd was down when it was destroyed
    with pytest.raises(Refused, match="machine m2 has claimed it since, with epoch 2"):
        await open_store().attach("vol1", "m1", 1)
    await store.detach("vol1", "m2", 2)
    with pytest.raises(Refused):
        await open_store().attach("vol1", "m1", 1)


async def test_two_machines_never_share_an_epoch(open_store: Open) -> None:
    store = open_store()
    await store.create("vol1", 1)
    await store.attach("vol1", "m1", 1)
    for _ in range(2):
        with pytest.raises(Refused, match="epoch 1 is machine m1's claim"):
            await store.attach("vol1", "m2", 1)
        await store.detach("vol1", "m1", 1)


async def test_a_late_detach_disturbs_nobody(open_store: Open) -> None:
    store = open_store()
    await store.create("vol1", 1)
    await store.attach("vol1", "m1", 1)
    await store.attach("vol1", "m2", 2)
    for machine_id, epoch in (("m1", 1), ("m2", 1), ("m1", 2)):
        await store.detach("vol1", machine_id, epoch)
        with pytest.raises(Refused, match="attached to machine m2"):
            await store.destroy("vol1", 1.0)


async def test_what_is_destroyed_is_kept_and_comes_back(open_store: Open) -> None:
    store = open_store()
    await store.create("vol1", 1)
    path = await store.attach("vol1", "m1", 1)
    (Path(path) / "file").write_text("kept")
    with pytest.raises(Refused, match="attached to machine m1"):
        await open_store().destroy("vol1", 100.0)
    await store.detach("vol1", "m1", 1)
    await store.destroy("vol1", 100.0)
    await store.destroy("vol1", 200.0)  # again: counts from the first time
    for use in (store.attach("vol1", "m1", 2), store.create("vol1", 1), store.extend("vol1", 2)):
        with pytest.raises(NotFound, match="was destroyed"):
            await use
    assert await store.purge(99.0) == ()
    await open_store().undestroy("vol1")
    await store.undestroy("vol1")
    assert await store.purge(1e9) == ()
    assert (Path(await store.attach("vol1", "m1", 2)) / "file").read_text() == "kept"


async def test_purge_removes_data_and_snapshots(open_store: Open, root: Path) -> None:
    store = open_store()
    await store.create("vol1", 1)
    await store.create("vol2", 1)
    await store.snapshot("vol1", "s1", 1.0)
    await store.destroy("vol1", 100.0)
    assert await open_store().purge(100.0) == ("vol1",)
    assert await store.purge(100.0) == ()
    assert os.listdir(root) == ["vol2"]
    with pytest.raises(NotFound, match="vol1"):
        await store.undestroy("vol1")
    await store.destroy("vol1", 1.0)
    await store.detach("vol1", "m1", 1)


async def test_snapshots_keep_what_was(open_store: Open) -> None:
    store = open_store()
    await store.create("vol1", 1)
    data = Path(await store.attach("vol1", "m1", 1))
    (data / "file").write_text("one")
    made = await store.snapshot("vol1", "s1", 10.0)
    (data / "file").write_text("two")
    assert await open_store().snapshot("vol1", "s1", 99.0) == made  # again: the same, not a newer one
    later = await store.snapshot("vol1", "s0", 20.0, scheduled=True)
    assert await open_store().snapshots("vol1") == (made, later)
    assert made.consistent == store.abilities().atomic  # it was in use
    assert (made.scheduled, later.scheduled) == (False, True)
    await store.fork("vol1", "vol2", 1, "s1")
    assert (Path(await store.attach("vol2", "m9", 1)) / "file").read_text() == "one"
    await store.delete_snapshot("vol1", "s1")
    await store.delete_snapshot("vol1", "s1")
    assert await store.snapshots("vol1") == (later,)
    assert (Path(await store.attach("vol2", "m9", 1)) / "file").read_text() == "one"
    with pytest.raises(NotFound, match="snapshot s1"):
        await store.fork("vol1", "vol3", 1, "s1")


async def test_a_fork_is_a_volume_of_its_own(open_store: Open) -> None:
    store = open_store()
    await store.create("vol1", 1)
    data = Path(await store.attach("vol1", "m1", 5))
    (data / "file").write_text("one")
    (data / "link").symlink_to("/etc/passwd")
    await store.detach("vol1", "m1", 5)
    await store.fork("vol1", "vol2", 3)
    await store.fork("vol1", "vol2", 3)
    with pytest.raises(Conflict, match="vol2"):
        await store.fork("vol2", "vol1", 3)
    await store.fork("vol2", "vol3", 1)  # a fork of a fork
    (data / "file").write_text("changed")
    for name in ("vol2", "vol3"):
        copy = Path(await store.attach(name, "m2", 1))  # it begins with no claim at all
        assert (copy / "file").read_text() == "one"
        assert os.readlink(copy / "link") == "/etc/passwd"
    assert [(h.id, h.record.size_gb, h.record.origin) for h in await store.held()] == [
        ("vol1", 1, ""), ("vol2", 3, "vol1"), ("vol3", 1, "vol2"),
    ]  # fmt: skip
    with pytest.raises(InvalidInput, match="itself"):
        await store.fork("vol1", "vol1", 1)


async def test_a_volume_in_use_is_forked_only_of_one_instant(open_store: Open) -> None:
    store = open_store()
    await store.create("vol1", 1)
    await store.attach("vol1", "m1", 1)
    if store.abilities().atomic:
        await store.fork("vol1", "vol2", 1)
    else:
        with pytest.raises(Refused, match="in use by machine m1"):
            await store.fork("vol1", "vol2", 1)


async def test_it_grows_and_never_shrinks(open_store: Open) -> None:
    store = open_store()
    await store.create("vol1", 2)
    await store.attach("vol1", "m1", 1)
    await store.extend("vol1", 3)
    await store.extend("vol1", 3)
    assert (await open_store().usage("vol1")).size_bytes == 3 << 30
    with pytest.raises(Refused, match="can not shrink to 2 GB"):
        await store.extend("vol1", 2)
    with pytest.raises(NotFound):
        await store.extend("vol2", 2)


async def test_a_fork_and_a_restore_must_fit(open_store: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store()
    await store.create("vol1", 1)
    data = Path(await store.attach("vol1", "m1", 1))
    with open(data / "file", "wb") as file:
        file.write(os.urandom(30 << 20))
        os.fsync(file.fileno())
    await store.snapshot("vol1", "s1", 1.0)
    await store.detach("vol1", "m1", 1)
    monkeypatch.setattr("volumes.store.GB", 20 << 20)  # "1 GB" of a test's size
    for snapshot in ("", "s1"):
        with pytest.raises(Refused, match="does not fit into 1 GB"):
            await store.fork("vol1", "vol2", 1, snapshot)
        assert [held.id for held in await store.held()] == ["vol1"]
    await store.fork("vol1", "vol2", 2, "s1")


async def test_use_and_space_are_counted(open_store: Open) -> None:
    store = open_store()
    await store.create("vol1", 1)
    data = Path(await store.attach("vol1", "m1", 1))
    before = (await store.usage("vol1")).used_bytes
    (data / "file").write_bytes(os.urandom(5 << 20))
    os.sync()
    used = (await store.usage("vol1")).used_bytes - before
    assert 5 << 20 <= used < 6 << 20
    assert (await store.snapshot("vol1", "s1", 1.0)).used_bytes - before >= 5 << 20
    space = await store.space()
    assert 0 < space.free_bytes < space.total_bytes


@pytest.mark.parametrize("name", NAMES)
async def test_names_stay_inside(open_store: Open, root: Path, name: str) -> None:
    store = open_store()
    await store.create("vol1", 1)
    for use in (
        store.create(name, 1),
        store.attach(name, "m1", 1),
        store.destroy(name, 1.0),
        store.undestroy(name),
        store.extend(name, 2),
        store.fork("vol1", name, 1),
        store.snapshot(name, "s1", 1.0),
        store.snapshots(name),
        store.usage(name),
    ):
        with pytest.raises(InvalidInput, match="no volume id"):
            await use
    for use in (store.snapshot("vol1", name, 1.0), store.delete_snapshot("vol1", name)):
        with pytest.raises(InvalidInput, match="no snapshot id"):
            await use
    assert os.listdir(root) == ["vol1"]


@pytest.mark.parametrize("size_gb", SIZES)
async def test_sizes_are_of_this_world(open_store: Open, root: Path, size_gb: int) -> None:
    store = open_store()
    await store.create("vol1", 1)
    for use in (store.create("v", size_gb), store.extend("vol1", size_gb), store.fork("vol1", "v", size_gb)):
        with pytest.raises(InvalidInput, match="can not be made"):
            await use
    assert os.listdir(root) == ["vol1"]


@pytest.mark.parametrize("planted", ["vol2", "vol1/data", "vol1/volume.json", "vol1/snapshots"])
async def test_planted_links_are_refused(open_store: Open, root: Path, tmp_path: Path, planted: str) -> None:
    store = open_store()
    await store.create("vol1", 1)
    outside = tmp_path / "outside"
    (outside / "s1" / "data").mkdir(parents=True)
    (outside / "data").mkdir()
    (outside / "volume.json").write_text('{"size_gb": 1}')
    (outside / "s1/snapshot.json").write_text('{"id": "s1", "made_at_s": 0, "size_gb": 1, "used_bytes": 0}')
    at = root / planted
    if at.exists():
        at.rename(root / "aside")
    at.symlink_to(outside / "volume.json" if planted.endswith("json") else outside)
    before = sorted(outside.rglob("*"))
    volume_id = planted.partition("/")[0]
    uses = [store.snapshot(volume_id, "s2", 1.0), store.fork(volume_id, "v", 1, "s1")]
    if planted == "vol1/snapshots":
        uses.append(store.delete_snapshot("vol1", "s1"))
    else:
        uses += [store.attach(volume_id, "m1", 1), store.fork(volume_id, "v", 1), store.usage(volume_id)]
    for use in uses:
        with pytest.raises(Refused, match=r"is not a folder that flyd made|is a link"):
            await use
    await store.tidy()
    with suppress(Refused):
        await store.destroy("vol1", 1.0)
    await store.purge(2.0)
    assert sorted(outside.rglob("*")) == before


async def test_links_to_unfinished_names_lead_nowhere(open_store: Open, root: Path, tmp_path: Path) -> None:
    store = open_store()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("mine")
    for name in (".new-vol1", ".gone-vol1", ".new-other"):
        (root / name).symlink_to(tmp_path / "outside")
    await store.create("vol1", 1)
    await store.destroy("vol1", 1.0)
    await store.purge(1.0)
    await store.tidy()
    assert os.listdir(root) == []
    assert (tmp_path / "outside" / "file").read_text() == "mine"
