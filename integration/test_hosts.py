"""Hosts are drained, cordoned and lost by the command's word, with real processes on them.

The app here has a machine in each region. It shares the cluster with chat, notes and a database:
what a drain leaves behind is theirs, and chat is deployed anew at the end.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from integration.cluster import EXAMPLES, REGIONS, Cluster, promised, tiny_app, wait_for

pytestmark = pytest.mark.timeout(300)

APP = "movable"
LEFT = "sin"  # the region whose host is taken out of use
STAYS = 5  # exit code: refused
GRACE_S = 10.0
WITHIN_S = 5.0


@pytest.fixture(scope="module")
def movable(cluster: Cluster) -> Generator[Path]:
    """A small application in all three regions; afterwards all is as it was."""
    cluster.fly("apps", "create", APP, "--regions", ",".join(REGIONS))
    folder = tiny_app(cluster.folder(APP), APP)
    cluster.fly("deploy", cwd=folder)
    yield folder
    cluster.fly("hosts", "grace", "60s")
    cluster.fly("hosts", "uncordon", cluster.host(LEFT).name)
    cluster.fly("apps", "destroy", APP, "--yes")
    cluster.fly("deploy", cwd=EXAMPLES / "chat")


def test_a_drain_moves_what_can_move_and_names_what_can_not(cluster: Cluster, movable: Path) -> None:
    host = cluster.host(LEFT).name
    before = {m["id"]: m for m in cluster.machines(APP)}
    ran = cluster.fly.run("hosts", "drain", host)
    assert ran.code == STAYS, ran.err
    assert "Postgres" in ran.err
    here = [m for app in (APP, "chat") for m in cluster.machines(app) if m["host"] == host]
    assert here == []
    now = {m["id"]: m for m in cluster.machines(APP)}
    assert len(now) == len(before)
    kept = {i for i, m in before.items() if m["host"] != host}
    assert kept <= set(now), "the others were left alone"
    cluster.wait_served(APP, "one")
    told = shown(cluster, host)
    assert (told["drain_state"], told["cordoned"]) == ("drained", True)
    said = cluster.fly.refused(STAYS, "hosts", "remove", host)
    assert "volume" in said


def test_a_drained_host_takes_nothing_until_it_is_uncordoned(cluster: Cluster, movable: Path) -> None:
    host = cluster.host(LEFT).name
    asked = cluster.fly.run("scale", "count", "2", "--region", LEFT, "--dry-run", cwd=movable)
    assert "cordoned" in asked.out + asked.err
    cluster.fly("hosts", "uncordon", host)
    cluster.fly("deploy", cwd=movable)
    assert sorted(m["region"] for m in cluster.machines(APP)) == sorted(REGIONS)


def test_a_lost_hosts_machine_runs_elsewhere_and_its_old_copy_ends(cluster: Cluster, movable: Path) -> None:
    host = cluster.host(LEFT)
    cluster.fly("hosts", "grace", f"{GRACE_S:g}s")
    (old,) = [m for m in cluster.machines(APP) if m["region"] == LEFT]
    os.kill(cluster.local.flyd_pid(host), signal.SIGKILL)
    killed_at = time.monotonic()

    def moved() -> dict[str, Any] | None:
        found = next(m for m in cluster.machines(APP, api=cluster.api("iad")) if m["id"] == old["id"])
        return found if found["host"] != host.name and found["state"] == "started" else None

    new = wait_for(moved, "it runs elsewhere", GRACE_S + promised(WITHIN_S))
    took_s = time.monotonic() - killed_at
    assert took_s > GRACE_S - 1.5, "not before its grace was over: a sign of life may be 1.5 s old"
    assert runs(old["pid"]), "flyd is dead, its machine is not: from here that is a cut-off host"
    left = shown(cluster, host.name, "iad")["loss"]["left"]
    assert any("Postgres" in reason for reason in left.values()), left
    cluster.local.start_flyd(host)
    started_at = time.monotonic()
    wait_for(lambda: not runs(old["pid"]), "the stale copy ends", promised(WITHIN_S) + 10)
    ended_s = time.monotonic() - started_at
    print(f"\nflyd of {host.name} killed: its machine runs on {new['host']} after {took_s:.1f} s ", end="")
    print(f"(grace {GRACE_S:g} s); the stale copy ended {ended_s:.1f} s after flyd's start")
    cluster.local.wait_ready((host,))
    again = next(m for m in cluster.machines(APP) if m["id"] == old["id"])
    assert (again["host"], again["pid"]) == (new["host"], new["pid"]), "the new copy runs on"
    wait_for(lambda: "loss" not in shown(cluster, host.name), "it is told as lost no more")


def shown(cluster: Cluster, host: str, region: str = "ams") -> dict[str, Any]:
    """A host as one flyd tells it."""
    listed = cluster.fly("hosts", "list", "--json", api=cluster.api(region)).json()
    return next(h for h in listed if h["name"] == host)


def runs(pid: int) -> bool:
    """Whether the process is there, and no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
