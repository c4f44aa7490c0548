from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import asynccontextmanager

import msgspec
from structlog.testing import capture_logs

from flyd.errors import Unavailable
from flyd.model import Host, Membership, encode
from flyd.network import mesh
from flyd.network.mesh_plan import MeshChanges, MeshMode, MeshState, Route
from flyd.store import keys
from flyd.store.memory import MemoryEtcd, MemoryKV
from flyd.store.mirror import Mirror
from tests.support import edge as values


def host(name: str, number: int) -> Host:
    made = values.host("ams", address=f"10.{number}.0.1")
    return msgspec.structs.replace(
        made,
        name=name,
        subnet=f"10.{number}",
        wg_public_key=b64encode(bytes([number]) * 32).decode(),
        wg_endpoint=f"192.0.2.{number}:51820",
    )


class _Link:
    """This host's end as plain values; `lose_routes` is a cut."""

    def __init__(self) -> None:
        self.now = MeshState()
        self.failing = False
        self.greeted = 0
        self._events: asyncio.Queue[None] = asyncio.Queue()

    async def state(self) -> MeshState:
        return self.now

    async def apply(self, changes: MeshChanges) -> None:
        if self.failing:
            raise Unavailable("no route to host")
        kept = [r for r in self.now.routes if r not in changes.remove_routes]
        peers = [p for p in self.now.peers if p.public_key not in changes.remove_peers]
        self.now = MeshState(
            there=True,
            address=changes.address or self.now.address,
            mtu=changes.mtu or self.now.mtu,
            peers=(*peers, *changes.set_peers),
            routes=tuple(sorted((*kept, *changes.set_routes), key=lambda r: r.destination)),
        )

    async def underlay_mtu(self, endpoints: Iterable[str]) -> int:
        return 1400 if list(endpoints) else 0

    def greet(self, routes: Iterable[Route]) -> None:
        self.greeted += 1

    async def events(self) -> AsyncIterator[None]:
        while True:
            yield await self._events.get()

    def lose_routes(self) -> None:
        self.now = msgspec.structs.replace(self.now, routes=())
        self._events.put_nowait(None)

    def destinations(self) -> list[str]:
        return [r.destination for r in self.now.routes]


@asynccontextmanager
async def keeping(link: _Link) -> AsyncGenerator[MemoryKV]:
    kv = MemoryKV(MemoryEtcd())
    mirror = Mirror(kv, mesh.PREFIXES)
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(mirror.keep()),
            group.create_task(mesh.keep_mesh(host("a", 11), mirror, link, MeshMode.WIREGUARD)),
        ]
        yield kv
        for task in tasks:
            task.cancel()


async def until(link: _Link, *destinations: str) -> None:
    async with asyncio.timeout(5):
        while link.destinations() != list(destinations):
            await asyncio.sleep(0.01)


async def test_hosts_come_and_go() -> None:
    link = _Link()
    async with keeping(link) as kv:
        await kv.put(keys.host("b"), encode(host("b", 12)))
        await until(link, "10.12.0.0/16")
        assert (link.now.address, link.now.mtu) == ("10.11.0.1", 1320)
        await kv.put(keys.host("c"), encode(host("c", 13)))
        await until(link, "10.12.0.0/16", "10.13.0.0/16")


async def test_an_expelled_host_is_dropped_at_once() -> None:
    link = _Link()
    async with keeping(link) as kv:
        await kv.put(keys.host("b"), encode(host("b", 12)))
        await until(link, "10.12.0.0/16")
        stay = Membership(host="b", id="1", public_key="", addresses=(), subnet="10.12", joined_at_s=1.0)
        await kv.put(keys.membership("b"), encode(stay))
        await kv.put(keys.membership("b"), encode(msgspec.structs.replace(stay, expelled_at_s=2.0)))
        await until(link)
        assert not link.now.peers


async def test_lost_routes_come_back_and_the_others_are_greeted() -> None:
    link = _Link()
    async with keeping(link) as kv:
        await kv.put(keys.host("b"), encode(host("b", 12)))
        await until(link, "10.12.0.0/16")
        greeted = link.greeted
        link.lose_routes()
        await until(link, "10.12.0.0/16")
        async with asyncio.timeout(5):
            while link.greeted == greeted:
                await asyncio.sleep(0.01)


async def test_what_fails_is_tried_again_and_said_once() -> None:
    link = _Link()
    link.failing = True
    with capture_logs() as logs:
        async with keeping(link) as kv:
            await kv.put(keys.host("b"), encode(host("b", 12)))
            async with asyncio.timeout(5):
                while not any(e["event"] == "mesh.incomplete" for e in logs):
                    await asyncio.sleep(0.01)
            link.failing = False
            await until(link, "10.12.0.0/16")
    assert [e["event"] for e in logs].count("mesh.incomplete") == 1


async def test_a_host_without_a_key_is_named_once() -> None:
    link = _Link()
    with capture_logs() as logs:
        async with keeping(link) as kv:
            await kv.put(keys.host("b"), encode(msgspec.structs.replace(host("b", 12), wg_public_key="")))
            await kv.put(keys.host("c"), encode(host("c", 13)))
            await until(link, "10.13.0.0/16")
            link.lose_routes()
            await until(link, "10.13.0.0/16")
    assert [e["reasons"] for e in logs if e["event"] == "mesh.hosts_left_out"] == [
        {"b": "it has published no key"}
    ]
