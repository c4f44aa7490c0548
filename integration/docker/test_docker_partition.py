"""The primary's host is cut off, alive: it must not acknowledge beside the new one, and must find back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

import pytest

from examples.demo.clients import Ledger, stored_keys
from examples.demo.story import traffic
from integration.cluster import REGIONS, promised, wait_for
from integration.docker.conftest import FAR_REGION, World
from integration.docker.hosts import Hosts, Writer, shown, wait_times, writing

pytestmark = pytest.mark.timeout(600)

CUT = "ams"  # not where `far` is
CUT_FOR_S = 4.0  # after the new primary's first acknowledgement
HEALED_S = 10.0
PROBE = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 8080), 1).close()
except OSError as error:
    sys.exit(str(error))
"""


async def test_a_cut_off_primary_never_acknowledges_beside_the_new_one(world: World) -> None:
    hosts = world.hosts
    old = hosts.put_primary(CUT)
    url = hosts.database_url(CUT)
    writers = {
        "cut-endpoint": (CUT, url),
        "cut-direct": (
            CUT,
            url.replace(f"{hosts.private(CUT)}:{old['address'].rpartition(':')[2]}", old["address"]),
        ),
        "far-endpoint": (FAR_REGION, hosts.database_url(FAR_REGION)),
    }
    ledger = Ledger()
    with writing(hosts, writers) as at_work:
        async with traffic(hosts.edges(), ledger):
            await asyncio.to_thread(_cut_and_heal, hosts, at_work, old["address"].partition(":")[0])
    stored = await stored_keys(hosts.edges()[FAR_REGION])
    _judge(at_work.values(), ledger, old["address"].partition(":")[0], stored)


def _cut_and_heal(hosts: Hosts, writers: dict[str, Writer], old_server: str) -> None:
    before = {region: hosts.containers(region) for region in REGIONS}
    hosts.chaos("partition", CUT)
    wait_for(
        lambda: any(ack["server"] != old_server for ack in writers["far-endpoint"].acks()),
        "a new primary acknowledges",
    )
    assert hosts.public(CUT) not in hosts.run(CUT, "ip", "-4", "address"), "the host is not cut off"
    time.sleep(CUT_FOR_S)
    for region in REGIONS:
        assert hosts.containers(region) == before[region], f"machines of {region} did not just run on"
    machines = hosts.machines("chat", hosts.api(FAR_REGION))
    hosts.chaos("heal", CUT)
    here, there = machines[CUT], machines[FAR_REGION]

    def reaches(machine: dict[str, str], name: str) -> bool:
        return hosts.in_machine(machine, "python", "-c", PROBE, name).returncode == 0

    times = wait_times(
        {
            "route out": lambda: reaches(here, there["private_ip"]),
            "route in": lambda: reaches(there, here["private_ip"]),
            "name out": lambda: reaches(here, f"{FAR_REGION}.chat.internal"),
            "name in": lambda: reaches(there, f"{CUT}.chat.internal"),
            "edge out": lambda: hosts.serves(CUT, "far"),
            "edge in": lambda: hosts.serves(FAR_REGION, "notes", "/-/versions.json"),
        },
        promised(HEALED_S),
    )
    print(f"\nhealed after: {shown(times.items())}")
    began = time.monotonic()
    hosts.wait_replica(CUT)
    print(f"the old primary follows {time.monotonic() - began:.2f} s later")
    assert {region: hosts.containers(region) for region in REGIONS} == before


def _judge(writers: Iterable[Writer], ledger: Ledger, old_server: str, stored: set[str]) -> None:
    acks = [ack for writer in writers for ack in writer.acks()]
    by_old = [ack["at_s"] for ack in acks if ack["server"] == old_server]
    by_new = [ack["at_s"] for ack in acks if ack["server"] != old_server]
    assert len({ack["server"] for ack in acks}) == 2, (
        "exactly two primaries acknowledged, one after the other"
    )
    gap_s = min(by_new) - max(by_old)
    keys = {ack["key"] for ack in acks} | {ack.key for ack in ledger.acks}
    lost = sorted(keys - stored)
    print(
        f"acknowledged {len(keys)}, lost {len(lost)}; {gap_s:.2f} s from the old primary's last "
        f"acknowledgement (of {len(by_old)}) to the new one's first (of {len(by_new)})"
    )
    assert gap_s > 0, f"the old primary acknowledged {-gap_s:.3f} s into the new one's time"
    assert not lost
