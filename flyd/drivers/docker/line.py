"""The engine's calls for a command with input: make it, begin it on a line of its own, size its terminal.

A line is a connection that the engine hands over: after its answer it carries the command's input
and output. It is spoken to here without the SDK, which needs a thread for each direction, and loses
what comes in one packet with the answer. Called by session.py.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import requests
from docker.errors import APIError

from flyd.drivers.docker.errors import translated
from flyd.model import ExecOutput
from flyd.ports import Terminal, TerminalSize

PIECE_BYTES = 32 * 1024
CALL_TIMEOUT_S = 60.0

_SWITCHED = 101
_STDERR = 2  # the number of this output in a frame's head
_HEAD = struct.Struct(">BxxxL")


class EngineSocket:
    """The engine's socket, by its unix:// URL; `host` and `machine_id` are for the words of an error."""

    def __init__(self, url: str, host: str, machine_id: str) -> None:
        self._path = url.removeprefix("unix://")
        self._host = host
        self._what = f"run a command in machine {machine_id}"

    async def make(self, container_id: str, command: Sequence[str], terminal: Terminal | None) -> str:
        """Prepare a command; its id."""
        body = {
            "Cmd": list(command),
            "Tty": terminal is not None,
            "Env": [f"TERM={terminal.kind}"] if terminal is not None else [],
            "AttachStdin": True,
            "AttachStdout": True,
            "AttachStderr": True,
        }
        made: dict[str, str] = json.loads(await self._call(f"/containers/{container_id}/exec", body))
        return made["Id"]

    async def resize(self, exec_id: str, size: TerminalSize) -> None:
        """Give a command's terminal this size; whoever is in its foreground hears of it."""
        await self._call(f"/exec/{exec_id}/resize?h={size.rows}&w={size.columns}", {})

    async def begin(self, exec_id: str, terminal: Terminal | None) -> Line:
        """Run a prepared command. Its terminal has its size from the first moment on from engine 23 on."""
        body: dict[str, Any] = {"Tty": terminal is not None}
        if terminal is not None:
            body["ConsoleSize"] = [terminal.size.rows, terminal.size.columns]
        switch = {"Connection": "Upgrade", "Upgrade": "tcp"}
        with translated(self._host, self._what):
            reader, writer = await self._connect()
            try:
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    status = await _ask(reader, writer, f"/exec/{exec_id}/start", body, switch)
                    if status != _SWITCHED:
                        raise _refusal(status, await reader.read())
            except BaseException:
                writer.close()
                raise
        return Line(reader, writer, lambda: translated(self._host, self._what), framed=terminal is None)

    async def _call(self, path: str, body: Mapping[str, Any]) -> bytes:
        with translated(self._host, self._what):
            reader, writer = await self._connect()
            try:
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    status = await _ask(reader, writer, path, body, {"Connection": "close"})
                    answer = await reader.read()
            finally:
                writer.close()
            if status >= 300:
                raise _refusal(status, answer)
            return answer

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(self._path)


class Line:
    """A command's input and output; `framed` where its two outputs come apart."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        translated: Callable[[], AbstractContextManager[None]],
        *,
        framed: bool,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._translated = translated
        self._framed = framed
        self._left = 0  # bytes of the frame that is being read
        self._stderr = False

    async def next(self) -> ExecOutput | None:
        """The next piece of output, None at its end."""
        with self._translated():
            if not self._framed:
                data = await self._reader.read(PIECE_BYTES)
                return ExecOutput(stdout=data) if data else None
            while not self._left:
                try:
                    number, self._left = _HEAD.unpack(await self._reader.readexactly(_HEAD.size))
                except asyncio.IncompleteReadError:
                    return None
                self._stderr = number == _STDERR
            data = await self._reader.read(min(self._left, PIECE_BYTES))
        if not data:
            return None
        self._left -= len(data)
        return ExecOutput(stderr=data) if self._stderr else ExecOutput(stdout=data)

    async def write(self, data: bytes) -> None:
        """Hand input on; returns when there is room for more."""
        self._writer.write(data)
        await self._writer.drain()

    def end_input(self) -> None:
        """The command reads the end of its input."""
        self._writer.write_eof()

    def close(self) -> None:
        """Let go; the command itself goes on."""
        self._writer.transport.abort()


async def _ask(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    path: str,
    body: Mapping[str, Any],
    headers: Mapping[str, str],
) -> int:
    """Send a request, as HTTP/1.0 so that no answer is chunked; its status. What follows is the body."""
    data = json.dumps(body).encode()
    sent = {"Host": "docker", "Content-Type": "application/json", "Content-Length": len(data), **headers}
    lines = [f"POST {path} HTTP/1.0", *(f"{name}: {value}" for name, value in sent.items()), "", ""]
    writer.write("\r\n".join(lines).encode() + data)
    await writer.drain()
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        raise ConnectionResetError("it closed the connection without an answer") from None
    return int(head.split(b" ", 2)[1])


def _refusal(status: int, body: bytes) -> APIError:
    """The engine's no, as the SDK puts it, so that it is translated in one place."""
    answer = requests.Response()
    answer.status_code = status
    try:
        why = str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        why = body.decode(errors="replace")
    return APIError(why, response=answer, explanation=why)
