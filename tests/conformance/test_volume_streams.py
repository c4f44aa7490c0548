"""Snapshots as streams from one host's store to another's, on each back end: whole, or nothing.

The two hosts are two disks: with btrfs two pools, each with marks of its own.
"""

from __future__ import annotations

import asyncio
import os
import signal
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from flyd.errors import InvalidInput, NotFound, Refused, Unavailable
from tests.support.volume_pools import btrfs_pool
from volumes.btrfs import BtrfsVolumes
from volumes.contract import Snapshot, StreamPart
from volumes.directory import DirectoryVolumes
from volumes.streams import StreamStore

COPY = "vol1.copy"


class Pair:
    """A volume's host, and the one that gets copies."""

    def __init__(self, kind: str, here: Path, there: Path) -> None:
        self.opened: Callable[[Path], StreamStore] = BtrfsVolumes if kind == "btrfs" else DirectoryVolumes
        self.roots = (here, there)
        self.here, self.there = self.opened(here), self.opened(there)
        self._counted = 0

    async def begin(self) -> Path:
        """A volume here, room for its copies there; where the data is."""
        await self.here.create("vol1", 1)
        await self.there.create(COPY, 1)
        return Path(await self.here.attach("vol1", "m1", 1))

    async def keep(self) -> Snapshot:
        """A snapshot of the volume."""
        self._counted += 1
        return await self.here.snapshot("vol1", f"s{self._counted}", float(self._counted))

    async def parts(self, snapshot: Snapshot, parent: str = "") -> list[StreamPart]:
        """All of a stream, in small pieces."""
        found = [part async for part in self.here.send("vol1", snapshot.id, parent)]
        return [small for part in found for small in cut(part)]

    async def copy(self, snapshot: Snapshot, parent: str = "") -> int:
        """Bring it over; how many bytes that took."""
        parts = await self.parts(snapshot, parent)
        made = await self.receive(snapshot, parent, coming(parts))
        assert (made.id, made.made_at_s) == (snapshot.id, snapshot.made_at_s)
        assert await self.there.digest(COPY, snapshot.id) == await self.here.digest("vol1", snapshot.id)
        return sum(len(part.data) for part in parts)

    async def receive(self, snapshot: Snapshot, parent: str, parts: AsyncIterator[StreamPart]) -> Snapshot:
        """As the other host does it."""
        return await received(self.there, snapshot, parent, parts)

    def left(self) -> list[str]:
        """What is there of the volume's copies, half-made things too."""
        folder = self.roots[1] / COPY / "snapshots"
        return sorted(os.listdir(folder)) if folder.exists() else []


async def received(
    store: StreamStore,
    snapshot: Snapshot,
    parent: str,
    parts: AsyncIterator[StreamPart],
    volume_id: str = COPY,
) -> Snapshot:
    return await store.receive(
        volume_id,
        snapshot.id,
        parts,
        parent_id=parent,
        made_at_s=snapshot.made_at_s,
        size_gb=snapshot.size_gb,
    )


def cut(part: StreamPart, size: int = 4000) -> list[StreamPart]:
    if not part.data:
        return [part]
    return [
        StreamPart(offset_bytes=part.offset_bytes + at, data=part.data[at : at + size])
        for at in range(0, len(part.data), size)
    ]


async def coming(parts: Iterable[StreamPart]) -> AsyncGenerator[StreamPart]:
    for part in parts:
        yield part


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("pools")
    for name in ("here", "there"):
        (folder / name).mkdir()
    with btrfs_pool(folder / "here", size_gb=1) as here, btrfs_pool(folder / "there", size_gb=1) as there:
        yield here, there


