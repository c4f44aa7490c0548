"""ExecService: a session in a machine, run here or handed to the flyd of the machine's host.

What a command prints is written to the client as it comes instead of being yielded: this call then waits
nowhere but inside `_run`, where it is cancelled the moment the client is gone, and the command with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from flyd.api.context import ApiContext
from flyd.api.status import from_rpc
from flyd.errors import FlydError, InvalidInput, Unavailable
from flyd.model import ExecOutput, Machine
from flyd.ports import SessionClient, Terminal, TerminalSize
from flyd.v1 import exec_pb2, exec_pb2_grpc

DEFAULT_TERMINAL = "xterm"
DEFAULT_SIZE = TerminalSize(columns=80, rows=24)
SIZE_MAX = 0xFFFF  # what the kernel keeps of a terminal's size

Requests = AsyncIterator[exec_pb2.SessionRequest]
Context = grpc.aio.ServicerContext[Any, Any]


class ExecServicer(exec_pb2_grpc.ExecServiceServicer):
    """Sessions over gRPC."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def Session(
        self, request_iterator: Requests, context: Context
    ) -> AsyncIterator[exec_pb2.SessionResponse]:
        """The command's output, its exit code last; it ends with this call."""
        requests = aiter(request_iterator)
        first = await anext(requests, None)
        if first is None or not first.HasField("start"):
            raise InvalidInput("a session begins with what to run, in its first message")
        if not first.start.command:
            raise InvalidInput("no command to run was given")
        machine = self._context.machine(first.start.app_name, first.start.machine_id)
        if machine.host == self._context.host.name:
            code = await self._run(machine, first.start, requests, context)
        else:
            code = await self._hand_on(machine, first, requests, context)
        yield exec_pb2.SessionResponse(exit_code=code)

    async def _run(
        self, machine: Machine, start: exec_pb2.SessionStart, requests: Requests, context: Context
    ) -> int:
        """The session on this host."""
        writing = asyncio.Lock()  # gRPC takes one message at a time; both outputs may have one

        async def output(piece: ExecOutput) -> None:
            async with writing:
                await context.write(exec_pb2.SessionResponse(stdout=piece.stdout, stderr=piece.stderr))

        terminal: Terminal | None = None
        if start.HasField("terminal"):
            terminal = Terminal(_size(start.terminal.size), start.terminal.kind or DEFAULT_TERMINAL)
        client = SessionClient(terminal=terminal, inputs=_inputs(requests), output=output)
        return await self._context.driver.session(machine.id, list(start.command), client)

    async def _hand_on(
        self, machine: Machine, first: exec_pb2.SessionRequest, requests: Requests, context: Context
    ) -> int:
        """The session on the machine's own host, by the same call to its flyd."""
        host = self._context.peers.host(machine.host)
        if not self._context.alive(host.name):
            raise Unavailable(
                f"host {host.name} ({host.region}) of machine {machine.id} is lost",
                hint="`fly hosts list` shows the hosts; the call works once it is back.",
            )

        async def all_requests() -> Requests:
            yield first
            async for request in requests:
                yield request

        call = exec_pb2_grpc.ExecServiceStub(self._context.peers.channel(host)).Session(all_requests())
        try:
            async for part in call:
                if part.HasField("exit_code"):
                    return part.exit_code
                await context.write(part)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, f"{host.name} ({host.api_address})") from error
        finally:
            call.cancel()
        raise FlydError(
            f"the command in {machine.id} ended without an exit code: host {host.name} may be lost"
        )


async def _inputs(requests: Requests) -> AsyncIterator[bytes | TerminalSize]:
    async for request in requests:
        if request.HasField("stdin"):
            yield request.stdin
        elif request.HasField("size"):
            yield _size(request.size)


def _size(told: exec_pb2.TerminalSize) -> TerminalSize:
    """A size that a terminal can have; the usual one where the client does not know its own."""
    return TerminalSize(
        columns=min(told.columns or DEFAULT_SIZE.columns, SIZE_MAX),
        rows=min(told.rows or DEFAULT_SIZE.rows, SIZE_MAX),
    )
