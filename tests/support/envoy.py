"""A real Envoy with its own ADS server, in a folder of its own, for integration tests."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import tempfile
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from flyd.edge.envoy import Envoy
from flyd.edge.xds import AdsServer
from flyd.ports import Clock

READY_TIMEOUT_S = 15.0
POLL_S = 0.01


class LoopClock:
    """ports.Clock on the running event loop."""

    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()

    def wall_s(self) -> float:
        return 0.0


def free_port(address: str = "127.0.0.1") -> int:
    """A port that nobody has just now."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


async def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = READY_TIMEOUT_S) -> None:
    """Return as soon as the condition holds."""
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s} s: {what}") from None


class Edge:
    """An Envoy, its folder and its present ADS server (which a test may replace)."""

    def __init__(self, folder: Path, envoy: Envoy, ads: AdsServer) -> None:
        self.folder = folder
        self.envoy = envoy
        self.ads = ads

    async def admin(self, path: str) -> str:
        """A page of Envoy's admin interface."""
        address = self.folder / "envoy" / "admin.address"
        await wait_until(lambda: address.exists() and bool(address.read_text()), "Envoy's admin address")
        async with httpx.AsyncClient() as client:
            return (await client.get(f"http://{address.read_text()}{path}")).text

    async def stats(self, pattern: str) -> dict[str, int]:
        """Envoy's counters and gauges whose name matches."""
        page = json.loads(await self.admin(f"/stats?format=json&filter={pattern}"))
        return {s["name"]: s["value"] for s in page["stats"] if "value" in s}

    async def wait_stat(self, name: str, at_least: int) -> None:
        """Return once a counter or gauge has got there."""
        async with asyncio.timeout(READY_TIMEOUT_S):
            while (await self.stats(name)).get(name, -1) < at_least:
                await asyncio.sleep(POLL_S)

    async def restart_ads(self) -> AdsServer:
        """End the ADS server and start another at the same address: a new flyd."""
        await self.ads.stop()
        self.ads = AdsServer(ads_address(self.folder))
        await self.ads.start()
        return self.ads


def ads_address(folder: Path) -> str:
    return f"unix:{folder}/ads.sock"


@asynccontextmanager
async def running_edge(region: str, clock: Clock | None = None) -> AsyncGenerator[Edge, None]:
    """An Envoy connected to an ADS server on a Unix socket; both end with the block."""
    folder = Path(tempfile.mkdtemp(prefix="flyd-edge-"))
    ads = AdsServer(ads_address(folder))
    address = await ads.start()
    envoy = Envoy(folder / "envoy", f"{region}-1", region, address, clock or LoopClock())
    edge = Edge(folder, envoy, ads)
    try:
        async with asyncio.TaskGroup() as group:
            keeper = group.create_task(envoy.keep())
            try:
                yield edge
            finally:
                keeper.cancel()
    finally:
        await envoy.stop()
        await edge.ads.stop()
        shutil.rmtree(folder)
