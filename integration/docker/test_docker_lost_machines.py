"""A host dies and its machines without volumes run elsewhere; it comes back and nothing runs twice.

The proof is a log of every interval in which each machine ran, by each host's own engine: when a
container was started and when it ended. All hosts are on one computer, so there is one clock.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Generator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pytest

from integration.cluster import REGIONS, promised, tiny_app, wait_for
from integration.docker.conftest import World
from integration.docker.hosts import PYTHON_IMAGE, Hosts

pytestmark = pytest.mark.timeout(600)

APP = "movable"
LOST = "sin"  # neither the volume of notes nor `far` is there
PER_REGION = 3
GRACE_S = 15.0
WITHIN_S = 5.0
BACK_S = 90.0
EARLY_S = 1.5  # a sign of life may be this old when its host dies


@dataclass
class Interval:
    """One machine ran in one region; `end_s` None: it still does."""

    machine: str
    region: str
    start_s: float
    end_s: float | None = None


@pytest.fixture
def movable(world: World) -> Generator[World]:
    """An app with several machines in each region and no volume; afterwards all is as it was."""
    fly = world.hosts.fly
    fly("apps", "create", APP)
    folder = tiny_app(world.hosts.folder(APP), APP)
    (folder / "Dockerfile").write_text(f"FROM {PYTHON_IMAGE}\nWORKDIR /app\nCOPY app.py .\n")
    fly("deploy", "--regions", ",".join(REGIONS), cwd=folder)
    fly("scale", "count", str(PER_REGION * len(REGIONS)), "--yes", cwd=folder)
    fly("hosts", "grace", f"{GRACE_S:g}s")
    yield world
    fly("hosts", "grace", "60s")
    fly("apps", "destroy", APP, "--yes")
    fly("deploy", cwd=world.chat)  # its machine goes back to its region


def test_a_lost_hosts_machines_run_elsewhere_and_never_twice(movable: World) -> None:
    hosts = movable.hosts
    before = hosts.machines("")
    lost = {i: m for i, m in before.items() if m["region"] == LOST}
    movers = sorted(i for i, m in lost.items() if not m["config"]["mounts"])
    assert len(movers) >= PER_REGION
    log = running(hosts)
    began_s = time.time()
    hosts.chaos("kill-host", LOST)
    killed_s = ended_at(hosts, LOST)
    for interval in log:
        if interval.region == LOST:
            interval.end_s = killed_s

    def moved() -> bool:
        now = hosts.machines("", hosts.api("ams"))
        return all(now[i]["region"] != LOST and now[i]["state"] == "started" for i in movers)

    wait_for(moved, "they run elsewhere", GRACE_S + 60)
    stay = hosts.machines("", hosts.api("ams"))
    assert all(stay[i]["region"] == LOST for i in lost if i not in movers), "volumes stay where they are"
    hosts.fly("cluster", "start-host", "--name", hosts.name, LOST)
    wait_for(lambda: not set(movers) & all_copies(hosts, LOST), "stale copies are gone", BACK_S)
    wait_for(lambda: all_started(hosts, before), "everything is started", BACK_S)
    follow(hosts, log, began_s)
    tell(log, movers, killed_s)
    latest_s = GRACE_S + promised(WITHIN_S)
    for machine in movers:
        ran = sorted((i for i in log if i.machine == machine), key=lambda i: i.start_s)
        assert [i.region for i in ran if i.start_s > killed_s].count(LOST) == 0, "no copy came back to life"
        assert len(ran) == 2, ran
        first, second = ran
        assert first.end_s is not None
        assert first.end_s <= second.start_s, "never two at once"
        assert second.end_s is None, "the new copy runs on"
        assert GRACE_S - EARLY_S - 0.5 <= second.start_s - killed_s <= latest_s


def all_started(hosts: Hosts, before: dict[str, Any]) -> bool:
    """Whether the same machines as before are all started, on hosts that are all there."""
    now = hosts.machines("")
    assert set(now) == set(before), "the same machines"
    return all((m["state"], m["host_status"]) == ("started", "ok") for m in now.values())


def ended_at(hosts: Hosts, region: str) -> float:
    """When the host itself, a container, ended."""
    name = hosts.command(region)[3]
    said = subprocess.run(
        ("docker", "inspect", "--format", "{{.State.FinishedAt}}", name),
        capture_output=True,
        text=True,
        check=True,
    )
    return seconds(said.stdout.strip())


def seconds(text: str) -> float:
    """RFC 3339 with nanoseconds, as Docker writes it, since the epoch."""
    whole, _, fraction = text.rstrip("Z").partition(".")
    return datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{fraction or 0}")


def machine_of(container: str) -> str:
    """The machine's id, from the name of its container."""
    return container.removeprefix("/").removeprefix("flyd-")


def running(hosts: Hosts) -> list[Interval]:
    """What runs now on every host, and since when."""
    found: list[Interval] = []
    for region in REGIONS:
        ids = [identity for identity, _ in hosts.containers(region).values()]
        inspected: list[dict[str, Any]] = json.loads(hosts.run(region, "docker", "inspect", *ids))
        found += [
            Interval(machine_of(c["Name"]), region, seconds(c["State"]["StartedAt"])) for c in inspected
        ]
    return found


def all_copies(hosts: Hosts, region: str) -> set[str]:
    """The machines of which the host's engine has a container, running or not; all while it is not up."""
    ran = hosts.attempt(region, "docker", "ps", "--all", "--format", "{{.Names}}")
    return (
        {machine_of(name) for name in ran.stdout.split()} if ran.returncode == 0 else set(hosts.machines(""))
    )


def follow(hosts: Hosts, log: list[Interval], since_s: float) -> None:
    """Complete the log with what each engine has seen begin and end."""
    form = "{{.TimeNano}} {{.Action}} {{.Actor.Attributes.name}}"
    events: list[tuple[float, str, str, str]] = []
    for region in REGIONS:
        words = ("--since", f"{since_s:.3f}", "--until", f"{time.time():.3f}", "--format", form)
        kinds = ("--filter", "event=start", "--filter", "event=die")
        for line in hosts.run(region, "docker", "events", *words, *kinds).splitlines():
            at_ns, action, name = line.split()
            events.append((int(at_ns) / 1e9, action, machine_of(name), region))
    for at_s, action, machine, region in sorted(events):
        if action == "start":
            log.append(Interval(machine, region, at_s))
        else:
            for interval in log:
                if (interval.machine, interval.region, interval.end_s) == (machine, region, None):
                    interval.end_s = at_s


def tell(log: list[Interval], movers: list[str], killed_s: float) -> None:
    """Every interval in which a machine that moved ran, in seconds from the host's death."""
    print(f"\n{LOST} killed; grace {GRACE_S:g} s, {len(movers)} machines without volumes were on it:")
    for interval in sorted(log, key=lambda i: (i.machine, i.start_s)):
        if interval.machine in movers:
            end = "…" if interval.end_s is None else f"{interval.end_s - killed_s:.2f}"
            print(f"  {interval.machine} on {interval.region}: {interval.start_s - killed_s:8.2f} to {end} s")
