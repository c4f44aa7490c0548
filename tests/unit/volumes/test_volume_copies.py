"""Copies on other hosts: which are due, that they are made, and a lost host's volume coming back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from flyd.errors import (
    Conflict,
    FlydError,
    InvalidInput,
    NotFound,
    OutcomeUnknown,
    Refused,
    Unavailable,
    Unplaceable,
)
from flyd.model import (
    App,
    AppKind,
    Desired,
    Event,
    Guest,
    Mount,
    decode,
)
from flyd.storage import records
from flyd.storage.copies import VolumeCopy, check_policy, copy_id, newest, pause_s, plan_copies
from flyd.storage.keeper import VolumeKeeper
from flyd.store import keys
from tests.support.placing import join
from tests.support.volume_site import HOSTS, MACHINE, VOLUME, Site, Stop, failing, memory, running

__all__ = ["memory"]  # a fixture
NOW_S = 1000.0


def copy(host: str, age_s: float) -> VolumeCopy:
    return VolumeCopy(
        app="web", volume="vol1", host=host, source="ams-1", snapshot=f"s{age_s}",
        made_at_s=NOW_S - age_s, copied_at_s=NOW_S, size_gb=2, used_bytes=1,
    )  # fmt: skip


ROOM = {"ams-1": 10, "ams-2": 10, "iad-1": 5, "sin-1": 8}


@pytest.mark.parametrize(
    ("replicas", "copies", "alive", "due"),
    [
        (0, [], "ams-1 ams-2 iad-1 sin-1", []),
        (1, [], "ams-1 ams-2 iad-1 sin-1", ["sin-1"]),  # another region, most room
        (2, [], "ams-1 ams-2 iad-1 sin-1", ["sin-1", "iad-1"]),
        (1, [], "ams-1 ams-2", ["ams-2"]),  # the same region is better than none
        (1, [], "ams-1", []),
        (1, [copy("iad-1", 100)], "ams-1 iad-1 sin-1", []),
        (1, [copy("iad-1", 900)], "ams-1 iad-1 sin-1", ["iad-1"]),  # goes on where it was
        (1, [copy("iad-1", -5000)], "ams-1 iad-1 sin-1", ["iad-1"]),  # the clock was set back
        (1, [copy("iad-1", 100)], "ams-1 sin-1", ["sin-1"]),  # its host is lost
        (2, [copy("iad-1", 100)], "ams-1 iad-1 sin-1", ["sin-1"]),
        (1, [copy("iad-1", 1000), copy("sin-1", 950)], "ams-1 iad-1 sin-1", ["sin-1"]),
        (1, [copy("ams-1", 100)], "ams-1 sin-1", ["sin-1"]),  # one on its own host is none
    ],
)
def test_which_hosts_get_a_copy_now(
    replicas: int, copies: list[VolumeCopy], alive: str, due: list[str]
) -> None:
    living = [h for h in HOSTS if h.name in alive.split()]
    plan = plan_copies(replace(VOLUME, replicas=replicas), copies, living, ROOM, NOW_S)
    assert list(plan.due) == due


def test_a_first_copy_goes_on_where_it_was_begun() -> None:
    plan = plan_copies(VOLUME, [], HOSTS, {**ROOM, "iad-1": 0}, NOW_S, ["iad-1"])
    assert plan.due == ("iad-1",)


def test_why_there_are_too_few() -> None:
    full = plan_copies(VOLUME, [], HOSTS, {"ams-2": 1, "iad-1": 0}, NOW_S)
    assert (full.due, "less than 2 GB free" in full.lacking) == ((), True)
    cordoned = [replace(h, cordoned=True) for h in HOSTS]
    assert plan_copies(VOLUME, [], cordoned, ROOM, NOW_S).due == ()
    assert plan_copies(VOLUME, [copy("iad-1", 1)], cordoned, ROOM, NOW_S).lacking == ""


@pytest.mark.parametrize(
    ("replicas", "every_s"), [(-1, 900), (4, 900), (1, 0), (1, -5), (1, 0.9), (1, float("inf")), (1, 1e9)]
)
def test_settings_that_make_no_sense(replicas: int, every_s: float) -> None:
    with pytest.raises(InvalidInput, match="it must be"):
        check_policy(replicas, every_s)


def test_the_newest_and_the_pace() -> None:
    assert newest([]) is None
    assert newest([copy("iad-1", 50), copy("sin-1", 10)]) == copy("sin-1", 10)
    assert pause_s(100, 0.5, 100) == 0.5
    assert pause_s(100, 2.0, 100) == 0.0
    assert pause_s(100, 0.0, 0) == 0.0


async def test_copies_are_made_when_due_and_only_of_what_changed(memory: Path) -> None:
    async with running(memory) as site:
        await site.round()  # no machine has written anything yet
        assert await site.copies() == []
        await site.write("one")
        for _ in range(3):
            await site.round()
        (made,) = await site.copies()
        assert (made.host, made.made_at_s, made.consistent) == ("iad-1", site.clock.now_s, False)
        assert (await site.promised("iad-1")).volumes_gb == {copy_id("vol1"): 2}
        assert len(site.orders) == 1
        await site.write("two")
        for _ in range(4):
            await site.round(900.0)
        (made,) = await site.copies()
        assert made.made_at_s == site.clock.now_s
        kept = await site.stores["iad-1"].snapshots(copy_id("vol1"))
        assert len(kept) == 2
        assert len(await site.stores["ams-1"].snapshots("vol1")) == 2
        assert site.orders[-1].parents[-1] == site.orders[-2].snapshot
        assert site.moved[0] > 2_000_000
        assert site.moved[-1] < 20_000
        assert await site.stores["iad-1"].digest(copy_id("vol1"), made.snapshot) == await site.stores[
            "ams-1"
        ].digest("vol1")


async def test_a_copy_that_was_cut_short_goes_on(memory: Path) -> None:
    async with running(memory) as site:
        await site.write("one")
        site.cut_after = 4
        await site.round()
        assert await site.copies() == []
        await site.round(1.0)  # not again at once
        assert len(site.orders) == 1
        await site.round(60.0)
        assert len(await site.copies()) == 1
        assert site.orders[0].snapshot == site.orders[1].snapshot
        assert site.moved[0] < 1_500_000  # the rest


async def test_copies_that_fail_are_told_of_once_and_so_is_their_return(memory: Path) -> None:
    async with running(memory) as site:
        await site.write("one")
        for host in ("ams-2", "iad-1", "sin-1"):
            await site.lose(host)
        for _ in range(3):
            await site.round(60.0)
        await join(site.kv, *HOSTS)
        for _ in range(2):
            await site.round(60.0)
        listing = await site.kv.list(f"{keys.EVENTS}web/")
        told = [decode(item.value, Event) for item in listing.items]
        assert [e.kind for e in told] == ["volume.copy_failed", "volume.copied_again"]
        assert "wanted on other hosts: 1, possible: 0" in told[0].message


async def test_a_copy_of_a_volume_that_is_elsewhere_by_now_is_refused(memory: Path) -> None:
    async with running(memory) as site:
        await site.write("one")
        await site.round()
        await site.put(replace(VOLUME, host="sin-1"))
        with pytest.raises(NotFound, match="is not on ams-1"):
            await site.receivers["iad-1"].keep(site.orders[0])


async def _copied(site: Site) -> None:
    await site.write("one")
    await site.round()
    await site.write("lost")


async def test_copies_of_a_volume_that_is_no_more_go_a_day_later(memory: Path) -> None:
    async with running(memory) as site:
        await _copied(site)
        keeper = VolumeKeeper("iad-1", site.kv, site.stores["iad-1"], clock=site.clock, entropy=site.entropy)
        await keeper.round()
        assert len(await site.copies()) == 1
        await site.put(replace(VOLUME, attached_machine=""))
        await records.destroy(site.kv, "web", "vol1", site.clock.now_s, entropy=site.entropy)
        await keeper.round()
        assert len(await site.copies()) == 1  # it can still come back
        (destroyed,) = await records.list_destroyed(site.kv)
        await records.forget(site.kv, destroyed, entropy=site.entropy)
        for _ in range(2):
            await keeper.round()
        assert await site.copies() == []
        assert len(await site.stores["iad-1"].held()) == 1
        site.clock.now_s += records.KEPT_S
        await keeper.round()
        assert await site.stores["iad-1"].held() == ()
        assert (await site.promised("iad-1")).volumes_gb == {}
        assert await records.list_destroyed(site.kv) == ()


async def test_copies_on_every_host_and_promises_without_any_are_given_back(memory: Path) -> None:
    """One host has a copy, another the promise for one only: its flyd died in between."""
    async with running(memory) as site:
        await _copied(site)
        promised = replace(VOLUME, id=copy_id("vol1"), host="sin-1")
        await records.promise(site.kv, promised, entropy=site.entropy)
        keepers = [
            VolumeKeeper(host, site.kv, site.stores[host], clock=site.clock, entropy=site.entropy)
            for host in ("iad-1", "sin-1")
        ]
        await site.put(replace(VOLUME, attached_machine=""))
        await records.destroy(site.kv, "web", "vol1", site.clock.now_s, entropy=site.entropy)
        (destroyed,) = await records.list_destroyed(site.kv)
        await records.forget(site.kv, destroyed, entropy=site.entropy)
        for after_s in (0.0, records.KEPT_S):
            site.clock.now_s += after_s
            for keeper in keepers:
                await keeper.round()
        for host in ("iad-1", "sin-1"):
            assert (await site.promised(host)).volumes_gb == {}, host


async def test_a_lost_hosts_volume_comes_back_with_its_machine(memory: Path) -> None:
    async with running(memory) as site:
        await _copied(site)
        with pytest.raises(Refused, match="is alive: what it has is newer"):
            await site.recovery(HOSTS[2]).recover("web", "vol1")
        await site.lose("ams-1")
        with pytest.raises(Unavailable, match="sin-1 has no copy"):
            await site.recovery(HOSTS[3]).recover("web", "vol1")
        at_s = site.clock.now_s
        site.clock.now_s += 40.0
        made = await site.recovery(HOSTS[2]).recover("web", "vol1")
        assert made.data_at_s == at_s
        machine, there = await site.machine(), await site.volumes()
        assert (machine.host, machine.region, machine.epoch) == ("iad-1", "iad", 4)
        assert machine.config.mounts[0].volume == made.volume.id
        assert there[made.volume.id] == made.volume
        assert (made.volume.attached_machine, made.volume.epoch, made.volume.replicas) == ("m1", 1, 1)
        assert there["vol1"] == made.aside
        assert (made.aside.host, made.aside.attached_machine) == ("ams-1", "")
        assert made.aside.name.startswith("data_aside_")
        data = Path(await site.stores["iad-1"].attach(made.volume.id, "m1", made.volume.epoch))
        assert (data / "file").read_text() == "one"
        held = await site.promised("iad-1")
        assert held.volumes_gb == {copy_id("vol1"): 2, made.volume.id: 2}
        assert list(held.machines) == list(held.addresses) == ["m1"]
        assert (memory / "ams-1" / "vol1" / "data" / "file").read_text() == "lost"  # untouched
        with pytest.raises((Conflict, Unavailable, Refused)):  # it has no machine to follow it any more
            await site.recovery(HOSTS[3]).recover("web", "vol1")


async def test_what_can_not_come_back_changes_nothing(memory: Path) -> None:
    async with running(memory) as site:
        await _copied(site)
        await site.lose("ams-1")
        before = await site.volumes()
        two = (*MACHINE.config.mounts, Mount(path="/more", volume="vol9", name="more"))
        huge = replace(MACHINE.config, guest=Guest(memory_mb=64 * 1024))
        for changed, error, text in (
            (App(name="web", kind=AppKind.POSTGRES), Refused, "member of Postgres cluster"),
            (replace(MACHINE, config=replace(MACHINE.config, mounts=two)), Refused, "has 2 volumes"),
            (replace(MACHINE, desired=Desired.DESTROYED), Conflict, "is being destroyed"),
            (replace(MACHINE, config=huge), Unplaceable, "MB memory"),
        ):
            await site.put(changed)
            with pytest.raises(error, match=text):
                await site.recovery(HOSTS[2]).recover("web", "vol1")
            await site.put(App(name="web", regions=("ams",)), MACHINE)
        assert await site.volumes() == before
        assert [h.id for h in await site.stores["iad-1"].held()] == [copy_id("vol1")]
        with pytest.raises(NotFound):
            await site.recovery(HOSTS[2]).recover("web", "vol7")


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("lost", [False, True])
async def test_a_recovery_cut_short_is_all_or_nothing(
    memory: Path, monkeypatch: pytest.MonkeyPatch, at: int, after: bool, lost: bool
) -> None:
    """Around each of its transactions flyd dies, or the answer is lost; then somebody asks again."""
    async with running(memory) as site:
        await _copied(site)
        await site.lose("ams-1")
        done = False
        with monkeypatch.context() as patch:
            error: Callable[[], Exception] = (lambda: OutcomeUnknown("?")) if lost else Stop
            patch.setattr(site.kv, "txn", failing(site.kv.txn, at, error, after=after))
            try:
                await site.recovery(HOSTS[2]).recover("web", "vol1")
                done = True
            except (Stop, FlydError):
                pass
        assert done or not lost
        if not done and (await site.machine()).host == "ams-1":
            await site.recovery(HOSTS[2]).recover("web", "vol1")
        site.clock.now_s += records.KEPT_S
        keeper = VolumeKeeper("iad-1", site.kv, site.stores["iad-1"], clock=site.clock, entropy=site.entropy)
        await keeper.round()
        there = await site.volumes()
        attached = [v for v in there.values() if v.attached_machine]
        assert [(v.host, v.attached_machine) for v in attached] == [("iad-1", "m1")]
        assert (await site.machine()).config.mounts[0].volume == attached[0].id
        held = sorted(h.id for h in await site.stores["iad-1"].held())
        assert held == sorted([copy_id("vol1"), attached[0].id])
        assert sorted((await site.promised("iad-1")).volumes_gb) == held
