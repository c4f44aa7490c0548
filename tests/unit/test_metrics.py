"""Figures over HTTP, as a scraper gets them."""

from __future__ import annotations

import asyncio
import socket

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from flyd import metrics
from flyd.errors import Refused
from flyd.model import encode
from flyd.network.dns import DnsFigures
from flyd.store import keys
from flyd.store.memory import MemoryKV
from flyd.store.mirror import Mirror
from tests.support.edge import host, machine, status

WAIT_S = 10.0


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind((metrics.ADDRESS, 0))
        return probe.getsockname()[1]


async def scraped(port: int) -> dict[str, float]:
    """What is told: `name{labels}` -> value. The server may be just starting."""
    async with asyncio.timeout(WAIT_S), httpx.AsyncClient() as client:
        while True:
            try:
                text = (await client.get(f"http://{metrics.ADDRESS}:{port}/metrics")).text
                break
            except httpx.ConnectError:
                await asyncio.sleep(0.01)
    return {
        sample.name
        + "".join(f"{{{v}}}" for k, v in sample.labels.items() if k in ("state", "outcome")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_what_a_scraper_gets(port: int) -> None:
    kv = MemoryKV()
    here, there = machine("m1", "ams"), machine("m2", "fra")
    for one in (here, there):
        await kv.put(keys.status(one.app, one.id), encode(status(one)))
    mirror = Mirror(kv, (keys.ROOT,))
    figures = DnsFigures(answered=7, failed=2, stale_s=12.5)
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(mirror.keep()),
            group.create_task(metrics.serve(host("ams"), mirror, port, lambda: figures)),
        ]
        await mirror.wait_synced()
        found = await scraped(port)
        for task in tasks:
            task.cancel()
    assert found["flyd_machines{started}"] == 1  # the other one is another host's
    assert (found["flyd_dns_questions_total{answered}"], found["flyd_dns_questions_total{failed}"]) == (7, 2)
    assert found["flyd_dns_stale_seconds"] == 12.5
    assert 0 <= found["flyd_etcd_silence_seconds"] < WAIT_S
    assert found["process_resident_memory_bytes"] > 1e6
    with pytest.raises(OSError, match="refused"):  # nothing listens once it has ended
        socket.create_connection((metrics.ADDRESS, port))


async def test_a_taken_port_is_named(port: int) -> None:
    with socket.create_server((metrics.ADDRESS, port)), pytest.raises(Refused, match=str(port)):
        await metrics.serve(host("ams"), Mirror(MemoryKV(), (keys.ROOT,)), port, None)
