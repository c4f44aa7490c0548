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
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from flyd.drivers.docker.engine import Engine
from flyd.drivers.docker.spec import Seen
from flyd.drivers.docker.streams import ThreadedStream
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
    engine: Engine, call: Call, container: Seen, command: Sequence[str], timeout_s: float
) -> AsyncIterator[ExecOutput]:
    """Run it to its end, or to its deadline. `call` runs a blocking call in a thread."""
    deadline_s = asyncio.get_running_loop().time() + timeout_s
    machine_id = container.machine_id
    exec_id: str = await call(engine.exec_create, machine_id, container.container_id, command)
    stream = ThreadedStream(partial(engine.exec_start, machine_id, exec_id), f"command in {machine_id}")
    code: int | None = None
    try:
        while True:
            try:
                async with asyncio.timeout_at(deadline_s):
                    piece = await stream.next()
                    if piece is None:
                        code = await _exit_code(engine, call, machine_id, exec_id)
            except TimeoutError:
                yield ExecOutput(stderr=f"flyd: killed, it ran longer than {timeout_s:g} s\n".encode())
                yield ExecOutput(exit_code=EXIT_TIMEOUT)
                return
            if piece is None:
                break
            stdout, stderr = piece[0] or b"", piece[1] or b""
            if stdout.startswith(REFUSAL) and not await _began(engine, call, machine_id, exec_id):
                code = EXIT_NOT_FOUND if any(w in stdout for w in NOT_FOUND) else EXIT_NOT_RUNNABLE
                yield ExecOutput(stderr=stdout)
                break
            yield ExecOutput(stdout=stdout, stderr=stderr)
        yield ExecOutput(exit_code=code)
    finally:
        stream.close()
        if code is None:
            await _kill(engine, call, machine_id, container.container_id, exec_id)


async def _exit_code(engine: Engine, call: Call, machine_id: str, exec_id: str) -> int:
    while True:
        running, _, code = await call(engine.exec_state, machine_id, exec_id)
        if not running:
            return code
        await asyncio.sleep(EXIT_POLL_S)


async def _began(engine: Engine, call: Call, machine_id: str, exec_id: str) -> bool:
    _, pid, _ = await call(engine.exec_state, machine_id, exec_id)
    return pid > 0


async def _kill(engine: Engine, call: Call, machine_id: str, container_id: str, exec_id: str) -> None:
    try:
        running, pid, _ = await call(engine.exec_state, machine_id, exec_id)
        if running and pid > 1 and container_id in Path(f"/proc/{pid}/cgroup").read_text():
            os.killpg(pid, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError, NotFound):
        return  # it has ended
    except (PermissionError, Unavailable) as error:
        log.warning("docker.command_left", machine=machine_id, error=str(error))
