"""The simulated loop itself: one seed gives one history, and a crash is a crash."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.simulation.loop import (
    START_S,
    ProcessFailed,
    current,
    run,
    run_to_end,
    stream,
)


async def busy_world() -> None:
    """Groups, time-outs, cancellations, queues, crashes and pauses, all at once."""
    loop = current()
    chance = stream(loop.seed, "busy")
    queue: asyncio.Queue[str] = asyncio.Queue(3)

    async def worker(name: str) -> None:
        try:
            for n in range(chance.randrange(2, 6)):
                await asyncio.sleep(chance.choice((0, 0, 0.5)))
                await queue.put(f"{name}{n}")
            if chance.random() < 0.3:
                raise ValueError(name)
        finally:
            loop.note(f"{name} ends")

    async def reader() -> None:
        while True:
            loop.note(await queue.get())

    async def host(name: str) -> None:
        while True:
            try:
                async with asyncio.timeout(1.2), asyncio.TaskGroup() as group:
                    for n in range(8):
                        group.create_task(worker(f"{name}.{n}."))
            except* (ValueError, TimeoutError) as errors:
                loop.note(f"{name} {sorted(str(e) for e in errors.exceptions)}")

    loop.spawn("reader", reader())
    for n in range(20):
        name = f"h{chance.randrange(3)}"
        chance.choice((loop.crash, loop.pause, loop.resume))(name)
        if not loop.alive(name):
            loop.spawn(name, host(name))
        await asyncio.sleep(chance.random())
        loop.note(f"round {n}")


def history(seed: int) -> str:
    finished = run_to_end(seed, busy_world, limit_s=1_000)
    return "\n".join((*finished.trace, *finished.failures, finished.signature))


def test_one_seed_gives_one_history_in_one_process():
    first = history(7)
    assert len(first.splitlines()) > 200
    assert {history(7) for _ in range(20)} == {first}


def test_other_seeds_give_other_histories():
    assert len({history(seed) for seed in range(10)}) == 10


def test_one_seed_gives_one_history_under_any_hash_seed():
    code = "from tests.simulation.test_loop import history; print(history(7))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("0", "1", "4242", "random")
    }
    assert outputs == {history(7) + "\n"}


def test_crash_runs_no_finally_and_keeps_no_timer():
    tidied: list[str] = []

    async def main() -> str:
        async def inner() -> None:
            try:
                await asyncio.sleep(5)
                tidied.append("went on")
            finally:
                tidied.append("finally")

        async def process() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(inner())
                await asyncio.sleep(100)

        current().spawn("ams", process())
        await asyncio.sleep(1)
        assert current().crash("ams")
        assert not current().crash("ams")
        await asyncio.sleep(50)
        return ",".join(tidied)

    assert run(1, main) == ""


def test_a_crash_takes_one_incarnation_only():
    async def main() -> list[str]:
        seen: list[str] = []

        async def process(name: str) -> None:
            await asyncio.sleep(2)
            seen.append(name)
            await asyncio.Event().wait()

        loop = current()
        loop.spawn("a", process("first"))
        loop.spawn("b", process("other"))
        await asyncio.sleep(1)
        loop.crash("a")
        loop.spawn("a", process("second"))
        await asyncio.sleep(5)
        return sorted(seen)

    assert run(1, main) == ["other", "second"]


def test_a_reply_to_a_crashed_process_goes_nowhere():
    async def main() -> list[str]:
        seen: list[str] = []
        reply: asyncio.Future[str] = current().create_future()

        async def process() -> None:
            seen.append(await reply)

        current().spawn("a", process())
        await asyncio.sleep(1)
        current().crash("a")
        reply.set_result("late")
        await asyncio.sleep(1)
        return seen

    assert run(1, main) == []


def test_pause_holds_everything_until_resume():
    async def main() -> list[float]:
        seen: list[float] = []

        async def process() -> None:
            for _ in range(3):
                await asyncio.sleep(1)
                seen.append(current().time() - START_S)

        current().spawn("a", process())
        await asyncio.sleep(1.5)
        current().pause("a")
        await asyncio.sleep(10)
        current().resume("a")
        await asyncio.sleep(10)
        return seen

    assert run(1, main) == [1.0, 11.5, 12.5]


def test_time_jumps_and_costs_nothing():
    async def main() -> float:
        await asyncio.sleep(3_000)
        return current().time() - START_S

    assert run(1, main) == 3_000


def test_deadlock_names_who_waits():
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(ProcessFailed, match=r"Deadlock(.|\n)*Event\.wait|Deadlock(.|\n)*main"):
        run(1, main)


def test_time_limit():
    async def main() -> None:
        for _ in itertools.count():
            await asyncio.sleep(1)

    with pytest.raises(ProcessFailed, match="not done after 60 s"):
        run(1, main, limit_s=60)


def test_livelock_is_found():
    async def main() -> None:
        for _ in itertools.count():
            await asyncio.sleep(0)

    with pytest.raises(ProcessFailed, match="Livelock"):
        run(1, main)


async def _thread() -> None:
    await asyncio.to_thread(print)


async def _socket() -> None:
    await asyncio.open_connection("127.0.0.1", 1)


async def _subprocess() -> None:
    await asyncio.create_subprocess_exec("true")


async def _server() -> None:
    await asyncio.start_server(lambda _reader, _writer: None, "127.0.0.1", 0)


@pytest.mark.parametrize("main", [_thread, _socket, _subprocess, _server])
def test_the_real_world_is_refused(main: Callable[[], Coroutine[Any, Any, None]]):
    before = threading.active_count()
    with pytest.raises(ProcessFailed, match="RealWorld"):
        run(1, main)
    assert threading.active_count() == before


def test_a_process_that_raises_fails_the_run():
    async def broken() -> None:
        await asyncio.sleep(1)
        raise KeyError("lost")

    async def main() -> None:
        current().spawn("ams", broken())
        await asyncio.sleep(10)

    with pytest.raises(ProcessFailed, match="process ams#1 raised KeyError"):
        run(1, main)
