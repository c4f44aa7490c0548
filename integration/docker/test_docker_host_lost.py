"""The primary's whole host dies under load, and comes back with its disks: nobody lends a hand."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from examples.demo.clients import Ledger, notes_starts, stored_keys
from examples.demo.story import traffic
from integration.cluster import REGIONS, promised, wait_for
from integration.docker.conftest import World
from integration.docker.hosts import Hosts, shown, wait_times

pytestmark = pytest.mark.timeout(600)

LOST = "ams"  # where the volume of notes is
MAX_GAP_S = 10.0
STEADY_ACKS = 100
CONVERGED_S = 60.0


async def test_a_lost_host_costs_no_write_and_converges_when_it_is_back(world: World) -> None:
    hosts = world.hosts
    hosts.put_primary(LOST)
    edges = hosts.edges()
    starts = await notes_starts(edges[LOST])
    before = hosts.machines("")
    ledger = Ledger()
    async with traffic(edges, ledger):
        await asyncio.to_thread(wait_for, lambda: len(ledger.acks) > STEADY_ACKS, "clients write")
        killed_at_s = time.time()
        await asyncio.to_thread(_kill, hosts, ledger)
        times = await asyncio.to_thread(_bring_back, hosts, before)
    last_s, first_s = ledger.longest_pause(killed_at_s)
    lost = sorted({ack.key for ack in ledger.acks} - await stored_keys(edges[LOST]))
    print(
        f"\n{LOST} is lost: {first_s - last_s:.2f} s without a write; {len(ledger.acks)} acknowledged, ",
        end="",
    )
    print(f"{len(lost)} lost; converged after start-host: {shown(times.items())}")
    assert not lost
    assert first_s - last_s < promised(MAX_GAP_S)
    assert await notes_starts(edges[LOST]) == starts + 1, "what was on the volume is there"


def _kill(hosts: Hosts, ledger: Ledger) -> None:
    hosts.chaos("kill-host", LOST)
    dead_at_s = time.time()
    wait_for(
        lambda: sum(ack.at_s > dead_at_s for ack in list(ledger.acks)) > STEADY_ACKS,
        "writes are acknowledged again",
    )


def _bring_back(hosts: Hosts, before: dict[str, dict[str, Any]]) -> dict[str, float]:
    hosts.fly("cluster", "start-host", "--name", hosts.name, LOST)

    def all_started() -> bool:
        now = hosts.machines("")
        assert set(now) == set(before), "the same machines"
        return all((m["state"], m["host_status"]) == ("started", "ok") for m in now.values())

    def follows() -> bool:
        member = hosts.members()[LOST]
        return bool(member["role"] == "replica" and member["streaming"])

    def near() -> bool:
        return hosts.serves(LOST, "chat", "/healthz") and (
            hosts.get(LOST, "chat", "/api/messages?after=999999999").json()["region"] == LOST
        )

    return wait_times(
        {
            "machines started": all_started,
            "replica streams": follows,
            "chat near": near,
            "notes on its volume": lambda: all(hosts.serves(r, "notes", "/-/versions.json") for r in REGIONS),
        },
        CONVERGED_S,
    )
