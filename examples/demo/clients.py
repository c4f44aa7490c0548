"""Clients near each region: they write through the edge without pause and listen on a WebSocket.

A message's key is made by the client, so a write without an answer is sent again under the
same key until it is acknowledged: each key is one message however often it is sent. When
an edge does not answer, the client goes to the next region's, as DNS would send it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

HOST = "chat"
PAUSE_S = 0.01
RETRY_S = 0.02
TIMEOUT = httpx.Timeout(8.0, connect=1.0)


@dataclass
class Ack:
    """A message that the application said is stored."""

    key: str
    at_s: float  # time.time() of the answer
    edge: str  # region whose edge took it
    region: str  # region whose machine answered


@dataclass
class Ledger:
    """What all clients saw."""

    acks: list[Ack] = field(default_factory=lambda: list[Ack]())
    failures: Counter[str] = field(default_factory=lambda: Counter[str]())
    served: Counter[tuple[str, str]] = field(default_factory=lambda: Counter[tuple[str, str]]())
    heard: Counter[tuple[str, str]] = field(default_factory=lambda: Counter[tuple[str, str]]())
    sockets: dict[str, str] = field(default_factory=lambda: dict[str, str]())

    def longest_pause(self, since_s: float) -> tuple[float, float]:
        """The longest time without any acknowledgement that ended after `since_s`: (began, ended)."""
        times = sorted(ack.at_s for ack in self.acks)
        pauses = [(a, b) for a, b in itertools.pairwise(times) if b > since_s]
        return max(pauses, key=lambda pause: pause[1] - pause[0], default=(since_s, since_s))


async def keep_writing(near: str, edges: dict[str, str], ledger: Ledger, stop: asyncio.Event) -> None:
    """Write one message after the other through the nearest edge that answers."""
    order = list(edges)
    number = 0
    async with httpx.AsyncClient(timeout=TIMEOUT, headers={"Host": HOST}) as client:
        while not stop.is_set():
            number += 1
            key = f"{near}-{number}"
            body = {"author": f"client near {near}", "text": f"message {number}", "key": key}
            while True:
                edge = order[0]
                try:
                    answer = await client.post(f"http://{edges[edge]}/api/messages", json=body)
                    if answer.status_code == 201:
                        region = str(answer.json()["region"])
                        ledger.acks.append(Ack(key, time.time(), edge, region))
                        ledger.served[edge, region] += 1
                        break
                    ledger.failures[f"{edge}: HTTP {answer.status_code}"] += 1
                except httpx.HTTPError as error:
                    ledger.failures[f"{edge}: {type(error).__name__}"] += 1
                    order.append(order.pop(0))
                if stop.is_set():
                    return
                await asyncio.sleep(RETRY_S)
            await asyncio.sleep(PAUSE_S)


async def keep_listening(near: str, edges: dict[str, str], ledger: Ledger, stop: asyncio.Event) -> None:
    """Hold a WebSocket at the nearest edge that answers; count what is heard, by the author's region."""
    order = list(edges)
    while not stop.is_set():
        address, _, port = edges[order[0]].rpartition(":")
        try:
            async with connect(f"ws://{HOST}/ws", host=address, port=int(port), open_timeout=2) as socket:
                async for frame in socket:
                    told = json.loads(frame)
                    if told["type"] == "hello":
                        ledger.sockets[near] = told["region"]
                    elif told["type"] == "message":
                        ledger.heard[near, str(told["author"]).rpartition(" ")[2]] += 1
                    if stop.is_set():
                        return
        except (OSError, WebSocketException, TimeoutError):
            ledger.sockets[near] = ""
        order.append(order.pop(0))
        await asyncio.sleep(RETRY_S)


async def notes_starts(edge: str) -> int:
    """How often the notes application has started, by its database on the volume; 0 if it does not answer."""
    async with httpx.AsyncClient(timeout=TIMEOUT, headers={"Host": "notes"}) as client:
        try:
            answer = await client.get(f"http://{edge}/notes/starts.json", params={"_shape": "array"})
        except httpx.HTTPError:
            return 0
        return len(answer.json()) if answer.status_code == 200 else 0


async def stored_keys(edge: str) -> set[str]:
    """The keys of all messages that the application can read now."""
    found: set[str] = set()
    after = 0
    async with httpx.AsyncClient(timeout=TIMEOUT, headers={"Host": HOST}) as client:
        while True:
            answer = await client.get(f"http://{edge}/api/messages", params={"after": after})
            answer.raise_for_status()
            messages = answer.json()["messages"]
            if not messages:
                return found
            found |= {message["key"] for message in messages}
            after = messages[-1]["id"]
