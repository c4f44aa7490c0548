"""One session in a machine's container, for `fly console`: a command with its input, perhaps on a terminal.

The engine can start a command but not end it, and lets it run on when its line is lost; so flyd ends the
command's session itself, by pid, after seeing of each process that it is in the container. Called by
the Docker driver.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path

import structlog

from flyd.drivers.docker.engine import Engine
from flyd.drivers.docker.exec import Call, exit_code, refused
from flyd.drivers.docker.line import EngineSocket, Line
from flyd.drivers.docker.spec import Seen
from flyd.drivers.sessions import end_session, typed_end
from flyd.errors import FlydError, NotFound
from flyd.ports import SessionClient, TerminalSize

log = structlog.get_logger(__name__)

BEGIN_S = 5.0  # from the engine's word that it begins a command to the command's pid
BEGIN_POLL_S = 0.01


class Session:
    """One command. `call` runs a blocking call in a thread."""

    def __init__(self, engine: Engine, call: Call, socket: EngineSocket, container: Seen) -> None:
        self._engine = engine
        self._call = call
        self._socket = socket
        self._container = container
        self._exec_id = ""
        self._ended = False  # seen to its end, or never begun

    async def run(self, command: Sequence[str], client: SessionClient) -> int:
        """Run the command to its end; its exit code."""
        self._exec_id = await self._socket.make(self._container.container_id, command, client.terminal)
        try:
            line = await self._socket.begin(self._exec_id, client.terminal)
            with contextlib.closing(line):
                outcome = await self._attend(line, client)
        finally:
            await self._end()
        if isinstance(outcome, FlydError):
            raise outcome
        return outcome

    async def _attend(self, line: Line, client: SessionClient) -> int | FlydError:
        """Carry input and output until the output's end; the exit code, or why it is not known."""
        async with asyncio.TaskGroup() as tasks:
            feeding = tasks.create_task(self._feed(line, client))
            try:
                outcome = await self._listen(line, client)
            except FlydError as error:  # raised from here it would be one of a group
                outcome = error
            feeding.cancel()
        return outcome

    async def _listen(self, line: Line, client: SessionClient) -> int:
        asked = (self._engine, self._call, self._container.machine_id, self._exec_id)
        while (piece := await line.next()) is not None:
            await client.output(piece)
            if (code := await refused(*asked, piece.stdout)) is not None:
                self._ended = True
                return code
        self._ended = True
        return await exit_code(*asked)

    async def _feed(self, line: Line, client: SessionClient) -> None:
        """Hand input on, as fast as the command takes it."""
        if client.terminal is not None and await self._pid():
            await self._resize(client.terminal.size)  # for engines before 23
        last = b""
        with contextlib.suppress(OSError):  # it has ended, or wants no input
            async for item in client.inputs:
                if isinstance(item, TerminalSize):
                    await self._resize(item)
                    continue
                await line.write(item)
                last = item
            if client.terminal is not None:
                await line.write(typed_end(last))
            else:
                line.end_input()

    async def _resize(self, size: TerminalSize) -> None:
        with contextlib.suppress(FlydError):  # it has just ended
            await self._socket.resize(self._exec_id, size)

    async def _pid(self) -> int:
        """The command's pid on this host; 0 if it did not begin, or is not known any more."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BEGIN_S):
                while True:
                    _, pid, _ = await self._call(
                        self._engine.exec_state, self._container.machine_id, self._exec_id
                    )
                    if pid or self._ended:
                        return pid
                    await asyncio.sleep(BEGIN_POLL_S)
        return 0

    async def _end(self) -> None:
        """Leave nothing of the command's session behind."""
        try:
            pid = await self._pid()
        except NotFound:
            return  # the container is gone, and all in it
        except FlydError as error:
            log.warning("docker.session_left", machine=self._container.machine_id, error=error.message)
            return
        if pid > 1:
            await end_session(pid, self._is_inside)

    def _is_inside(self, pid: int) -> bool:
        try:
            return self._container.container_id in Path(f"/proc/{pid}/cgroup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False
