"""Volumes of hosts in containers, over long: a killed host's records; mounts while hosts vanish.

FLY_CHAOS_MINUTES=10 pytest integration/docker/test_docker_volume_records.py -m soak -s
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Generator

import pytest

from integration.cluster import REGIONS, promised, wait_for
from integration.docker.conftest import World
from integration.docker.hosts import REJOIN_S
from integration.docker.volume_world import APP, VolumeWorld, settled
from integration.volume_records import damaged, missing, recording, untold_s
from volumes.pool import why_none

CHAOS_MINUTES = float(os.environ.get("FLY_CHAOS_MINUTES", "2"))
pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(900 + CHAOS_MINUTES * 120),
    pytest.mark.skipif(bool(why_none()), reason=f"no btrfs: {why_none()}"),
]
HOME = "sin"


@pytest.fixture
def keeper(world: World) -> Generator[VolumeWorld]:
    made = VolumeWorld(world.hosts, HOME, beats=True)
    try:
        yield made
    finally:
        made.destroy()


def test_a_killed_hosts_records_come_back_as_far_as_they_were_copied(keeper: VolumeWorld) -> None:
    hosts, volume = keeper.hosts, keeper.volume()
    hosts.fly("volumes", "update", volume["id"], "--replicas", "1", "--every", "2s", "--app", APP)
    keeper.wait_copied(0.0)
    with recording(keeper.keep) as records:
        wait_for(lambda: len(records.acked) > 20, "records are written")
        keeper.wait_copied(time.time())
        time.sleep(0.7)  # some that no copy has
        hosts.chaos("kill-host", HOME)
        killed_s = time.time()
    try:
        wait_for(lambda: _lost(keeper), "the loss of the host is seen")
        made = hosts.fly("volumes", "recover", volume["id"], "--app", APP, "--yes", "--json").json()
        wait_for(lambda: keeper.ask("/"), "the application answers", 120.0)
        lines = keeper.lines(made["volume"])
    finally:
        hosts.fly("cluster", "start-host", "--name", hosts.name, HOME)
    newer_s = untold_s(records, lines, made["data_at"])
    late, age_s = len(missing(records, lines)), killed_s - made["data_at"]
    print(f"\n{len(records.acked)} records acknowledged, {late} of them after the copy. When the host was ")
    print(f"killed it was {age_s:.2f} s old as told, {age_s - newer_s:.2f} s by the writer's clock")
    assert missing(records, lines, made["data_at"]) == [], "every record up to the copy is there"
    assert damaged(lines) == []
    assert abs(newer_s) < promised(1.0), "the age that is told is the data's"
    wait_for(lambda: not _lost(keeper), "the host is back", REJOIN_S)
    assert missing(records, keeper.lines(made["aside"])) == [], "the lost host's volume has them all, aside"


def test_no_two_mounts_while_hosts_vanish_and_the_volume_moves(keeper: VolumeWorld) -> None:
    seed = int(os.environ.get("FLY_CHAOS_SEED", str(int(time.time()))))
    chance = random.Random(seed)
    print(f"\nFLY_CHAOS_SEED={seed}")
    counted: dict[str, int] = {}
    end_s = time.monotonic() + CHAOS_MINUTES * 60
    with recording(keeper.keep) as records:
        while time.monotonic() < end_s:
            what, region = (
                chance.choice(("pause", "partition", "kill", "flyd", "move")),
                chance.choice(REGIONS),
            )
            counted[what] = counted.get(what, 0) + 1
            _break(keeper, what, region, chance.uniform(1.0, 12.0))
            settled(keeper)
    volume = keeper.volume()
    lines, beats = keeper.lines(volume), keeper.on_disk(volume, "beats")
    mounts = mounted(beats)
    shown = ", ".join(f"{number} {what}" for what, number in sorted(counted.items()))
    print(f"{shown}: {len(records.acked)} records, {len(missing(records, lines))} lost; {len(mounts)} mounts")
    assert len(mounts) > 1
    assert double(mounts) == []
    assert missing(records, lines) == [], "nobody brought anything back from a copy: nothing may be lost"
    assert damaged(lines) == []


def _break(keeper: VolumeWorld, what: str, region: str, seconds: float) -> None:
    hosts = keeper.hosts
    match what:
        case "pause":
            hosts.chaos("pause-host", region)
            time.sleep(seconds)
            hosts.chaos("resume-host", region)
        case "partition":
            hosts.chaos("partition", region)
            time.sleep(seconds)
            hosts.chaos("heal", region)
        case "kill":
            hosts.chaos("kill-host", region)
            time.sleep(seconds)
            hosts.fly("cluster", "start-host", "--name", hosts.name, region)
        case "flyd":
            hosts.chaos("kill-flyd", region)
        case _:
            if keeper.volume()["region"] != region:
                try:
                    keeper.move(f"{region}-1")
                except AssertionError as error:  # a host is only just coming back: the next one goes
                    print(f"not moved to {region}: {str(error)[:200]}")


def mounted(beats: list[str]) -> list[tuple[float, float, str]]:
    """Who had the volume from when to when, by what each noted on it."""
    spans: dict[str, tuple[float, float]] = {}
    for beat in beats:
        me, _, at = beat.partition(" ")
        first_s, last_s = spans.get(me, (float(at), float(at)))
        spans[me] = min(first_s, float(at)), max(last_s, float(at))
    return sorted((first_s, last_s, me) for me, (first_s, last_s) in spans.items())


def double(mounts: list[tuple[float, float, str]]) -> list[tuple[str, str]]:
    """Pairs that had it at one instant."""
    found: list[tuple[str, str]] = []
    for (_, last_s, one), (first_s, _, other) in itertools.pairwise(mounts):
        if first_s <= last_s:
            found.append((one, other))
    return found


@pytest.mark.parametrize(
    ("beats", "pairs"),
    [
        (["a 1.0", "a 2.0", "b 2.5", "b 3.0"], []),
        (["a 1.0", "b 1.5", "a 2.0", "b 3.0"], [("a", "b")]),
    ],
)
def test_the_checker_finds_two(beats: list[str], pairs: list[tuple[str, str]]) -> None:
    assert double(mounted(beats)) == pairs


def _lost(keeper: VolumeWorld) -> bool:
    hosts = keeper.hosts.fly("hosts", "list", "--json").json()
    return next(h for h in hosts if h["region"] == HOME)["state"] != "up"
