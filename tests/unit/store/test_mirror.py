"""The mirror over the fake etcd, in virtual time: whatever happens, it ends as etcd is."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyd.errors import InvariantBroken, Unavailable
from flyd.model import App, Secrets, encode
from flyd.ports import Delete, Put
from flyd.store.memory import MemoryEtcd, MemoryKV
from flyd.store.mirror import Mirror
from tests.simulation.loop import run


class FaultyKV(MemoryKV):
    """A client whose connection can be cut."""

    cut = False

    async def _before(self, op: str) -> None:
        await super()._before(op)
        if self.cut:
            raise Unavailable("cut off")


async def followed(mirror: Mirror, seconds: float = 30.0) -> None:
    """Let the mirror work for so long (virtual)."""
    async with asyncio.TaskGroup() as tasks:
        keeping = tasks.create_task(mirror.keep())
        await asyncio.sleep(seconds)
        keeping.cancel()


def content(server: MemoryEtcd, *prefixes: str) -> list[tuple[str, bytes, int]]:
    items = server.list("").items
    return [(i.key, i.value, i.mod_revision) for i in items if i.key.startswith(prefixes)]


def seen(mirror: Mirror) -> list[tuple[str, bytes, int]]:
    return [(v.key, v.value, v.mod_revision) for v in mirror.list("", bytes)]


names = st.sampled_from(["/r/a/1", "/r/a/2", "/r/a/3", "/r/b/1", "/r/c/not-mirrored", "/other"])
steps = st.one_of(
    st.tuples(st.just("put"), names),
    st.tuples(st.just("delete"), names),
    st.tuples(st.just("pair"), st.just("")),
    st.tuples(st.just("compact"), st.just("")),
    st.tuples(st.just("cut"), st.just("")),
    st.tuples(st.just("heal"), st.just("")),
    st.tuples(st.just("pause"), st.just("")),
    st.tuples(st.just("outage"), names),
)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**16), st.lists(steps, max_size=40))
def test_ends_as_etcd_is_and_never_tears_a_transaction(seed: int, history: list[tuple[str, str]]) -> None:
    async def main() -> None:
        server = MemoryEtcd()
        kv = FaultyKV(server)
        mirror = Mirror(kv, ["/r/a/", "/r/b/"])
        known: dict[int, Any] = {0: []}

        def check() -> None:
            view = seen(mirror)
            assert known.setdefault(mirror.version, view) == view, "changed without a new version"
            one, two = mirror.get("/r/a/pair", str), mirror.get("/r/b/pair", str)
            assert (one and one.value) == (two and two.value), "half a transaction"

        async def look() -> None:
            version = 0
            while True:
                version = await mirror.wait_change(version)
                check()

        async def act() -> None:
            for n, (step, name) in enumerate(history):
                value = str(n).encode()
                match step:
                    case "put":
                        server.txn((), (Put(name, value),))
                    case "delete":
                        server.txn((), (Delete(name),))
                    case "pair":
                        server.txn((), (Put("/r/a/pair", value), Put("/r/b/pair", value)))
                    case "compact":
                        server.compact(server.revision)
                    case "outage":
                        kv.cut = True
                        await asyncio.sleep(0.3)
                        server.txn((), (Delete(name), Put("/r/a/pair", value), Put("/r/b/pair", value)))
                        server.compact(server.revision)
                        kv.cut = False
                    case "pause":
                        await asyncio.sleep(0.3)
                    case _:
                        kv.cut = step == "cut"
                await asyncio.sleep(0)
                check()

        async with asyncio.TaskGroup() as tasks:
            background = [tasks.create_task(mirror.keep()), tasks.create_task(look())]
            await act()
            kv.cut = False
            await asyncio.sleep(10)
            assert seen(mirror) == content(server, "/r/a/", "/r/b/")
            for task in background:
                task.cancel()

    run(seed, main)


def test_compaction_while_cut_off_shows_deletions() -> None:
    async def main() -> None:
        server = MemoryEtcd()
        kv = FaultyKV(server)
        mirror = Mirror(kv, ["/"])
        server.txn((), (Put("/gone", b"1"), Put("/kept", b"1"), Put("/changed", b"1")))
        async with asyncio.TaskGroup() as tasks:
            keeping = tasks.create_task(mirror.keep())
            await mirror.wait_synced()
            before = mirror.version
            await asyncio.sleep(1)
            kv.cut = True
            server.txn((), (Delete("/gone"), Put("/changed", b"2")))
            await asyncio.sleep(1)
            server.compact(server.revision)
            assert mirror.get("/gone", str) is not None, "the last view stays while etcd is away"
            kv.cut = False
            await mirror.wait_change(before)
            assert [v.key for v in mirror.list("/", str)] == ["/changed", "/kept"]
            assert mirror.revision == server.revision
            keeping.cancel()

    run(1, main)


def test_values_are_decoded_once_a_revision() -> None:
    async def main() -> None:
        server = MemoryEtcd()
        mirror = Mirror(MemoryKV(server), ["/apps/"])
        server.txn((), (Put("/apps/a", encode(App(name="a"))), Put("/apps/b", encode(App(name="b")))))
        await followed(mirror)
        first = mirror.list("/apps/", App)
        assert [v.value.name for v in first] == ["a", "b"]
        server.txn((), (Put("/apps/b", encode(App(name="b2"))),))
        await followed(mirror)
        second = mirror.list("/apps/", App)
        assert second[0] is first[0]
        assert second[0] is mirror.get("/apps/a", App)
        assert second[1].value.name == "b2"
        assert second[1].mod_revision == server.revision
        assert mirror.get("/apps/absent", App) is None

    run(1, main)


def test_an_empty_prefix_syncs_without_a_version() -> None:
    async def main() -> None:
        mirror = Mirror(MemoryKV(), ["/nothing/"])
        async with asyncio.TaskGroup() as tasks:
            keeping = tasks.create_task(mirror.keep())
            await mirror.wait_synced()
            assert (mirror.version, mirror.list("/nothing/", str)) == (0, [])
            keeping.cancel()

    run(1, main)


def test_a_value_that_cannot_be_read_names_its_key() -> None:
    async def main() -> None:
        server = MemoryEtcd()
        server.txn((), (Put("/apps/a", b'{"app": 7}'),))
        mirror = Mirror(MemoryKV(server), ["/apps/"])
        await followed(mirror)
        with pytest.raises(InvariantBroken, match="/apps/a") as said:
            mirror.get("/apps/a", Secrets)
        assert "etcdctl get /apps/a" in said.value.hint

    run(1, main)


def test_ignored_keys_wake_nobody() -> None:
    async def main() -> None:
        server = MemoryEtcd()
        server.txn((), (Put("/pg/a/lease", b"1"), Put("/pg/a/leader", b"x")))
        mirror = Mirror(MemoryKV(server), ["/pg/"], ignored=lambda key: key.endswith("/lease"))
        async with asyncio.TaskGroup() as tasks:
            keeping = tasks.create_task(mirror.keep())
            await mirror.wait_synced()
            version = mirror.version
            server.txn((), (Put("/pg/a/lease", b"2"),))
            await mirror.wait_revision(server.revision)
            assert mirror.version == version
            assert [held.key for held in mirror.list("/pg/", str)] == ["/pg/a/leader"]
            server.txn((), (Put("/pg/a/leader", b"y"), Delete("/pg/a/lease")))
            assert await mirror.wait_change(version) > version
            keeping.cancel()

    run(1, main)
