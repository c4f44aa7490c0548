"""VolumesService and the keeper over a store and real directories: what is promised, kept, undone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from flyd.api.context import ApiContext
from flyd.api.volumes import VolumesServicer
from flyd.errors import FlydError, InvalidInput, NotFound, OutcomeUnknown, Refused, Unavailable, Unplaceable
from flyd.model import App, Event, Reservations, Volume, decode, encode
from flyd.ports import Put
from flyd.storage import records
from flyd.storage.keeper import VolumeKeeper
from flyd.store import keys
from flyd.store.memory import MemoryEtcd, MemoryKV
from flyd.store.mirror import Mirror
from flyd.v1 import volumes_pb2 as pb
from tests.support.host_world import FakeDriver
from tests.support.placing import CountedEntropy, FixedClock, join, make_host
from volumes.contract import Abilities, Usage
from volumes.directory import DirectoryTrees
from volumes.streams import StreamStore

HOST = make_host("ams-1", disk_gb=10)


class InstantTrees(DirectoryTrees):
    """Copies, and says that it costs nothing, as btrfs does."""

    def abilities(self) -> Abilities:
        return Abilities(limited=True, instant=True, atomic=True)


class World:
    """One host: its API, its volumes, its keeper."""

    def __init__(self, root: Path) -> None:
        self.kv = MemoryKV(MemoryEtcd())
        self.clock = FixedClock()
        self.entropy = CountedEntropy()
        self.mirror = Mirror(self.kv, (keys.ROOT,))
        self.volumes = StreamStore(root, InstantTrees(root))
        context = ApiContext(
            host=HOST,
            kv=self.kv,
            mirror=self.mirror,
            clock=self.clock,
            entropy=self.entropy,
            driver=FakeDriver(),
            sources=cast(Any, None),
            peers=cast(Any, None),
            etcd_endpoints=(),
        )
        self.api = VolumesServicer(context, self.volumes)
        self.keeper = VolumeKeeper(HOST.name, self.kv, self.volumes, clock=self.clock, entropy=self.entropy)

    async def make(self, size_gb: int = 2) -> str:
        """A volume that a machine has written to and left."""
        request = pb.CreateVolumeRequest(app_name="web", name="data", region="ams", size_gb=size_gb)
        volume_id = (await self.api.CreateVolume(request, None)).volume.id
        await self.volumes.create(volume_id, size_gb)
        await self.write(volume_id, "one")
        await self.seen()
        return volume_id

    async def write(self, volume_id: str, text: str) -> None:
        self.entropy.token(1)
        epoch = next(h.record.epoch for h in await self.volumes.held() if h.id == volume_id) + 1
        data = await self.volumes.attach(volume_id, "m1", epoch)
        (Path(data) / "file").write_text(text)
        await self.volumes.detach(volume_id, "m1", epoch)

    async def text(self, volume_id: str) -> str:
        epoch = next(h.record.epoch for h in await self.volumes.held() if h.id == volume_id) + 1
        data = await self.volumes.attach(volume_id, "m1", epoch)
        await self.volumes.detach(volume_id, "m1", epoch)
        return (Path(data) / "file").read_text()

    async def seen(self) -> None:
        revision = (await self.kv.list(keys.ROOT)).revision
        async with asyncio.timeout(5):
            await self.mirror.wait_revision(revision)

    async def promised_gb(self) -> dict[str, int]:
        record = await self.kv.get(keys.reservations(HOST.name))
        return decode(record.value, Reservations).volumes_gb if record else {}

    async def on_disk(self) -> list[str]:
        return [held.id for held in await self.volumes.held()]

    async def destroy(self, volume_id: str) -> None:
        await self.api.DestroyVolume(pb.DestroyVolumeRequest(app_name="web", volume_id=volume_id), None)
        await self.seen()

    async def undestroy(self, volume_id: str) -> None:
        request = pb.UndestroyVolumeRequest(app_name="web", volume_id=volume_id)
        await self.api.UndestroyVolume(request, None)
        await self.seen()

    async def fork(self, volume_id: str, **more: Any) -> pb.Volume:
        request = pb.ForkVolumeRequest(app_name="web", volume_id=volume_id, **more)
        made = (await self.api.ForkVolume(request, None)).volume
        await self.seen()
        return made


@asynccontextmanager
async def running(root: Path) -> AsyncGenerator[World]:
    world = World(root)
    await join(world.kv, HOST)
    await world.kv.put(keys.app("web"), encode(App(name="web", regions=("ams",))))
    async with asyncio.TaskGroup() as group:
        keep = group.create_task(world.mirror.keep())
        await world.mirror.wait_synced()
        yield world
        keep.cancel()


async def test_a_destroyed_volume_is_kept_for_a_day_and_then_removed(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        volume_id = await world.make()
        await world.destroy(volume_id)
        assert (await world.api.ListVolumes(pb.ListVolumesRequest(app_name="web"), None)).volumes == []
        listed = await world.api.ListVolumes(pb.ListVolumesRequest(app_name="web", destroyed=True), None)
        assert [(v.id, v.destroyed_at) for v in listed.volumes] == [(volume_id, world.clock.now_s)]
        world.clock.now_s += records.KEPT_S - 1
        await world.keeper.round()
        assert await world.on_disk() == [volume_id]
        assert await world.promised_gb() == {volume_id: 2}  # it is still on the disk
        world.clock.now_s += 1
        await world.keeper.round()
        assert await world.on_disk() == []
        assert await world.promised_gb() == {}
        with pytest.raises(NotFound, match="was destroyed in the last 24 hours"):
            await world.undestroy(volume_id)


@pytest.mark.parametrize("rounds_between", [0, 1])
async def test_a_destroyed_volume_comes_back(tmp_path: Path, rounds_between: int) -> None:
    async with running(tmp_path) as world:
        volume_id = await world.make()
        await world.destroy(volume_id)
        for _ in range(rounds_between):
            await world.keeper.round()
        await world.undestroy(volume_id)
        await world.undestroy(volume_id)
        world.clock.now_s += 10 * records.KEPT_S
        await world.keeper.round()
        assert await world.text(volume_id) == "one"
        assert await world.promised_gb() == {volume_id: 2}


async def test_a_lost_record_costs_nobody_a_volume(tmp_path: Path) -> None:
    """etcd was set back to a state in which the volume did not exist."""
    async with running(tmp_path) as world:
        await world.volumes.create("vol_x", 1)
        for _ in range(3):
            await world.keeper.round()
            world.clock.now_s += records.KEPT_S
        assert await world.on_disk() == ["vol_x"]


async def test_what_came_back_in_etcd_only_is_not_purged(tmp_path: Path) -> None:
    """flyd died between the record and the data: the host ends it, however late."""
    async with running(tmp_path) as world:
        volume_id = await world.make()
        await world.destroy(volume_id)
        await world.keeper.round()
        await records.undestroy(world.kv, "web", volume_id, entropy=world.entropy)
        world.clock.now_s += 10 * records.KEPT_S
        await world.keeper.round()
        assert await world.text(volume_id) == "one"


async def test_an_attached_volume_is_not_destroyed(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        volume_id = await world.make()
        record = await world.kv.get(keys.volume("web", volume_id))
        assert record is not None
        held = msgspec.structs.replace(decode(record.value, Volume), attached_machine="m1")
        await world.kv.put(keys.volume("web", volume_id), encode(held))
        with pytest.raises(Refused, match="attached to machine m1"):
            await world.destroy(volume_id)


async def test_a_volume_grows_with_what_is_promised(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        volume_id = await world.make(2)

        async def extend(size_gb: int) -> None:
            request = pb.ExtendVolumeRequest(app_name="web", volume_id=volume_id, size_gb=size_gb)
            await world.api.ExtendVolume(request, None)
            await world.seen()

        await extend(9)
        await extend(9)
        assert await world.promised_gb() == {volume_id: 9}
        assert (await world.volumes.usage(volume_id)).size_bytes == 9 << 30
        with pytest.raises(Refused, match="can not shrink to 3 GB"):
            await extend(3)
        with pytest.raises(Unplaceable, match="2 GB more are needed, 1 GB of its disk are free"):
            await extend(11)
        for size_gb in (0, -1, 10_000_000):
            with pytest.raises(InvalidInput, match="it must be 1 to 500 GB"):
                await extend(size_gb)
        assert await world.promised_gb() == {volume_id: 9}


async def test_an_extension_that_stopped_half_way_is_ended_by_the_host(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        volume_id = await world.make(2)
        await records.extend(world.kv, "web", volume_id, 5, entropy=world.entropy)
        await world.keeper.round()
        assert (await world.volumes.usage(volume_id)).size_bytes == 5 << 30


async def test_forks_and_restores(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        volume_id = await world.make(2)
        request = pb.CreateVolumeSnapshotRequest(app_name="web", volume_id=volume_id)
        snapshot = (await world.api.CreateVolumeSnapshot(request, None)).snapshot
        await world.write(volume_id, "two")
        restored = await world.fork(volume_id, snapshot_id=snapshot.id, name="old", size_gb=3)
        forked = await world.fork(volume_id)
        assert [await world.text(v) for v in (restored.id, forked.id, volume_id)] == ["one", "two", "two"]
        assert (restored.name, restored.size_gb, forked.name, forked.size_gb) == ("old", 3, "data", 2)
        assert await world.promised_gb() == {volume_id: 2, restored.id: 3, forked.id: 2}
        with pytest.raises(Unplaceable, match="4 GB more are needed"):
            await world.fork(volume_id, size_gb=4)
        with pytest.raises(NotFound, match="snapshot nothing"):
            await world.fork(volume_id, snapshot_id="nothing", size_gb=1)
        with pytest.raises(InvalidInput, match="no snapshot id"):
            await world.fork(volume_id, snapshot_id="../x", size_gb=1)
        assert await world.promised_gb() == {volume_id: 2, restored.id: 3, forked.id: 2}
        assert len(await world.on_disk()) == 3


async def test_snapshots_are_listed_and_destroyed(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        volume_id = await world.make()
        await world.keeper.round()
        request = pb.CreateVolumeSnapshotRequest(app_name="web", volume_id=volume_id)
        mine = (await world.api.CreateVolumeSnapshot(request, None)).snapshot
        asked = pb.ListVolumeSnapshotsRequest(app_name="web", volume_id=volume_id)
        found = (await world.api.ListVolumeSnapshots(asked, None)).snapshots
        assert sorted((s.scheduled, s.id == mine.id) for s in found) == [(False, True), (True, False)]
        gone = pb.DestroyVolumeSnapshotRequest(app_name="web", volume_id=volume_id, snapshot_id=mine.id)
        await world.api.DestroyVolumeSnapshot(gone, None)
        with pytest.raises(NotFound, match="has no snapshot"):
            await world.api.DestroyVolumeSnapshot(gone, None)


async def test_one_snapshot_a_day_and_five_are_kept(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        volume_id = await world.make()
        for _ in range(7 * 4):
            await world.keeper.round()
            world.clock.now_s += records.KEPT_S / 4
        ages = [world.clock.now_s - s.made_at_s for s in await world.volumes.snapshots(volume_id)]
        assert ages == [day * 86400.0 for day in (5, 4, 3, 2, 1)]


class Stop(Exception):
    """flyd dies here."""


def failing(function: Callable[..., Any], at: int, error: Callable[[], Exception], *, after: bool) -> Any:
    """The n-th call does not happen, or happens and its answer is lost."""
    count = 0

    async def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == at and not after:
            raise error()
        result = await function(*args, **kwargs)
        if count == at:
            raise error()
        return result

    return call


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("lost", [False, True])
async def test_a_fork_cut_short_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, after: bool, lost: bool
) -> None:
    """Around each of its transactions flyd dies, or the answer is lost."""
    async with running(tmp_path) as world:
        volume_id = await world.make(2)
        with monkeypatch.context() as patch:
            error: Callable[[], Exception] = (lambda: OutcomeUnknown("?")) if lost else Stop
            patch.setattr(world.kv, "txn", failing(world.kv.txn, at, error, after=after))
            try:
                made = [(await world.fork(volume_id)).id]
            except (Stop, FlydError):
                made = []
        await world.seen()
        if lost:
            assert len(made) == 1  # tried again
        world.clock.now_s += records.KEPT_S
        await world.keeper.round()
        listed = await world.api.ListVolumes(pb.ListVolumesRequest(app_name="web"), None)
        there = sorted(v.id for v in listed.volumes)
        assert await world.on_disk() == there
        assert await world.promised_gb() == dict.fromkeys(there, 2)
        assert set(there) >= {volume_id, *made}


async def test_a_flyd_without_a_store_says_so(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        volume_id = await world.make()
        bare = VolumesServicer(world.api._context)  # pyright: ignore[reportPrivateUsage]
        with pytest.raises(Unavailable, match="keeps no volumes"):
            await bare.ForkVolume(pb.ForkVolumeRequest(app_name="web", volume_id=volume_id), None)


async def test_a_full_volume_is_told_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path) as world:
        volume_id = await world.make(2)
        used = {"bytes": 2 << 30}

        async def usage(_: str) -> Usage:
            return Usage(used_bytes=used["bytes"], size_bytes=2 << 30)

        monkeypatch.setattr(world.volumes, "usage", usage)
        await world.keeper.tell_full()  # nobody uses it: nobody is told
        record = await world.kv.get(keys.volume("web", volume_id))
        assert record is not None
        attached = msgspec.structs.replace(decode(record.value, Volume), attached_machine="m1")
        await world.kv.txn((), (Put(record.key, encode(attached)),))
        for _ in range(3):
            await world.keeper.tell_full()
        used["bytes"] = 1
        world.clock.now_s += 10.0
        await world.keeper.tell_full()
        used["bytes"] = int(1.9 * (1 << 30))
        await world.keeper.tell_full()
        listing = await world.kv.list(f"{keys.EVENTS}web/")
        told = [decode(item.value, Event) for item in listing.items]
        assert [(e.kind, e.fields["volume"]) for e in told] == [
            ("volume.full", volume_id),
            ("volume.nearly_full", volume_id),
        ]


async def test_a_volume_grows_by_itself_to_its_ceiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as world:
        volume_id = await world.make(2)
        request = pb.UpdateVolumeRequest(
            app_name="web", volume_id=volume_id, extend_percent=80, extend_gb=3, extend_limit_gb=6
        )
        await world.api.UpdateVolume(request, None)
        record = await world.kv.get(keys.volume("web", volume_id))
        assert record is not None
        attached = msgspec.structs.replace(decode(record.value, Volume), attached_machine="m1")
        await world.kv.txn((), (Put(record.key, encode(attached)),))

        async def usage(_: str) -> Usage:
            (held,) = await world.volumes.held()
            return Usage(used_bytes=held.record.size_gb << 30, size_bytes=held.record.size_gb << 30)

        monkeypatch.setattr(world.volumes, "usage", usage)
        for _ in range(4):
            world.clock.now_s += 10.0
            await world.keeper.tell_full()
        assert await world.promised_gb() == {volume_id: 6}
        (held,) = await world.volumes.held()
        assert held.record.size_gb == 6
        listing = await world.kv.list(f"{keys.EVENTS}web/")
        told = [decode(item.value, Event).kind for item in listing.items]
        assert told.count("volume.extended") == 2
        assert told.count("volume.full") == 1