@pytest.fixture(params=["btrfs", "directory"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    if request.param == "directory":
        return Pair("directory", tmp_path / "here", tmp_path / "there")
    here, there = request.getfixturevalue("pools")
    return Pair("btrfs", here / request.node.originalname, there / request.node.originalname)


def fill(data: Path) -> None:
    """One of everything that a volume may hold."""
    (data / "folder" / "deep").mkdir(parents=True)
    (data / "folder" / "deep" / "file").write_bytes(b"deep" * 1000)
    (data / "big").write_bytes(os.urandom(300_000))
    (data / "empty").touch()
    (data / os.fsdecode(b"bad-\xff-name\n")).write_text("kept")
    (data / "link").symlink_to("/etc/passwd")
    os.link(data / "big", data / "hard")
    os.mkfifo(data / "fifo")
    (data / "folder").chmod(0o750)
    with open(data / "sparse", "wb") as file:
        file.truncate(64 << 20)
    os.mknod(data / "socket", stat.S_IFSOCK | 0o600)


async def test_a_whole_volume_and_then_only_what_changed(pair: Pair) -> None:
    data = await pair.begin()
    fill(data)
    first = await pair.keep()
    assert 300_000 < await pair.copy(first) < 900_000  # the sparse file's holes are not sent
    (data / "empty").write_text("no more")
    (data / "link").unlink()
    (data / "link").mkdir()
    (data / "folder" / "deep" / "file").unlink()
    (data / "folder" / "deep").rmdir()
    (data / "folder" / "deep").write_text("a file now")
    os.rename(data / "fifo", data / "renamed")
    second = await pair.keep()
    assert await pair.copy(second, first.id) < 40_000
    third = await pair.keep()
    assert await pair.copy(third, second.id) < 20_000  # nothing
    found = await pair.there.snapshots(COPY)
    assert [(s.id, s.made_at_s) for s in found] == [("s1", 1.0), ("s2", 2.0), ("s3", 3.0)]


async def test_a_change_within_a_tick_of_the_clock_is_seen(pair: Pair) -> None:
    data = await pair.begin()
    (data / "file").write_text("one")
    times = os.stat(data / "file").st_mtime_ns
    first = await pair.keep()
    await pair.copy(first)
    (data / "file").write_text("two")  # as long, and (now) as old
    os.utime(data / "file", ns=(times, times))
    second = await pair.keep()
    await pair.copy(second, first.id)
    assert (pair.roots[1] / COPY / "snapshots" / second.id / "data" / "file").read_text() == "two"


async def test_a_volume_comes_back_from_a_copy(pair: Pair) -> None:
    data = await pair.begin()
    (data / "file").write_text("kept")
    snapshot = await pair.keep()
    await pair.copy(snapshot)
    await pair.there.fork(COPY, "vol2", 2, snapshot.id)
    back = Path(await pair.there.attach("vol2", "m2", 1))
    assert (back / "file").read_text() == "kept"
    (back / "file").write_text("changed")
    await pair.there.snapshot("vol2", "later", 9.0)
    assert await pair.there.digest(COPY, snapshot.id) == await pair.here.digest("vol1", snapshot.id)
    await pair.there.destroy(COPY, 1.0)
    assert await pair.there.purge(1.0) == (COPY,)


async def test_a_stream_goes_on_where_it_was_cut(pair: Pair) -> None:
    data = await pair.begin()
    (data / "big").write_bytes(os.urandom(500_000))
    snapshot = await pair.keep()
    parts = await pair.parts(snapshot)
    half = parts[: len(parts) // 2]
    assert await pair.there.arrived_bytes(COPY, snapshot.id) == 0
    with pytest.raises(Unavailable, match="ended after"):
        await pair.receive(snapshot, "", coming(half))
    assert await pair.there.snapshots(COPY) == ()
    arrived = await pair.there.arrived_bytes(COPY, snapshot.id)
    assert arrived == sum(len(part.data) for part in half)
    await pair.there.tidy()  # as flyd does at every start
    rest = [part async for part in pair.here.send("vol1", snapshot.id, "", arrived)]
    assert sum(len(part.data) for part in rest) == sum(len(part.data) for part in parts) - arrived
    await pair.receive(snapshot, "", coming(rest))
    assert await pair.there.digest(COPY, snapshot.id) == await pair.here.digest("vol1", snapshot.id)
    assert pair.left() == [snapshot.id]
    again = await pair.receive(snapshot, "", coming([]))  # it is here already
    assert again.id == snapshot.id


def bad_streams(good: list[StreamPart]) -> dict[str, list[StreamPart]]:
    last = len(good) - 1
    flipped = bytes([good[3].data[0] ^ 1]) + good[3].data[1:]
    return {
        "a bit flipped": [*good[:3], replace(good[3], data=flipped), *good[4:]],
        "a piece missing": [*good[:3], *good[4:]],
        "a piece twice": [*good[:3], good[2], *good[3:]],
        "two exchanged": [*good[:2], good[3], good[2], *good[4:]],
        "a wrong sum": [*good[:last], replace(good[last], sha256="0" * 64)],
        "more after the end": [*good, good[0]],
        "an end too early": [*good[:5], replace(good[last], offset_bytes=good[5].offset_bytes)],
    }


async def test_a_stream_that_is_not_what_was_sent_leaves_nothing(pair: Pair) -> None:
    data = await pair.begin()
    (data / "big").write_bytes(os.urandom(60_000))
    snapshot = await pair.keep()
    good = await pair.parts(snapshot)
    for what, parts in bad_streams(good).items():
        with pytest.raises(Refused, match="is not what was sent"):
            await pair.receive(snapshot, "", coming(parts))
        assert pair.left() == [], what
    await pair.copy(snapshot)


async def test_a_tool_that_does_not_take_it_leaves_nothing(pair: Pair) -> None:
    """A stream whose checksum is right and that is none of this back end's."""
    await pair.begin()
    snapshot = await pair.keep()
    from hashlib import sha256

    nonsense = os.urandom(10_000)
    parts = [
        StreamPart(offset_bytes=0, data=nonsense),
        StreamPart(offset_bytes=len(nonsense), sha256=sha256(nonsense).hexdigest()),
    ]
    with pytest.raises((Refused, Unavailable)):
        await pair.receive(snapshot, "", coming(parts))
    assert await pair.there.snapshots(COPY) == ()
    assert not [name for name in pair.left() if name.startswith((".new-", "s"))]
    await pair.copy(snapshot)


async def test_a_full_disk_leaves_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    data = await pair.begin()
    (data / "big").write_bytes(os.urandom(60_000))
    snapshot = await pair.keep()
    with monkeypatch.context() as patch:
        patch.setattr("volumes.streams.RESERVE_PART", 1.0)
        with pytest.raises(Unavailable, match="no room"):
            await pair.copy(snapshot)
    assert pair.left() == []
    await pair.copy(snapshot)


async def test_what_can_not_be_sent_or_received(pair: Pair) -> None:
    await pair.begin()
    snapshot = await pair.keep()
    for volume_id, snapshot_id, parent, error in (
        ("vol1", "nothing", "", NotFound),
        ("vol1", snapshot.id, "nothing", NotFound),
        ("other", snapshot.id, "", NotFound),
        ("../vol1", snapshot.id, "", InvalidInput),
        ("vol1", "../x", "", InvalidInput),
    ):
        with pytest.raises(error):
            [part async for part in pair.here.send(volume_id, snapshot_id, parent)]
    for volume_id, name, parent, error in (
        ("other", "s1", "", NotFound),
        (COPY, "s1", "nothing", NotFound),
        (COPY, "../x", "", InvalidInput),
        (COPY, "s1", "../x", InvalidInput),
        ("a/b", "s1", "", InvalidInput),
    ):
        with pytest.raises(error):
            await received(pair.there, replace(snapshot, id=name), parent, coming([]), volume_id)


async def test_killed_while_it_is_made_of_the_stream(pair: Pair) -> None:
    """A child dies when all has come, before each change of the disk; then the same is asked again."""
    data = await pair.begin()
    (data / "file").write_text("kept")
    first = await pair.keep()
    await pair.copy(first)
    (data / "file").write_text("changed")
    second = await pair.keep()
    parts = await pair.parts(second, first.id)
    point = 0
    while True:
        point += 1
        status = receive_in_child(pair, second, first.id, parts, point)
        found = [s.id for s in await pair.there.snapshots(COPY)]
        if found == [first.id, second.id]:
            whole = await pair.there.digest(COPY, second.id)
            assert whole == await pair.here.digest("vol1", second.id)
            await pair.there.delete_snapshot(COPY, second.id)
        else:
            assert found == [first.id]
        await pair.there.tidy()
        if not os.WIFSIGNALED(status):
            break
        await pair.receive(second, first.id, _rest(pair, second, first.id))
        await pair.there.delete_snapshot(COPY, second.id)
    assert point > 8
    assert pair.left() == [first.id]


async def _rest(pair: Pair, snapshot: Snapshot, parent: str) -> AsyncIterator[StreamPart]:
    arrived = await pair.there.arrived_bytes(COPY, snapshot.id, parent)
    async for part in pair.here.send("vol1", snapshot.id, parent, arrived):
        yield part


def receive_in_child(pair: Pair, snapshot: Snapshot, parent: str, parts: list[StreamPart], point: int) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            die_before(point)
            there = pair.opened(pair.roots[1])
            asyncio.run(received(there, snapshot, parent, coming(parts)))
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def die_before(point: int) -> None:
    """This process ends before its n-th change of the disk."""
    import volumes.btrfs
    import volumes.directory
    import volumes.trees

    patch, count = pytest.MonkeyPatch(), 0

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("replace", "fsync", "mkdir", "unlink"):
        patch.setattr(os, name, before(getattr(os, name)))
    for module in (volumes.btrfs, volumes.directory, volumes.trees):
        patch.setattr(module, "run", before(module.run))
