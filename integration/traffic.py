"""Clients near every region that never stop, and remember each answer that was not a good one."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from flyd.cluster.layout import HTTP_PORT
from integration.cluster import REGIONS, Cluster

PAUSE_S = 0.05
ANSWER_TIMEOUT_S = 10.0
MOVE_TIMEOUT_S = 20.0


class Traffic:
    """What the clients of one application have seen so far."""

    def __init__(self, cluster: Cluster, app: str) -> None:
        self._cluster = cluster
        self._app = app
        self.good: Counter[str] = Counter()  # region and kind of client -> answers as wanted
        self.failures: list[str] = []
        self.closed: list[str] = []  # WebSockets that ended before we ended them

    async def wait_more(self, count: int) -> None:
        """Return once every client has had `count` more good answers."""
        before = dict(self.good)
        try:
            async with asyncio.timeout(MOVE_TIMEOUT_S):
                while len(before) < len(REGIONS) * 3 or any(
                    self.good[c] < n + count for c, n in before.items()
                ):
                    before = before if len(before) == len(REGIONS) * 3 else dict(self.good)
                    await asyncio.sleep(PAUSE_S)
        except TimeoutError:
            raise AssertionError(f"traffic stalled: {before} -> {self.good}, {self.failures}") from None

    async def write_and_read(self, region: str, keep: bool) -> None:
        """POST and GET in turn; over one connection, or over a new one each time."""
        name = f"{region} {'kept' if keep else 'new'} connection"
        client = self._client(region)
        for number in itertools.count():
            if not keep:
                await client.aclose()
                client = self._client(region)
            began = time.monotonic()
            try:
                if number % 2:
                    answer = await client.get("/api/messages", params={"after": str(10**9)})
                else:
                    key = f"{name}-{time.monotonic_ns()}"
                    message = {"author": name, "text": "still here?", "key": key}
                    answer = await client.post("/api/messages", json=message)
            except httpx.HTTPError as error:
                self._failed(name, began, repr(error))
            else:
                if answer.status_code == (200 if number % 2 else 201):
                    self.good[name] += 1
                else:
                    self._failed(name, began, f"{answer.status_code} {answer.text[:200]}")
            await asyncio.sleep(PAUSE_S)

    async def chat(self, region: str) -> None:
        """One WebSocket that sends without pause; a new one if it ends, which is remembered."""
        name = f"{region} socket"
        while True:
            address = self._cluster.host(region).address
            try:
                async with connect(f"ws://{self._app}/ws", host=address, port=HTTP_PORT) as socket:
                    await self._talk(socket, name)
            except (ConnectionClosed, OSError) as error:
                self.closed.append(f"{name}: {error!r}")
                await asyncio.sleep(PAUSE_S)

    async def _talk(self, socket: ClientConnection, name: str) -> None:
        while True:
            began, key = time.monotonic(), f"{name}-{time.monotonic_ns()}"
            await socket.send(json.dumps({"author": name, "text": "hello", "key": key}))
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    frame = await self._answer(socket, key)
            except TimeoutError:
                self._failed(name, began, "no answer")
                continue
            if frame["type"] == "saved":
                self.good[name] += 1
            else:
                self._failed(name, began, str(frame))
            await asyncio.sleep(PAUSE_S)

    async def _answer(self, socket: ClientConnection, key: str) -> dict[str, Any]:
        while True:
            frame = json.loads(await socket.recv())
            if frame.get("key") == key and frame["type"] in ("saved", "failed"):
                return frame

    def _client(self, region: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self._cluster.edge(region),
            headers={"Host": self._app},
            timeout=ANSWER_TIMEOUT_S,
            verify=False,  # plain HTTP: reading the certificates would cost more than a request
        )

    def _failed(self, name: str, began: float, how: str) -> None:
        self.failures.append(f"{name} after {time.monotonic() - began:.2f} s: {how}")


@asynccontextmanager
async def traffic(cluster: Cluster, app: str) -> AsyncGenerator[Traffic]:
    """Three clients near each region, until the end of the block."""
    seen = Traffic(cluster, app)
    async with asyncio.TaskGroup() as group:
        clients = [
            group.create_task(client)
            for region in REGIONS
            for client in (
                seen.write_and_read(region, keep=True),
                seen.write_and_read(region, keep=False),
                seen.chat(region),
            )
        ]
        try:
            await seen.wait_more(5)
            yield seen
        finally:
            for client in clients:
                client.cancel()
