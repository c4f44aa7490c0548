"""Scaling over the in-memory etcd: up, down, interrupted, refused, and while others change things."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec
import pytest

from flyd.api.context import ApiContext
from flyd.api.placement import PlacementServicer
from flyd.deploy import scale as scaling
from flyd.deploy.releases import DeployRun, Release, ReleaseStatus
from flyd.deploy.scale import Scale, Wish, plan_scale, scale
from flyd.errors import Conflict, InvalidInput, NotFound, Refused, Unavailable, Unplaceable
from flyd.machines import leases
from flyd.machines.commands import set_desired
from flyd.machines.free import free
from flyd.model import App, AppKind, Desired, Guest, Machine, Mount, Reservations, decode, encode
from flyd.placement.placer import Placer
from flyd.ports import Delete, Put, TxnResult, Unchanged
from flyd.store import keys
from flyd.store.memory import MemoryEtcd, MemoryKV
from flyd.store.mirror import Mirror
from flyd.v1 import placement_pb2 as pb
from tests.support.placing import CountedEntropy, FixedClock, join, make_host
from tests.support.rollouts import WEB, WORKER, make_config

SMALL = msgspec.structs.replace(WEB, guest=Guest(memory_mb=256))
DATA = msgspec.structs.replace(SMALL, mounts=(Mount(path="/data", name="data"),))
HOSTS = tuple(make_host(f"{region}-{n}") for region in ("ams", "iad") for n in (1, 2))  # 2 GB: 8 each


class CutKV(MemoryKV):
    """Fails the n-th transaction from now, before it takes effect; tells of each."""

    def __init__(self, server: MemoryEtcd) -> None:
        super().__init__(server)
        self.cut_at = 0
        self.before_txn: list[Any] = []

    async def txn(self, compares: Sequence[Unchanged], effects: Sequence[Put | Delete]) -> TxnResult:
        self.cut_at -= 1
        if self.cut_at == 0:
            raise Unavailable("this flyd has just died")
        if self.before_txn:
            await self.before_txn.pop(0)()
        return await super().txn(compares, effects)


class World:
    """An app with a complete release, and a flyd that scales it."""

    def __init__(self, kv: CutKV, mirror: Mirror) -> None:
        self.kv = kv
        self.mirror = mirror
        self.clock = FixedClock()
        self.placer = Placer(kv, mirror, clock=self.clock, entropy=CountedEntropy())

    async def scale(self, count: int, *regions: str, group: str = "", named: Sequence[str] = ()) -> Scale:
        self.clock.now_s += 1
        wish = Wish(app="chat", count=count, group=group, regions=regions)
        return await scale(self.kv, self.placer, wish, named or await self.going(wish))

    async def going(self, wish: Wish) -> list[str]:
        """What a dry run says is to be destroyed."""
        return [m.id for c in (await plan_scale(self.kv, wish)).changes for m in c.remove]

    async def machines(self) -> list[Machine]:
        listing = await self.kv.list(f"{keys.MACHINES}chat/")
        return [decode(item.value, Machine) for item in listing.items]

    async def there(self) -> dict[str, int]:
        """What is wanted in each region."""
        return dict(Counter(m.region for m in await self.machines() if m.desired is Desired.STARTED))

    async def app(self) -> App:
        record = await self.kv.get(keys.app("chat"))
        assert record is not None
        return decode(record.value, App)

    async def hosts_free(self) -> None:
        """The hosts have destroyed what they were to destroy."""
        for machine in await self.machines():
            if machine.desired is Desired.DESTROYED:
                await free(self.kv, machine.host, machine)


@asynccontextmanager
async def world(**groups: Any) -> AsyncGenerator[World]:
    kv = CutKV(MemoryEtcd())
    await join(kv, *HOSTS)
    await kv.put(keys.app("chat"), encode(App(name="chat", regions=("ams", "iad"))))
    config = make_config(**(groups or {"app": SMALL}))
    release = Release(version=1, app="chat", image="i", config=config, status=ReleaseStatus.COMPLETE)
    await kv.put(keys.release("chat", 1), encode(release))
    mirror = Mirror(kv, (keys.ROOT,))
    async with asyncio.TaskGroup() as tasks:
        keeping = tasks.create_task(mirror.keep())
        await mirror.wait_synced()
        yield World(kv, mirror)
        keeping.cancel()


@pytest.fixture(autouse=True)
def _no_drain(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setattr(scaling, "DRAIN_S", 0.0)


async def test_up_and_down_again_the_newest_first() -> None:
    async with world() as w:
        await w.scale(2)
        first = {m.id for m in await w.machines()}
        assert await w.there() == {"ams": 1, "iad": 1}
        await w.scale(5)
        assert await w.there() == {"ams": 3, "iad": 2}
        assert len({m.host for m in await w.machines()}) == 4  # spread over the hosts
        assert (await w.app()).counts == {"app": {"ams": 3, "iad": 2}}
        await w.scale(2)
        left = {m.id for m in await w.machines() if m.desired is Desired.STARTED}
        assert left == first
        gone = [m for m in await w.machines() if m.id not in first]
        assert all(m.cordoned and m.desired is Desired.DESTROYED for m in gone)
        assert (await w.app()).counts == {"app": {"ams": 1, "iad": 1}}
        await w.scale(0)
        assert await w.there() == {}
        assert (await w.app()).counts == {"app": {"ams": 0, "iad": 0}}


async def test_one_region_leaves_the_others_and_may_be_new() -> None:
    async with world(app=SMALL, worker=WORKER) as w:
        await join(w.kv, make_host("sin-1"))
        await w.scale(2)
        await w.scale(3, "ams")
        await w.scale(2, "sin", group="worker")
        assert await w.there() == {"ams": 3, "iad": 1, "sin": 2}
        app = await w.app()
        assert app.regions == ("ams", "iad", "sin")
        assert app.counts == {"app": {"ams": 3, "iad": 1, "sin": 0}, "worker": {"sin": 2}}


async def test_no_room_for_all_changes_nothing() -> None:
    async with world() as w:
        with pytest.raises(Unplaceable) as refusal:
            await w.scale(17, "ams")  # 8 fit on each of two hosts
        assert sorted(refusal.value.reasons) == ["ams-1", "ams-2", "iad-1", "iad-2"]
        assert (await w.machines(), (await w.app()).counts) == ([], {})
        await w.scale(16, "ams")
        assert await w.there() == {"ams": 16}


async def test_only_what_somebody_agreed_to_is_destroyed() -> None:
    async with world() as w:
        await w.scale(4, "ams")
        with pytest.raises(Conflict, match="nobody has agreed to"):
            await w.scale(2, "ams", named=[max(await w.machines(), key=lambda m: m.created_at_s).id])
        assert await w.there() == {"ams": 4}


async def test_a_machine_that_somebody_holds_is_not_taken_away() -> None:
    async with world() as w:
        await w.scale(2, "ams")
        newest = max(await w.machines(), key=lambda m: (m.created_at_s, m.id))
        held = await leases.acquire(
            w.kv, "chat", newest.id, owner="ann", ttl_s=60, clock=w.clock, entropy=CountedEntropy("lease")
        )
        with pytest.raises(Conflict, match=f"machine {newest.id} is leased by ann"):
            await w.scale(1, "ams")
        assert newest in await w.machines()
        await leases.release(w.kv, "chat", newest.id, held.nonce)
        await w.scale(1, "ams")
        assert await w.there() == {"ams": 1}


async def test_volumes_stay_and_are_taken_again() -> None:
    async with world(app=DATA) as w:
        await w.scale(2, "ams")
        held = {m.config.mounts[0].volume for m in await w.machines()}
        await w.scale(0, "ams")
        await w.hosts_free()
        promised = [decode(i.value, Reservations) for i in (await w.kv.list(keys.RESERVATIONS)).items]
        assert {volume for r in promised for volume in r.volumes_gb} == held
        await w.scale(2, "ams")
        assert {m.config.mounts[0].volume for m in await w.machines()} == held


async def test_a_scale_that_was_cut_off_anywhere_is_finished_by_asking_again() -> None:
    for cut_at in range(1, 8):
        async with world() as w:
            await w.scale(2)
            for count, there in ((6, {"ams": 3, "iad": 3}), (2, {"ams": 1, "iad": 1})):
                w.kv.cut_at = cut_at
                try:
                    await w.scale(count)
                except Unavailable:
                    assert sum((await w.there()).values()) >= 2  # never below what was asked for
                    await w.scale(count)
                assert await w.there() == there


async def test_never_below_the_count_whatever_others_destroy_meanwhile() -> None:
    async with world() as w:
        await w.scale(4, "ams")
        oldest = min(await w.machines(), key=lambda m: (m.created_at_s, m.id))

        async def somebody_destroys() -> None:
            await set_desired(MemoryKV(w.kv.server), "chat", oldest.id, Desired.DESTROYED)

        w.kv.before_txn = [somebody_destroys]
        await w.scale(3, "ams")
        assert await w.there() == {"ams": 3}


async def test_what_can_not_be_scaled_says_why() -> None:
    async with world() as w:
        with pytest.raises(InvalidInput, match="1001 machines: it must be 0 to 1000"):
            await w.scale(1001)
        with pytest.raises(NotFound, match="has no process group 'cron'"):
            await w.scale(1, group="cron")
        await w.kv.put(keys.run("chat", "r"), encode(DeployRun(id="r", app="chat", version=2, regions=())))
        with pytest.raises(Conflict, match="app chat is being deployed"):
            await w.scale(3)
        for name, kind, words in (
            ("db", AppKind.POSTGRES, "one by one"),
            ("new", AppKind.APP, "no complete"),
        ):
            await w.kv.put(keys.app(name), encode(App(name=name, kind=kind, regions=("ams",))))
            with pytest.raises(Refused, match=words):
                await plan_scale(w.kv, Wish(app=name, count=1))
        with pytest.raises(NotFound, match="no app is called"):
            await plan_scale(w.kv, Wish(app="nobody", count=1))


# --------------------------------------------------------------------------- over the API


def service(w: World) -> PlacementServicer:
    unused = cast(Any, None)
    context = ApiContext(
        host=HOSTS[0],
        kv=w.kv,
        mirror=w.mirror,
        clock=w.clock,
        entropy=CountedEntropy(),
        driver=unused,
        sources=unused,
        peers=unused,
        etcd_endpoints=(),
    )
    return PlacementServicer(context, w.placer)


async def test_a_dry_run_shows_the_plan_with_each_hosts_verdict_and_changes_nothing() -> None:
    async with world() as w:
        await w.scale(1, "ams")
        request = pb.ScaleAppRequest(app_name="chat", regions=["ams", "iad"], count=3, dry_run=True)
        planned = await service(w).ScaleApp(request, None)
        assert [(c.region, c.have, c.want, list(c.create_hosts)) for c in planned.changes] == [
            ("ams", 1, 2, ["ams-2"]),
            ("iad", 0, 1, ["iad-1"]),
        ]
        verdicts = [(v.host, v.rank, v.reason) for v in planned.changes[0].verdicts]
        assert verdicts == [
            ("ams-2", 1, "0 of group app here, 1 in ams, 2048 MB memory free"),
            ("ams-1", 2, "1 of group app here, 1 in ams, 1792 MB memory free"),
            ("iad-1", 0, "wrong region iad (ams wanted)"),
            ("iad-2", 0, "wrong region iad (ams wanted)"),
        ]
        assert await w.there() == {"ams": 1}
        request.dry_run = False
        done = await service(w).ScaleApp(request, None)
        assert await w.there() == {"ams": 2, "iad": 1}
        assert set(done.created_ids) < {m.id for m in await w.machines()}
        assert len(done.created_ids) == 2
        less = pb.ScaleAppRequest(app_name="chat", regions=["ams", "iad"], count=2, dry_run=True)
        (going,) = [i for c in (await service(w).ScaleApp(less, None)).changes for i in c.destroy_ids]
        less.dry_run = False
        less.destroy_ids.append(going)
        assert list((await service(w).ScaleApp(less, None)).destroyed_ids) == [going]


async def test_hosts_without_the_labels_that_fly_toml_requires_are_refused_with_the_reason() -> None:
    async with world(app=msgspec.structs.replace(SMALL, host_labels={"disk": "nvme"})) as w:
        await join(w.kv, msgspec.structs.replace(HOSTS[1], labels={"disk": "nvme"}))
        request = pb.ScaleAppRequest(app_name="chat", regions=["ams"], count=2, dry_run=True)
        (change,) = (await service(w).ScaleApp(request, None)).changes
        assert list(change.create_hosts) == ["ams-2", "ams-2"]
        reasons = {v.host: v.reason for v in change.verdicts}
        assert reasons["ams-1"] == "its label disk is not set (nvme wanted)"
        asked = pb.PreviewPlacementRequest(app_name="chat", process_group="app", region="ams")
        placed = (await service(w).PreviewPlacement(asked, None)).verdicts
        assert [v.host for v in placed if v.accepted] == ["ams-2"]
        with pytest.raises(Unplaceable) as refusal:
            await w.scale(1, "iad")
        assert refusal.value.reasons["iad-1"] == "its label disk is not set (nvme wanted)"


async def test_a_preview_gives_every_host_a_verdict() -> None:
    async with world() as w:
        request = pb.PreviewPlacementRequest(app_name="chat", memory_mb=1024, host_labels={"disk": "nvme"})
        verdicts = (await service(w).PreviewPlacement(request, None)).verdicts
        assert {v.reason for v in verdicts} == {"its label disk is not set (nvme wanted)"}
        request = pb.PreviewPlacementRequest(app_name="chat", process_group="app", region="iad")
        verdicts = (await service(w).PreviewPlacement(request, None)).verdicts
        assert [(v.host, v.accepted) for v in verdicts] == [
            ("iad-1", True), ("iad-2", True), ("ams-1", False), ("ams-2", False)
        ]  # fmt: skip
        with pytest.raises(InvalidInput, match="no kind of CPU"):
            await service(w).PreviewPlacement(
                pb.PreviewPlacementRequest(app_name="chat", cpu_kind="quantum"), None
            )
