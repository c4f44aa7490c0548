"""flyd dies by SIGKILL under traffic: no request fails, no machine and no Envoy notices."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

from integration.cluster import REGIONS, Cluster, wait_for
from integration.traffic import Traffic, traffic

pytestmark = pytest.mark.timeout(180)

REFUSED = 5
APPS = ("chat", "chat-db", "notes")
STEADY = ("id", "pid", "started_at", "restarts", "instance_id", "state", "private_ip")


def steady(cluster: Cluster, region: str) -> list[dict[str, Any]]:
    """What may not change of any machine, as one region's flyd tells it; empty if it is not ready."""
    machines = [m for app in APPS for m in cluster.machines(app, api=cluster.api(region))]
    return [{name: machine[name] for name in STEADY} for machine in machines]


def kill_flyd(cluster: Cluster, region: str) -> int:
    """SIGKILL; the pid it had."""
    pid = cluster.local.flyd_pid(cluster.host(region))
    assert pid
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: cluster.local.flyd_pid(cluster.host(region)) == 0, f"flyd in {region} is dead")
    return pid


def start_flyd(cluster: Cluster, *regions: str) -> None:
    """Start it again and wait until it has joined."""
    for region in regions:
        cluster.local.start_flyd(cluster.host(region))
    cluster.local.wait_ready(tuple(cluster.host(region) for region in regions))
    wait_for(
        lambda: all(host_state(cluster, region, region) == "up" for region in regions),
        f"{regions} have joined",
    )


def host_state(cluster: Cluster, region: str, asked: str) -> str:
    """What the flyd of `asked` says of the host of `region`."""
    hosts = cluster.fly("hosts", "list", "--json", api=cluster.api(asked)).json()
    return next(str(host["state"]) for host in hosts if host["region"] == region)


def assert_unharmed(seen: Traffic) -> None:
    assert not seen.failures
    assert not seen.closed


async def test_each_flyd_killed_in_turn(cluster: Cluster) -> None:
    before = steady(cluster, "ams")
    envoys = {region: cluster.envoy_pid(region) for region in REGIONS}
    assert len(before) == 7
    async with traffic(cluster, "chat") as seen:
        for region in REGIONS:
            old_pid = await asyncio.to_thread(kill_flyd, cluster, region)
            await seen.wait_more(8)
            assert_unharmed(seen)
            await asyncio.to_thread(start_flyd, cluster, region)
            assert cluster.local.flyd_pid(cluster.host(region)) != old_pid
            assert await asyncio.to_thread(steady, cluster, region) == before
            await seen.wait_more(8)
            assert_unharmed(seen)
    assert {region: cluster.envoy_pid(region) for region in REGIONS} == envoys


async def test_flyd_away_until_its_host_counts_as_lost(cluster: Cluster) -> None:
    before = steady(cluster, "iad")
    async with traffic(cluster, "chat") as seen:
        await asyncio.to_thread(kill_flyd, cluster, "ams")
        await asyncio.to_thread(
            wait_for, lambda: host_state(cluster, "ams", "iad") == "lost", "ams counts as lost"
        )
        said = await asyncio.to_thread(
            cluster.fly.refused, REFUSED, "apps", "destroy", "chat", "--yes", api=cluster.api("iad")
        )
        assert "ams-1" in said
        await seen.wait_more(8)
        assert_unharmed(seen)
        await asyncio.to_thread(start_flyd, cluster, "ams")
        await seen.wait_more(8)
        assert_unharmed(seen)
    assert steady(cluster, "ams") == before
    assert {machine["host_status"] for machine in cluster.machines("chat")} == {"ok"}


async def test_all_flyds_killed_at_once(cluster: Cluster) -> None:
    before = steady(cluster, "ams")
    async with traffic(cluster, "chat") as seen:
        for region in REGIONS:
            await asyncio.to_thread(kill_flyd, cluster, region)
        await seen.wait_more(8)
        await asyncio.to_thread(start_flyd, cluster, *REGIONS)
        await seen.wait_more(8)
        assert_unharmed(seen)
    for region in REGIONS:
        assert steady(cluster, region) == before
