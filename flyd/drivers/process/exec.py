"""One command beside a machine, for `fly machine exec`: its output as it comes, its exit code last.

Owns the command's process group from start to end: past the deadline, or when the reader goes
away, the whole group is killed. Called by the process driver, which says where and as whom. What
a killed flyd leaves of it carries the machine's mark, and the driver kills it when the machine stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from flyd.drivers.process.directory import Identity
from flyd.model import ExecOutput

EXIT_TIMEOUT = 124  # as coreutils' timeout says it
EXIT_NOT_FOUND = 127
EXIT_NOT_RUNNABLE = 126
EXIT_SIGNALLED = 128  # plus the signal's number, as shells say it
QUEUE_MAX = 64  # pieces of output kept for a slow reader before the command has to wait


class Place(NamedTuple):
    """Where, with what environment and as whom (None: as flyd) a command runs beside its machine."""

    directory: Path
    environment: Mapping[str, str]
    identity: Identity | None


class _Outputs(asyncio.SubprocessProtocol):
    """Hands pieces of output on; None when the command has ended and its pipes are closed."""

    def __init__(self) -> None:
        self.pieces: asyncio.Queue[ExecOutput | None] = asyncio.Queue()
        self._transport: asyncio.SubprocessTransport | None = None
        self._paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.SubprocessTransport, transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self.pieces.put_nowait(ExecOutput(stdout=data) if fd == 1 else ExecOutput(stderr=data))
        if self.pieces.qsize() >= QUEUE_MAX and not self._paused:
            self._paused = True
            for pipe in self._open_pipes():
                pipe.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.pieces.put_nowait(None)

    async def next(self) -> ExecOutput | None:
        """The next piece; a slow reader slows the command down."""
        piece = await self.pieces.get()
        if self._paused and self.pieces.empty():
            self._paused = False
            for pipe in self._open_pipes():
                pipe.resume_reading()
        return piece

    def _open_pipes(self) -> list[asyncio.ReadTransport]:
        assert self._transport is not None, "asyncio calls connection_made first"
        pipes = [cast(asyncio.ReadTransport, self._transport.get_pipe_transport(fd)) for fd in (1, 2)]
        return [pipe for pipe in pipes if not pipe.is_closing()]


async def run_command(command: Sequence[str], place: Place, timeout_s: float) -> AsyncIterator[ExecOutput]:
    """Run it to its end, or to its deadline."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    uid, gid, groups = place.identity or (None, None, None)
    try:
        transport, outputs = await loop.subprocess_exec(
            _Outputs,
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            cwd=place.directory,
            env=dict(place.environment),
            start_new_session=True,
            user=uid,
            group=gid,
            extra_groups=groups,
        )
    except OSError as error:
        code = EXIT_NOT_FOUND if isinstance(error, FileNotFoundError) else EXIT_NOT_RUNNABLE
        yield ExecOutput(
            stderr=f"flyd: cannot run {command[0]!r}: {os.strerror(error.errno or 0)}\n".encode()
        )
        yield ExecOutput(exit_code=code)
        return
    try:
        while True:
            try:
                async with asyncio.timeout_at(deadline_s):
                    piece = await outputs.next()
            except TimeoutError:
                yield ExecOutput(stderr=f"flyd: killed, it ran longer than {timeout_s:g} s\n".encode())
                yield ExecOutput(exit_code=EXIT_TIMEOUT)
                return
            if piece is None:
                break
            yield piece
        code = transport.get_returncode() or 0
        yield ExecOutput(exit_code=code if code >= 0 else EXIT_SIGNALLED - code)
    finally:
        _kill_group(transport)
        transport.close()


def _kill_group(transport: asyncio.SubprocessTransport) -> None:
    """Before the transport is closed, which may reap the leader and so free its group's id."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(transport.get_pid(), signal.SIGKILL)
