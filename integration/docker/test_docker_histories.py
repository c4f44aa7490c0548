"""Clients in every region append and read while hosts die, freeze, are cut off: what they saw has no anomaly.

`make soak` runs it for half an hour (FLY_HISTORY_MINUTES=30); the history is left in build/histories/docker/.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from integration.cluster import REGIONS, wait_for
from integration.docker.conftest import World
from integration.docker.hosts import DATABASE, Hosts
from integration.histories.nemesis import Hurt, Plan, counted, hurt, unexcused
from integration.histories.recording import ROOT, Recording

MINUTES = 1.0
KINDS = 4
RECOVERED_S = 120.0


@dataclass(frozen=True)
class InHost:
    """A host, whose clients use its own endpoint."""

    region: str
    uri: str
    hosts: Hosts = field(repr=False, compare=False)

    def command(self, *words: str) -> tuple[str, ...]:
        return self.hosts.command(self.region, "env", f"--chdir={ROOT}", *words)

    def file(self, name: str) -> str:
        return f"/var/log/{name}"  # on the container's own disk, which its death leaves alone

    def text(self, file: str) -> str:
        return self.hosts.run(self.region, "cat", file)


class Faults:
    """What is done to the hosts, mostly to the primary's."""

    def __init__(self, hosts: Hosts, chance: random.Random, recording: Recording) -> None:
        self._hosts = hosts
        self._chance = chance
        self._recording = recording
        self.places = {r: InHost(r, hosts.database_url(r), hosts) for r in REGIONS}

    def all(self) -> dict[str, Hurt]:
        """By name."""
        faults = (
            self.host_killed,
            self.host_frozen,
            self.host_cut_off,
            self.flyd_killed,
            self.postgres_killed,
            self.agent_killed,
            self.switchover,
        )
        return {fault.__name__.replace("_", " "): in_thread(fault) for fault in faults}

    def launch(self, region: str) -> None:
        """A client there."""
        self._recording.launch(self.places[region])

    def _members(self) -> dict[str, dict[str, Any]] | None:
        """As Hosts.members, or None while nobody can say."""
        try:
            return self._hosts.members()
        except AssertionError:
            return None

    def _primary(self) -> str | None:
        members = self._members() or {}
        return next((region for region, m in members.items() if m["primary"]), None)

    def _victim(self) -> str:
        primary = wait_for(self._primary, "somebody is primary", RECOVERED_S)
        others = [region for region in REGIONS if region != primary]
        region = primary if self._chance.random() < 0.75 else self._chance.choice(others)
        print(f" {region} (primary in {primary}) ...", end="", flush=True)
        return region

    def _go_on_without(self, region: str) -> None:
        """Another region has the primary, and every client elsewhere writes again."""
        wait_for(lambda: self._primary() not in (None, region), "another is primary", RECOVERED_S)
        self._recording.wait_acks(without=self.places[region])

    def recovered(self) -> None:
        """Three members, all well, and every client writes."""

        def whole() -> bool:
            members = (self._members() or {}).values()
            replicas = [m for m in members if m["role"] == "replica" and m["streaming"]]
            well = [m for m in members if m["host_status"] == "ok"]
            return len(well) == len(REGIONS) and len(replicas) == len(REGIONS) - 1 and bool(self._primary())

        wait_for(whole, "all members are well", RECOVERED_S)
        self._recording.wait_acks()

    def host_killed(self) -> None:
        region = self._victim()
        self._hosts.chaos("kill-host", region)
        self._recording.lose(self.places[region])
        self._go_on_without(region)
        self._hosts.fly("cluster", "start-host", "--name", self._hosts.name, region)
        self.launch(region)
        self.recovered()

    def host_frozen(self) -> None:
        region = self._victim()
        self._hosts.chaos("pause-host", region)
        try:
            self._go_on_without(region)
        finally:
            self._hosts.chaos("resume-host", region)
        self.recovered()

    def host_cut_off(self) -> None:
        region = self._victim()
        self._hosts.chaos("partition", region)
        try:
            self._go_on_without(region)
        finally:
            self._hosts.chaos("heal", region)
        self.recovered()

    def flyd_killed(self) -> None:
        self._hosts.chaos("kill-flyd", self._victim())
        self.recovered()

    def postgres_killed(self) -> None:
        self._hosts.run(self._victim(), "pkill", "-KILL", "-x", "postgres")
        self.recovered()

    def agent_killed(self) -> None:
        """Its machine ends with it; flyd starts that again, or another region takes over before."""
        self._hosts.run(self._victim(), "pkill", "-KILL", "-x", "pgha")
        self.recovered()

    def switchover(self) -> None:
        self._hosts.fly("postgres", "switchover", "--app", DATABASE)
        self.recovered()


def all_started(hosts: Hosts) -> bool:
    """Every app's machines run: the next test begins with the cluster as this one did."""
    machines = hosts.machines("").values()
    return all((m["state"], m["host_status"]) == ("started", "ok") for m in machines)


def in_thread(fault: Callable[[], None]) -> Hurt:
    async def hurt() -> None:
        await asyncio.to_thread(fault)

    return hurt


def evidence(hosts: Hosts) -> str:
    """What a person would look at when the database does not come back."""
    texts = [hosts.fly.run("postgres", "status", "--app", DATABASE, "--json").out]
    for region, m in hosts.machines(DATABASE).items():
        said = hosts.attempt(region, "docker", "logs", "--tail", "60", f"flyd-{m['id']}")
        texts += [f"== {region}: {m['state']}", said.stdout[-6000:], said.stderr[-6000:]]
        texts.append(hosts.attempt(region, "tail", "-n", "25", "/var/log/flyd/flyd.log").stdout)
    return "\n".join(texts)


@pytest.mark.soak
@pytest.mark.timeout(45 * 60)
async def test_no_anomaly_under_random_faults(world: World) -> None:
    plan = Plan.from_environment(MINUTES)
    hosts = world.hosts
    with Recording("docker", plan.seed) as recording:
        faults = Faults(hosts, plan.chance(), recording)
        try:
            for region in REGIONS:
                faults.launch(region)
            await asyncio.to_thread(faults.recovered)
            done = await hurt(plan, faults.all(), KINDS)
            history = await asyncio.to_thread(recording.finish, faults.places[REGIONS[0]])
            await asyncio.to_thread(wait_for, lambda: all_started(hosts), "all machines run", RECOVERED_S)
        except BaseException:
            print(evidence(hosts))
            raise
    print(history.summary(plan.seed, done))
    assert len(counted(done)) >= KINDS
    assert not unexcused(history.report.anomalies, done), f"{history.report.text()}\n{history.path}"
    assert history.report.unread == 0
