"""Locks by name: one at a time for each name, and nothing is kept of a name that nobody uses."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from flyd.drivers.locks import Locks


async def test_one_name_is_held_by_one_and_others_are_free() -> None:
    locks = Locks()
    inside: dict[str, int] = {"a": 0, "b": 0}
    most: dict[str, int] = {"a": 0, "b": 0}
    together = 0

    async def work(name: str) -> None:
        nonlocal together
        async with locks.of(name):
            inside[name] += 1
            most[name] = max(most[name], inside[name])
            together = max(together, sum(inside.values()))
            await asyncio.sleep(0)
            inside[name] -= 1

    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            for name in inside:
                group.create_task(work(name))
    assert most == {"a": 1, "b": 1}
    assert together == 2


async def test_a_name_is_forgotten_once_nobody_holds_or_awaits_it() -> None:
    locks = Locks()
    held, go_on = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with locks.of("a"):
            held.set()
            await go_on.wait()

    async def fail(name: str) -> None:
        async with locks.of(name):
            raise KeyError(name)

    async with asyncio.TaskGroup() as group:
        group.create_task(hold())
        group.create_task(hold())
        await held.wait()
        for number in range(100):
            with suppress(KeyError):
                await fail(f"unknown-{number}")
        assert len(locks) == 1
        go_on.set()
    assert len(locks) == 0
