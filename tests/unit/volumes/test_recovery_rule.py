"""A lost host's volume comes back by itself as its rule says, and never from a host that is just away."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from flyd.errors import InvalidInput
from flyd.hosts.membership import LEASE_TTL_S
from flyd.model import Event, Volume, decode, encode
from flyd.model.cluster import LossRule
from flyd.ports import Put, Unchanged
from flyd.storage.copies import VolumeCopy
from flyd.storage.recovery_rule import check_rule, judge
from flyd.storage.rescuer import AGAIN_S, VolumeRescuer
from flyd.store import keys
from tests.support.volume_site import HOSTS, VOLUME, Site, memory, running

__all__ = ["memory"]  # a fixture
NOW_S, GRACE_S = 10_000.0, 60.0
RULED = replace(VOLUME, recover_max_age_s=300.0)
NO_GUARD = Unchanged(keys.leader("none"), 0)


def copy(host: str, age_s: float) -> VolumeCopy:
    return VolumeCopy(
        app="web", volume="vol1", host=host, source="ams-1", snapshot="s",
        made_at_s=NOW_S - age_s, copied_at_s=NOW_S, size_gb=2, used_bytes=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("volume", "copies", "alive", "lost", "silent_s", "host", "held"),
    [
        (RULED, [copy("iad-1", 100)], "iad-1 sin-1", "ams-1", 61.0, "iad-1", ""),
        (RULED, [copy("iad-1", 100), copy("sin-1", 90)], "iad-1 sin-1", "ams-1", 61.0, "sin-1", ""),
        (RULED, [copy("iad-1", 100)], "iad-1 sin-1", "ams-1", 59.0, "", ""),  # only just away
        (VOLUME, [copy("iad-1", 100)], "iad-1 sin-1", "ams-1", 61.0, "", ""),  # no rule
        (RULED, [copy("iad-1", 361)], "iad-1 sin-1", "ams-1", 61.0, "iad-1", ""),  # 300 s old at the loss
        (
            RULED,
            [copy("iad-1", 363)],
            "iad-1 sin-1",
            "ams-1",
            61.0,
            "",
            "was 302 s old when ams-1 fell silent",
        ),
        (RULED, [copy("iad-1", 4000)], "iad-1 sin-1", "ams-1", 3800.0, "iad-1", ""),  # age is of the loss
        (
            RULED,
            [copy("iad-1", 100)],
            "sin-1 ams-2",
            "ams-1 iad-1",
            61.0,
            "",
            "no host that lives has a copy",
        ),
        (RULED, [], "iad-1 sin-1", "ams-1", 61.0, "", "no host that lives has a copy"),
        (RULED, [copy("iad-1", 100)], "iad-1", "ams-1 sin-1", 61.0, "", "2 of 3 hosts are lost"),
        (RULED, [copy("iad-1", -50)], "iad-1 sin-1", "ams-1", 61.0, "iad-1", ""),  # a clock was set back
    ],
)
def test_what_the_rule_says(
    volume: Volume, copies: list[VolumeCopy], alive: str, lost: str, silent_s: float, host: str, held: str
) -> None:
    verdict = judge(
        volume, copies, alive.split(), lost.split(), silent_s=silent_s, grace_s=GRACE_S, now_s=NOW_S
    )
    assert verdict.host == host
    assert held in verdict.held
    assert bool(held) == bool(verdict.held)


@pytest.mark.parametrize(
    ("max_age_s", "replicas"), [(-1.0, 1), (31 * 86400.0, 1), (float("inf"), 1), (60, 0)]
)
def test_rules_that_make_no_sense(max_age_s: float, replicas: int) -> None:
    with pytest.raises(InvalidInput):
        check_rule(max_age_s, replicas)


class Rescue:
    """A leader's rescuer, and the hosts that it asks."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.asked: list[str] = []
        self.rescuer = VolumeRescuer(site.kv, site.mirror, self.recover, clock=site.clock)

    async def recover(self, host: str, app: str, volume_id: str) -> None:
        self.asked.append(host)
        await self.site.recovery(next(h for h in HOSTS if h.name == host)).recover(app, volume_id)
        await self.site.seen()

    async def look(self, after_s: float = 0.0) -> None:
        self.site.clock.now_s += after_s
        await self.rescuer.look(NO_GUARD)
        await self.site.seen()

    async def told(self) -> list[str]:
        listing = await self.site.kv.list(f"{keys.EVENTS}web/")
        return [f"{e.kind}: {e.message}" for e in (decode(i.value, Event) for i in listing.items)]


async def _lost(site: Site, max_age_s: float) -> Rescue:
    await site.write("one")
    await site.round()
    there = (await site.volumes())["vol1"]
    await site.put(replace(there, recover_max_age_s=max_age_s))
    await site.kv.txn((), (Put(keys.HOST_LOSS, encode(LossRule(grace_s=30.0))),))
    site.clock.now_s += 10.0
    await site.lose("ams-1")
    return Rescue(site)


async def test_it_comes_back_once_after_the_grace_and_says_the_age(memory: Path) -> None:
    async with running(memory) as site:
        rescue = await _lost(site, 60.0)
        await rescue.look()
        await rescue.look(30.0 - LEASE_TTL_S - 1.0)
        assert rescue.asked == [], "a host that is only just away keeps its volume"
        await rescue.look(2.0)
        assert rescue.asked == ["iad-1"]
        assert (await site.machine()).host == "iad-1"
        there = await site.volumes()
        came = next(v for v in there.values() if v.attached_machine)
        assert (came.host, came.recover_max_age_s) == ("iad-1", 60.0)
        assert there["vol1"].name.startswith("data_aside_")
        for _ in range(3):
            await rescue.look(AGAIN_S + 1.0)
        assert rescue.asked == ["iad-1"], "what was put aside stays aside"
        told = [line for line in await rescue.told() if "recover" in line]
        assert [line.partition(":")[0] for line in told] == ["volume.recovering", "volume.recovered"]
        assert "was 5 s old when the host fell silent" in told[0], told[0]
        assert " s old" in told[1]


async def test_too_old_a_copy_is_told_of_once_and_nothing_changes(memory: Path) -> None:
    async with running(memory) as site:
        rescue = await _lost(site, 4.0)
        await rescue.look()
        for _ in range(3):
            await rescue.look(40.0)
        assert rescue.asked == []
        told = [line for line in await rescue.told() if "recover" in line]
        assert len(told) == 1
        assert "its rule allows 4 s" in told[0]


async def test_a_host_that_comes_back_in_time_keeps_it(memory: Path) -> None:
    async with running(memory) as site:
        rescue = await _lost(site, 60.0)
        await rescue.look()
        await site.kv.txn((), (Put(keys.alive("ams-1"), b"1"),))
        await site.seen()
        await rescue.look(100.0)
        await site.lose("ams-1")
        await rescue.look()
        assert rescue.asked == [], "the silence began anew"
