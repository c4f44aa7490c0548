"""One command in a machine's container, for `fly machine exec`: its output as it comes, its exit code last.

The engine can start a command but not end it, so past the deadline, or when the reader goes away, flyd
kills the command's process group by its pid, after seeing that this pid is still in the container. What
left that group ends with the machine. Called by the Docker driver.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import structlog

from flyd.drivers.docker.engine import Engine
from flyd.drivers.docker.line import EngineSocket, Line
from flyd.drivers.docker.spec import Seen
from flyd.errors import NotFound, Unavailable
from flyd.model import ExecOutput

log = structlog.get_logger(__name__)

EXIT_TIMEOUT = 124  # as coreutils' timeout says it
EXIT_NOT_FOUND = 127
EXIT_NOT_RUNNABLE = 126
EXIT_POLL_S = 0.01  # a command's output may end a moment before the command does
REFUSAL = b"OCI runtime exec failed"  # said on the command's own stdout, when it could not begin
NOT_FOUND = (b"executable file not found", b"no such file or directory")

Call = Callable[..., Awaitable[Any]]


async def run_command(
    engine: Engine,
    call: Call,
    socket: EngineSocket,
    container: Seen,
    command: Sequence[str],
    timeout_s: float,
) -> AsyncIterator[ExecOutput]:
    """Run it to its end, or to its deadline, without input. `call` runs a blocking call in a thread."""
    deadline_s = asyncio.get_running_loop().time() + timeout_s
    machine_id = container.machine_id
    exec_id = await socket.make(container.container_id, command, None)
    code: int | None = None
    line: Line | None = None
    try:
        line = await socket.begin(exec_id, None)
        line.end_input()
        while True:
            try:
                async with asyncio.timeout_at(deadline_s):
                    piece = await line.next()
                    if piece is None:
                        code = await exit_code(engine, call, machine_id, exec_id)
            except TimeoutError:
                yield ExecOutput(stderr=f"flyd: killed, it ran longer than {timeout_s:g} s\n".encode())
                yield ExecOutput(exit_code=EXIT_TIMEOUT)
                return
            if piece is None:
                break
            if (code := await refused(engine, call, machine_id, exec_id, piece.stdout)) is not None:
                yield ExecOutput(stderr=piece.stdout)
                break
            yield piece
        yield ExecOutput(exit_code=code)
    finally:
        if line is not None:
            line.close()
        if code is None:
            await _kill(engine, call, machine_id, container.container_id, exec_id)


async def exit_code(engine: Engine, call: Call, machine_id: str, exec_id: str) -> int:
    """How a command ended whose output has ended."""
    while True:
        running, _, code = await call(engine.exec_state, machine_id, exec_id)
        if not running:
            return code
        await asyncio.sleep(EXIT_POLL_S)


async def refused(engine: Engine, call: Call, machine_id: str, exec_id: str, stdout: bytes) -> int | None:
    """The exit code, as shells say it, of a command that could not begin: then this is why; else None."""
    if not stdout.startswith(REFUSAL):
        return None
    _, pid, _ = await call(engine.exec_state, machine_id, exec_id)
    if pid > 0:
        return None  # it is what the command itself printed
    return EXIT_NOT_FOUND if any(words in stdout for words in NOT_FOUND) else EXIT_NOT_RUNNABLE


async def _kill(engine: Engine, call: Call, machine_id: str, container_id: str, exec_id: str) -> None:
    try:
        running, pid, _ = await call(engine.exec_state, machine_id, exec_id)
        if running and pid > 1 and container_id in Path(f"/proc/{pid}/cgroup").read_text():
            os.killpg(pid, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError, NotFound):
        return  # it has ended
    except (PermissionError, Unavailable) as error:
        log.warning("docker.command_left", machine=machine_id, error=str(error))
