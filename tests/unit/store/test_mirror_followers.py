"""What the mirror tells of its changes: to followers, by a prefix's version, and by its lists."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from flyd.ports import Delete, Put
from flyd.store.memory import MemoryEtcd, MemoryKV
from flyd.store.mirror import Mirror
from tests.simulation.loop import run

PREFIXES = ("/r/a/", "/r/b/")
KEYS = st.sampled_from(("/r/a/1", "/r/a/2", "/r/b/1", "/r/b/2/x", "/r/c/not-mirrored", "/r/a\u00e9"))
STEPS = st.lists(st.tuples(KEYS, st.booleans()), max_size=12)


async def followed(server: MemoryEtcd, before: list[tuple[str, bool]], after: list[tuple[str, bool]]) -> None:
    kv = MemoryKV(server)
    await write(kv, before)
    mirror = Mirror(kv, PREFIXES)
    told: list[str] = []
    async with asyncio.TaskGroup() as group:
        keeping = group.create_task(mirror.keep())
        await mirror.wait_synced()
        mirror.follow(told.append)
        assert told == sorted(k for k in content(server) if k.startswith(PREFIXES))
        for step in after:
            told.clear()
            versions = {prefix: mirror.changed_at(prefix) for prefix in PREFIXES}
            held = {prefix: mirror.list(prefix, str) for prefix in PREFIXES}
            was = content(server)
            await write(kv, [step])
            await mirror.wait_revision(server.revision)
            assert mirror.revision >= server.revision
            now = content(server)
            changed = [k for k in {**was, **now} if was.get(k) != now.get(k) and k.startswith(PREFIXES)]
            assert told == changed
            for prefix in PREFIXES:
                assert (mirror.changed_at(prefix) != versions[prefix]) == any(
                    k.startswith(prefix) for k in changed
                )
                listed = mirror.list(prefix, str)
                assert [v.key for v in listed] == sorted(k for k in now if k.startswith(prefix))
                assert [(v.key, v.mod_revision) for v in listed] == [
                    (k, now[k]) for k in sorted(now) if k.startswith(prefix)
                ]
                listed.clear()  # a list is the caller's own
                held[prefix].clear()
        keeping.cancel()


async def write(kv: MemoryKV, steps: list[tuple[str, bool]]) -> None:
    for key, put in steps:
        await kv.txn((), (Put(key, b"x") if put else Delete(key),))


def content(server: MemoryEtcd) -> dict[str, int]:
    return {item.key: item.mod_revision for item in server.list("").items}


@settings(max_examples=100, deadline=None)
@given(STEPS, STEPS)
def test_followers_and_lists_see_every_change_and_nothing_else(
    before: list[tuple[str, bool]], after: list[tuple[str, bool]]
) -> None:
    run(1, lambda: followed(MemoryEtcd(), before, after))
