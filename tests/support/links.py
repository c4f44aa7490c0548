"""A TCP relay that can go silent: how a test cuts one process off from one server, without rights."""

from __future__ import annotations

import asyncio
import contextlib

CHUNK = 65536


class Link:
    """From a port of its own to `target` (host:port). Cut, it takes everything and passes nothing on."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.endpoint = ""

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()[:2]
        self.endpoint = f"{host}:{port}"

    def cut(self) -> None:
        """Silence from now on, on open connections and on new ones."""
        self._open.clear()

    def heal(self) -> None:
        """What was held up arrives now, as it does when a network comes back."""
        self._open.set()

    async def close(self) -> None:
        """End every connection."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._open.wait()
            host, _, port = self._target.rpartition(":")
            with contextlib.suppress(OSError):
                there_reader, there_writer = await asyncio.open_connection(host, int(port))
                try:
                    async with asyncio.TaskGroup() as pumps:
                        pumps.create_task(self._pump(reader, there_writer))
                        pumps.create_task(self._pump(there_reader, writer))
                finally:
                    there_writer.close()
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction, until it ends; then the other ends too."""
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                await self._open.wait()
                writer.write(data)
                await writer.drain()
        writer.close()
