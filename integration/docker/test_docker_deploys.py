"""An app from its Dockerfile, in three regions with one command; the next deploy moves little."""

from __future__ import annotations

import asyncio
import json

import pytest
from websockets.asyncio.client import connect

from integration.cluster import REGIONS, wait_for
from integration.docker.conftest import World

pytestmark = pytest.mark.timeout(600)  # the first test on a machine makes the images

MAX_MOVED = 0.05


async def _hello(address: str, key: str) -> str:
    """The region that a WebSocket through this edge is served in; it stores a message, too."""
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(10), connect("ws://chat/ws", host=host, port=int(port)) as socket:
        hello = json.loads(await socket.recv())
        await socket.send(json.dumps({"author": "a test", "text": "hello", "key": key}))
        while True:
            frame = json.loads(await socket.recv())
            if frame["type"] == "saved" and frame["key"] == key:
                return str(hello["region"])


async def test_one_command_serves_every_region_from_near_by(world: World) -> None:
    hosts = world.hosts
    assert {m["region"] for m in hosts.machines("chat").values()} == set(REGIONS)
    for region, address in hosts.edges().items():
        answer = hosts.get(region, "chat", "/api/messages")
        assert (answer.status_code, answer.json()["region"]) == (200, region)
        assert await _hello(address, f"hello-{region}") == region
        assert "text/html" in hosts.get(region, "chat").headers["content-type"]


def test_a_one_line_change_moves_little_of_the_image(world: World) -> None:
    hosts = world.hosts
    first = {move["host"]: move for move in world.first_deploy["image_moves"]}
    assert len(first) == len(REGIONS)
    app = world.chat / "app.py"
    app.write_text(app.read_text().replace('PlainTextResponse("ok\\n")', 'PlainTextResponse("fine\\n")'))
    moves = hosts.fly("deploy", "--json", cwd=world.chat).json()["image_moves"]
    for move in moves:
        share = move["moved_bytes"] / move["image_bytes"]
        before = first[move["host"]]
        print(
            f"\n{move['host']}: {move['moved_bytes']} of {move['image_bytes']} bytes moved ({share:.4%}), "
            f"at first {before['moved_bytes']}"
        )
        assert not move["error"]
        assert 0 < share <= MAX_MOVED
    assert {move["host"] for move in moves} == set(first)
    for region in REGIONS:
        wait_for(lambda region=region: hosts.get(region, "chat", "/healthz").text == "fine\n", "the new line")
