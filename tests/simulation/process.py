"""Processes, and the tasks, futures and callbacks that know theirs and hash by number.

Used by tests/simulation/loop.py alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Generator
from typing import Any, TypeVar, cast

T = TypeVar("T")

CLOSE_ATTEMPTS = 20  # a frame may await in its finally blocks; each attempt ends one of them


class Process:
    """One incarnation of a simulated process: what a crash takes away at once."""

    def __init__(self, name: str, incarnation: int) -> None:
        self.name = name
        self.incarnation = incarnation
        self.alive = True
        self.paused = False
        self.tasks: list[StableTask[Any]] = []
        self.held: list[StableHandle | StableTimer] = []
        self._prune_at = 64

    def adopt(self, task: StableTask[Any]) -> None:
        """Hold on to the task while it runs: after a crash nothing else keeps its frames."""
        self.tasks.append(task)
        if len(self.tasks) > self._prune_at:
            self.tasks = [t for t in self.tasks if not t.done()]
            self._prune_at = 64 + 2 * len(self.tasks)

    def __repr__(self) -> str:
        return f"{self.name}#{self.incarnation}"


PROCESS: contextvars.ContextVar[Process] = contextvars.ContextVar("simulated_process")


class StableTask(asyncio.Task[T]):
    """A task that hashes by its number, so that a set of tasks has one order."""

    def __init__(self, number: int, coro: Any, **arguments: Any) -> None:
        self._number = number
        super().__init__(coro, **arguments)

    def __hash__(self) -> int:
        return self._number


class StableFuture(asyncio.Future[T]):
    """A future that hashes by its number."""

    def __init__(self, number: int, loop: asyncio.AbstractEventLoop) -> None:
        self._number = number
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self._number


class StableHandle(asyncio.Handle):
    """A callback that knows the process that it belongs to."""

    process: Process

    def run(self) -> None:
        """Call the callback in its context."""
        self._run()


class StableTimer(asyncio.TimerHandle):
    """A timer that knows the process that it belongs to."""

    process: Process

    def run(self) -> None:
        """Call the callback in its context."""
        self._run()


def close_quietly(task: StableTask[Any]) -> None:
    """Free the frames of a task whose run is over; its `finally` blocks reach nothing any more."""
    cast(Any, task)._log_destroy_pending = False
    coro = cast(Generator[Any, Any, Any], task.get_coro())
    for _ in range(CLOSE_ATTEMPTS):
        with contextlib.suppress(BaseException):
            coro.close()
            return
