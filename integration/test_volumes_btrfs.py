"""Volumes on btrfs as their users have them: sizes hold, copies are whole, data outlives flyd."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import pytest

from flyd.cluster.layout import API_PORT
from integration.cluster import ended, promised, wait_for
from integration.volume_pools import APP, Pools
from integration.volume_records import damaged, missing, recording, untold_s
from volumes.pool import why_none

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(why_none()), reason=f"no btrfs: {why_none()}"),
]

LONG_S = 120.0  # on a busy machine; the kernel counts what a volume holds every 30 s
WRONG = 2
REFUSED = 5


@pytest.fixture(scope="module")
def pools() -> Generator[Pools]:
    made = Pools()
    try:
        made.deploy()
        yield made
    finally:
        made.destroy()


def test_a_volume_is_limited_copied_and_outlives_everything(pools: Pools) -> None:
    fly = pools.fly
    (volume,) = pools.volumes()
    assert pools.ask("/keep?line=one") == "ok"
    snapshot = fly("volumes", "snapshots", "create", volume["id"], "--app", APP, "--json").json()
    assert snapshot["consistent"]
    assert pools.ask("/keep?line=two") == "ok"
    forked = fly("volumes", "fork", volume["id"], "--name", "forked", "--app", APP, "--json").json()
    named = f"{volume['id']}/{snapshot['id']}"
    restored = fly("volumes", "create", "restored", "--from-snapshot", named, "--app", APP, "--json").json()
    assert (pools.lines_of(forked), pools.lines_of(restored)) == (["one", "two"], ["one"])

    assert pools.ask("/fill") == "EDQUOT"
    told = wait_for(lambda: _told(pools, "volume.full"), "the app's history says that it is full", LONG_S)
    assert volume["id"] in told
    assert "fly volumes extend" in told
    fly("volumes", "extend", volume["id"], "--size", "2", "--app", APP)
    assert pools.ask("/keep?line=three") == "ok"
    assert pools.ask("/empty") == "ok"

    host = pools.local.plan.host("ams")
    pools.local.kill_flyd(host)
    pools.local.wait_ready((host,))
    assert pools.lines_of(volume) == ["one", "two", "three"]
    (machine,) = fly("machine", "list", "--app", APP, "--json").json()
    fly("machine", "restart", machine["id"], "--app", APP)
    wait_for(lambda: pools.ask("/lines").split() == ["one", "two", "three"], "the app has its lines")
    assert pools.ask("/keep?line=four") == "ok"


def test_a_lost_hosts_volume_comes_back_from_its_copy(pools: Pools) -> None:
    fly = pools.fly
    volume = next(v for v in pools.volumes() if v["attached_machine_id"])
    assert volume["id"] in pools.fly("volumes", "list", "--app", APP).out
    assert "NONE" in pools.fly("volumes", "list", "--app", APP).out
    said = fly.refused(REFUSED, "volumes", "recover", volume["id"], "--app", APP, "--yes")
    assert "is alive" in said
    fly("volumes", "update", volume["id"], "--replicas", "1", "--every", "2s", "--app", APP)
    first_at_s = wait_for(lambda: _copied_at(pools, volume), "there is a copy", LONG_S)
    assert pools.ask("/keep?line=copied") == "ok"
    kept_at_s = time.time()
    wait_for(lambda: _copied_at(pools, volume) > kept_at_s, "there is a newer copy", LONG_S)
    verified = fly("volumes", "verify", volume["id"], "--app", APP, "--json").json()
    assert verified["compared_with"] == "ams-1" != verified["host"]
    with recording(lambda line: pools.ask(f"/keep?line={line}") == "ok") as records:
        wait_for(lambda: records.acked, "records are written")
        begun_s = time.time()
        wait_for(lambda: _copied_at(pools, volume) > begun_s, "there is a copy with records", LONG_S)
        time.sleep(0.5)  # some that no copy has
        pools.local.kill_host(pools.local.plan.host("ams"))
    wait_for(lambda: _host_lost(pools), "the loss of the host is seen")
    made = fly("volumes", "recover", volume["id"], "--app", APP, "--yes", "--json").json()
    came, aside = made["volume"], made["aside"]
    assert made["data_at"] >= first_at_s
    assert (aside["id"], aside["host"]) == (volume["id"], "ams-1")
    assert aside["name"] != came["name"] == volume["name"]
    region = came["region"]
    lines = wait_for(lambda: pools.ask("/lines", region).split(), "the app runs with the copy", LONG_S)
    assert "copied" in lines
    assert missing(records, lines, made["data_at"]) == [], "every record up to the copy is there"
    assert damaged(lines) == []
    newer_s = untold_s(records, lines, made["data_at"])
    print(f"{len(records.acked)} records, {len(missing(records, lines))} newer than the copy; ", end="")
    print(f"the newest that came back is {newer_s:.2f} s younger than the age told")
    assert abs(newer_s) < promised(2.0), "the age that is told is the data's"
    assert pools.ask("/keep?line=after", region) == "ok"

    pools.local.start_host(pools.local.plan.host("ams"))
    kept = pools.lines_of(aside)
    assert missing(records, kept) == [], "the lost host has them all"
    (machine,) = fly("machine", "list", "--app", APP, "--json").json()
    assert machine["host"] == came["host"]
    assert pools.lines_of(came) == [*lines, "after"]


def test_a_volume_moves_with_its_machine_while_it_is_written_to(pools: Pools) -> None:
    fly = pools.fly
    volume = next(v for v in pools.volumes() if v["attached_machine_id"])
    target = next(r for r in ("iad", "sin") if r != volume["region"])
    said = fly.refused(WRONG, "volumes", "move", volume["id"], "--to", volume["host"], "--app", APP)
    assert "already" in said
    assert fly.run("volumes", "move", volume["id"], "--to", "no-such", "--app", APP).code != 0
    kept = pools.ask("/lines", volume["region"]).split()
    moving = fly.start("volumes", "move", volume["id"], "--to", f"{target}-1", "--app", APP, "--json")
    while moving.poll() is None:
        line = f"n{len(kept)}"
        if pools.ask(f"/keep?line={line}", volume["region"]) == "ok":
            kept.append(line)
    told = ended(moving)
    assert told.code == 0, told.err
    made = told.json()
    assert (made["volume"]["host"], made["volume"]["name"]) == (f"{target}-1", volume["name"])
    print(f"moved {made['moved_bytes']} bytes, {made['downtime_s']:.2f} s without the machine")
    lines = wait_for(lambda: pools.ask("/lines", target).split(), "the app runs where the volume is", LONG_S)
    assert [n for n in kept if n not in lines] == [], "what was acknowledged is there"
    given_up = fly("volumes", "list", "--destroyed", "--app", APP, "--json").json()
    assert volume["id"] in [v["id"] for v in given_up]


def test_a_move_ends_well_though_both_hosts_flyds_are_killed(pools: Pools) -> None:
    volume = next(v for v in pools.volumes() if v["attached_machine_id"])
    home, plan = volume["region"], pools.local.plan
    away, watching = [host.region for host in plan.hosts if host.region != home]
    kept = pools.ask("/lines", home).split()
    api = f"{plan.host(watching).address}:{API_PORT}"
    words = ("volumes", "move", volume["id"], "--to", f"{away}-1", "--app", APP, "--json")
    moving = pools.fly.start(*words, api=api)
    for region in (home, away):
        pools.local.kill_flyd(plan.host(region))
    told = ended(moving, LONG_S)
    assert told.code == 0, told.err
    lines = wait_for(lambda: pools.ask("/lines", away).split(), "the app runs where the volume is", LONG_S)
    assert lines == kept
    assert [v["host"] for v in pools.volumes() if v["attached_machine_id"]] == [f"{away}-1"]


def _copied_at(pools: Pools, volume: dict[str, Any]) -> float:
    found = next(v for v in pools.volumes() if v["id"] == volume["id"])
    return float(found.get("newest_copy_at") or 0.0)


def _host_lost(pools: Pools) -> bool:
    hosts = pools.fly("hosts", "list", "--json").json()
    return next(h for h in hosts if h["region"] == "ams")["state"] != "up"


def _told(pools: Pools, kind: str) -> str:
    report = pools.fly("incidents", "list", "--app", APP).out
    return next((line for line in report.splitlines() if kind in line), "")


@pytest.mark.soak
def test_a_lost_hosts_volume_comes_back_by_itself(pools: Pools) -> None:
    fly = pools.fly
    volume = next(v for v in pools.volumes() if v["attached_machine_id"])
    fly("hosts", "grace", "10s")
    rule = ("--replicas", "1", "--every", "2s", "--recover-within", "10m", "--verify-every", "60s")
    fly("volumes", "update", volume["id"], *rule, "--app", APP)
    home = pools.local.plan.host(volume["region"])
    with recording(lambda line: pools.ask(f"/keep?line={line}", home.region) == "ok") as records:
        wait_for(lambda: records.acked, "records are written")
        begun_s = time.time()
        wait_for(lambda: _copied_at(pools, volume) > begun_s, "there is a copy with records", LONG_S)
        pools.local.kill_host(home)
    try:
        told = wait_for(lambda: _told(pools, "volume.recovered"), "it has come back by itself", LONG_S)
        assert "was" in _told(pools, "volume.recovering"), "its age at the loss is told"
        came = next(v for v in pools.volumes() if v["attached_machine_id"])
        assert came["host"] != home.name
        lines = wait_for(lambda: pools.ask("/lines", came["region"]).split(), "the app runs", LONG_S)
    finally:
        pools.local.start_host(home)
    lost = missing(records, lines)
    print(f"\n{told.strip()}\n{len(records.acked)} records, {len(lost)} newer than the copy")
    assert missing(records, lines, begun_s) == []
    assert damaged(lines) == []
    assert missing(records, pools.lines_of(volume)) == [], "the lost host's volume is aside, whole"
