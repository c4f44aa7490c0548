"""One session beside a machine, for `fly console`: a command with its input, on a terminal or on pipes.

Owns the terminal (a pty) and the command's session from start to end. On a terminal the command is
begun by util-linux' setsid, which makes the pty the session's controlling terminal: that must happen
between fork and exec, where a process with threads must not run Python. Called by the process driver,
which says where and as whom.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
import termios
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable, Sequence
from io import FileIO

from flyd.drivers.process.exec import EXIT_NOT_FOUND, EXIT_NOT_RUNNABLE, EXIT_SIGNALLED, Place
from flyd.drivers.sessions import end_session, typed_end
from flyd.model import ExecOutput
from flyd.ports import SessionClient, TerminalSize

PIECE_BYTES = 32 * 1024
DRAIN_S = 1.0  # once the command has ended, what still holds its output may be silent for so long


class _Ends:
    """The files between us and a command: a pty, or three pipes."""

    def __init__(self, size: TerminalSize | None, owner: int | None) -> None:
        if size is None:
            pipes = [os.pipe() for _ in range(3)]
            self.terminal: FileIO | None = None
            self.inlet, *self.outlets = FileIO(pipes[0][1], "w"), FileIO(pipes[1][0]), FileIO(pipes[2][0])
            self.theirs = (FileIO(pipes[0][0]), FileIO(pipes[1][1], "w"), FileIO(pipes[2][1], "w"))
        else:
            ours, slave = os.openpty()
            self.terminal = FileIO(ours)
            self.inlet, self.outlets = FileIO(os.dup(ours), "w"), [FileIO(os.dup(ours))]
            self.theirs = (FileIO(slave, "r+"),) * 3
            self.resize(size)
            if owner is not None:
                os.fchown(slave, owner, -1)

    def resize(self, size: TerminalSize) -> None:
        """Give the terminal this size; whoever is in its foreground hears of it. On pipes nothing."""
        if self.terminal is not None:
            packed = struct.pack("HHHH", size.rows, size.columns, 0, 0)
            fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, packed)

    def let_go(self) -> None:
        """Close their ends, once the command has them."""
        for file in self.theirs:
            file.close()

    def close(self) -> None:
        """Close everything, when the command has ended: its terminal's end would end it, too.

        Some commands close their outputs before they exit, so that of an output says nothing.
        """
        for file in (*self.theirs, self.inlet, *self.outlets):
            file.close()
        if self.terminal is not None:
            self.terminal.close()


class _Source(asyncio.StreamReaderProtocol):
    """Reads output. That nobody has a pty's other end open any more is its end, not an error (EIO)."""

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(None)


async def run_session(command: Sequence[str], place: Place, client: SessionClient) -> int:
    """Run it to its end; its exit code, 128 + the signal if one ended it."""
    uid, gid, groups = place.identity or (None, None, None)
    words, env = list(command), dict(place.environment)
    if client.terminal is not None:
        words, env["TERM"] = ["setsid", "--ctty", *command], client.terminal.kind
    with contextlib.closing(_Ends(client.terminal and client.terminal.size, uid)) as ends:
        try:
            process = await asyncio.create_subprocess_exec(
                *words,
                stdin=ends.theirs[0],
                stdout=ends.theirs[1],
                stderr=ends.theirs[2],
                cwd=place.directory,
                env=env,
                start_new_session=client.terminal is None,
                user=uid,
                group=gid,
                extra_groups=groups,
            )
        except OSError as error:
            why = f"flyd: cannot run {command[0]!r}: {os.strerror(error.errno or 0)}\n"
            await client.output(ExecOutput(stderr=why.encode()))
            return EXIT_NOT_FOUND if isinstance(error, FileNotFoundError) else EXIT_NOT_RUNNABLE
        ends.let_go()
        try:
            code = await _attend(process, ends, client)
        finally:
            await end_session(process.pid)
    return code if code >= 0 else EXIT_SIGNALLED - code


async def _attend(process: Process, ends: _Ends, client: SessionClient) -> int:
    """Carry input and output until the command has ended; its return code."""

    async def said(data: bytes) -> None:
        await client.output(ExecOutput(stdout=data))

    async def said_apart(data: bytes) -> None:
        await client.output(ExecOutput(stderr=data))

    async with asyncio.TaskGroup() as tasks:
        feeding = tasks.create_task(_feed(ends, client))
        told = zip(ends.outlets, (said, said_apart), strict=False)
        reading = [tasks.create_task(_read(process, outlet, tell)) for outlet, tell in told]
        code = await process.wait()
        await end_session(process.pid)
        await asyncio.wait(reading)
        feeding.cancel()
    return code


async def _feed(ends: _Ends, client: SessionClient) -> None:
    """Hand input on, as fast as the command takes it."""
    loop = asyncio.get_running_loop()
    protocol = asyncio.StreamReaderProtocol(asyncio.StreamReader())
    transport, _ = await loop.connect_write_pipe(lambda: protocol, ends.inlet)
    transport.set_write_buffer_limits(0)  # so that `drain` returns when all is written
    writer = asyncio.StreamWriter(transport, protocol, None, loop)
    last = b""
    try:
        async for item in client.inputs:
            if isinstance(item, TerminalSize):
                ends.resize(item)
                continue
            writer.write(item)
            await writer.drain()
            last = item
        if ends.terminal is not None:
            writer.write(typed_end(last))
            await writer.drain()
    except OSError:
        return  # it has ended, or wants no input
    finally:
        if not transport.is_closing():
            transport.abort()


async def _read(process: Process, outlet: FileIO, tell: Callable[[bytes], Awaitable[None]]) -> None:
    """Hand one output on until its end, as fast as the client takes it."""
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: _Source(reader), outlet)
    try:
        while True:
            try:
                async with asyncio.timeout(DRAIN_S):
                    data = await reader.read(PIECE_BYTES)
            except TimeoutError:
                if process.returncode is not None:
                    return  # what left the command's session still has it open
                continue
            if not data:
                return
            await tell(data)
    finally:
        transport.close()
