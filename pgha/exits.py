"""Noticing at once that a process has ended, without polling: one file descriptor a process (pidfd).

Used by pgha/postgres.py for the server and its walreceiver. Linux only.
"""

from __future__ import annotations

import asyncio
import os


class Exits:
    """Processes under watch; at most one under each name."""

    def __init__(self) -> None:
        self._watched: dict[str, tuple[int, int]] = {}  # name -> (pid, descriptor)
        self._ended = asyncio.Event()

    def watch(self, name: str, pid: int) -> None:
        """Watch this process under this name from now on; the one before is forgotten. 0: none."""
        if pid == self._watched.get(name, (0, 0))[0]:
            return
        self._forget(name)
        if pid == 0:
            return
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self._ended.set()
            return
        self._watched[name] = (pid, descriptor)
        asyncio.get_running_loop().add_reader(descriptor, self._end, name)

    async def wait(self) -> None:
        """Return once one of them has ended since the last call."""
        await self._ended.wait()
        self._ended.clear()

    def _end(self, name: str) -> None:
        self._forget(name)
        self._ended.set()

    def _forget(self, name: str) -> None:
        _, descriptor = self._watched.pop(name, (0, -1))
        if descriptor >= 0:
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)
