"""keep_edge over a real mirror on the in-memory store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from flyd.edge import loop
from flyd.edge.loop import PREFIXES, keep_edge
from flyd.edge.resources import EdgeConfig
from flyd.edge.xds import AdsServer, explain_refusal
from flyd.model import App, AppKind, PostgresLeader, encode
from flyd.store import keys
from flyd.store.memory import MemoryKV
from flyd.store.mirror import Mirror
from tests.support.edge import host, http_service, machine, status


class Published(AdsServer):
    """Remembers what was published."""

    def __init__(self) -> None:
        super().__init__("unix:/nowhere")
        self.configs: list[EdgeConfig] = []
        self.changed = asyncio.Event()

    def publish(self, config: EdgeConfig) -> None:
        super().publish(config)
        self.configs.append(config)
        self.changed.set()

    async def wait(self, count: int) -> None:
        async with asyncio.timeout(2):
            while len(self.configs) < count:
                self.changed.clear()
                await self.changed.wait()


@asynccontextmanager
async def kept(kv: MemoryKV) -> AsyncGenerator[Published, None]:
    ads = Published()
    mirror = Mirror(kv, PREFIXES)
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(mirror.keep()),
            group.create_task(keep_edge(host("fra"), mirror, ads)),
        ]
        await ads.wait(1)
        yield ads
        for task in tasks:
            task.cancel()


async def test_a_change_is_published_and_what_does_not_matter_is_not() -> None:
    kv = MemoryKV()
    await kv.put(keys.app("chat"), encode(App(name="chat")))
    one = machine("m1", "fra", http_service())
    async with kept(kv) as ads:
        await kv.put(keys.machine("chat", "m1"), encode(one))
        await ads.wait(2)
        await kv.put(keys.postgres_members("db") + "n1", b"{}")
        await kv.put(keys.status("chat", "m1"), encode(status(one)))
        await ads.wait(3)
    assert len({c.endpoints for c in ads.configs}) == 3


async def test_bursts_are_published_together_but_a_new_leader_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop, "COALESCE_S", 60.0)
    kv = MemoryKV()
    await kv.put(keys.app("db"), encode(App(name="db", kind=AppKind.POSTGRES, endpoint_port=5432)))
    async with kept(kv) as ads:
        await kv.put(keys.app("chat"), encode(App(name="chat")))
        await kv.put(keys.machine("chat", "m1"), encode(machine("m1", "fra", http_service())))
        leader = PostgresLeader(cluster="db", epoch=2, node="n", address="127.0.0.1:1", serving=True)
        await kv.put(keys.postgres_leader("db"), encode(leader))
        await ads.wait(2)
        assert [r.name for r in ads.configs[1].clusters] == ["chat/http", "db/postgres", "db/reads"]


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("Address already in use", "ss -ltnp 'sport = :8080'"),
        ("Permission denied", "choose a higher port"),
        ("Cannot assign requested address", "127.0.0.11 is not one of this host's"),
        ("Something new", "Something new. Tried again"),
    ],
)
def test_a_port_that_cannot_be_had_is_explained(reason: str, remedy: str) -> None:
    said = explain_refusal(
        f"Error adding/updating listener(s) http: cannot bind '127.0.0.11:8080': {reason}\n"
    )
    assert f"127.0.0.11 port 8080: {reason}" in said
    assert remedy in said


def test_any_other_refusal_is_passed_on() -> None:
    assert "no such filter" in explain_refusal("no such filter")
