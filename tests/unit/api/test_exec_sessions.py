"""A session over real gRPC, at the machine's own host and through another: it ends with its client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import grpc.aio
import pytest
import structlog

from flyd.api.exec import ExecServicer
from flyd.api.interceptor import ErrorInterceptor
from flyd.api.status import from_rpc
from flyd.errors import FlydError, InvalidInput, NotFound, Refused, Unavailable
from flyd.model import ExecOutput
from flyd.ports import SessionClient, TerminalSize
from flyd.v1 import exec_pb2, exec_pb2_grpc
from tests.support.drivers import until

WAIT_S = 10.0
THROUGH = pytest.mark.parametrize("through", ["sin", "ams"])  # the machine is in sin

BOTH = [ExecOutput(stdout=b"o" * 1000), ExecOutput(stderr=b"e" * 1000)] * 20

Request = exec_pb2.SessionRequest

pytestmark = pytest.mark.timeout(30)


async def _tell(client: SessionClient, piece: ExecOutput) -> None:
    await client.output(piece)


@dataclass
class FakeDriver:
    """Runs `echo` (gives back what it is told, exit code 7), `flood` (prints for ever), `both` (prints much
    on both outputs at once) and nothing else.
    """

    running: int = 0
    terminals: list[object] = field(default_factory=list[object])

    async def session(self, machine_id: str, command: Sequence[str], client: SessionClient) -> int:
        """See ports.Driver."""
        self.running += 1
        self.terminals.append(client.terminal)
        try:
            if command[0] == "flood":
                while True:
                    await client.output(ExecOutput(stdout=b"flood" * 10_000))
            if command[0] == "both":
                async with asyncio.TaskGroup() as group:
                    for piece in BOTH:
                        group.create_task(_tell(client, piece))
                return 7
            if command[0] != "echo":
                raise Refused(f"{machine_id} runs no {command[0]}", hint="try echo")
            async for item in client.inputs:
                said = b"size %d" % item.columns if isinstance(item, TerminalSize) else item
                await client.output(ExecOutput(stdout=said))
            return 7
        finally:
            self.running -= 1


@dataclass
class World:
    """Two hosts; the machine m1 is in sin."""

    driver: FakeDriver
    channels: dict[str, grpc.aio.Channel]
    lost: list[str]

    def session(self, through: str, *command: str, typed: asyncio.Queue[Request | None]) -> Any:
        """Begin a session by this host's flyd."""
        start = exec_pb2.SessionStart(machine_id="m1", command=list(command))

        async def requests() -> AsyncIterator[Request]:
            yield Request(start=start)
            while (request := await typed.get()) is not None:
                yield request

        return self.call(through, requests())

    def call(self, through: str, requests: AsyncIterator[Request] | Iterable[Request]) -> Any:
        """The bare call."""
        return exec_pb2_grpc.ExecServiceStub(self.channels[through]).Session(cast(Any, requests))


@asynccontextmanager
async def world() -> AsyncGenerator[World]:
    """Both hosts' servers and a client's channel to each."""
    driver, lost, servers = FakeDriver(), list[str](), list[grpc.aio.Server]()
    channels = dict[str, grpc.aio.Channel]()

    def alive(name: str) -> bool:
        return name not in lost

    def host(name: str) -> object:
        return SimpleNamespace(name=name, region=name, api_address=name)

    def channel(host: Any) -> grpc.aio.Channel:
        return channels[host.name]

    def machine(app: str, machine_id: str) -> object:
        if machine_id != "m1":
            raise NotFound(f"no machine {machine_id}")
        return SimpleNamespace(id="m1", host="sin")

    for name in ("ams", "sin"):
        context = SimpleNamespace(
            host=SimpleNamespace(name=name),
            driver=driver if name == "sin" else None,
            machine=machine,
            alive=alive,
            peers=SimpleNamespace(host=host, channel=channel),
        )
        server: grpc.aio.Server = cast(Any, grpc.aio).server(
            interceptors=(ErrorInterceptor(lambda: 0.0, lambda method, context: None),)
        )
        exec_pb2_grpc.add_ExecServiceServicer_to_server(ExecServicer(cast(Any, context)), server)
        channels[name] = grpc.aio.insecure_channel(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        servers.append(server)
        await server.start()
    try:
        yield World(driver, channels, lost)
    finally:
        for opened in channels.values():
            await opened.close(None)
        for server in servers:
            await server.stop(None)


async def refusal(call: Any) -> FlydError:
    """What a session that must fail fails with."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await asyncio.wait_for(call.read(), WAIT_S)
    return from_rpc(raised.value, "here")


@THROUGH
async def test_input_output_and_the_code(through: str) -> None:
    async with world() as hosts:
        typed: asyncio.Queue[Request | None] = asyncio.Queue()
        call = hosts.session(through, "echo", typed=typed)
        for request, answer in (
            (Request(stdin=b"hello"), b"hello"),
            (Request(size=exec_pb2.TerminalSize(columns=99, rows=9)), b"size 99"),
        ):
            typed.put_nowait(request)
            assert (await call.read()).stdout == answer
        typed.put_nowait(None)
        last = await call.read()
        assert (last.HasField("exit_code"), last.exit_code) == (True, 7)
        assert await call.read() is cast(Any, grpc.aio).EOF
        assert hosts.driver.terminals == [None]


GONE: dict[str, Callable[[World, str, Any], Any]] = {
    "cancels": lambda hosts, through, call: call.cancel(),
    "is cut off": lambda hosts, through, call: hosts.channels[through].close(None),
}


@THROUGH
@pytest.mark.parametrize("command", ["echo", "flood"])
@pytest.mark.parametrize("how", sorted(GONE))
async def test_a_client_that_goes(through: str, command: str, how: str) -> None:
    with structlog.testing.capture_logs() as logged:
        async with world() as hosts:
            call = hosts.session(through, command, typed=asyncio.Queue())
            await until(lambda: hosts.driver.running == 1, "the session has begun")
            if command == "flood":
                await call.read()
            gone = GONE[how](hosts, through, call)
            if asyncio.iscoroutine(gone):
                await gone
            await until(lambda: hosts.driver.running == 0, "the command has ended")
    assert logged == []


@THROUGH
async def test_what_is_wrong_is_said(through: str) -> None:
    async with world() as hosts:

        def begin(*requests: Request) -> Any:
            return hosts.call(through, requests)

        start = exec_pb2.SessionStart(machine_id="m1", command=["nonsense"])
        error = await refusal(begin(Request(start=start)))
        assert (type(error), error.hint) == (Refused, "try echo")
        assert isinstance(await refusal(begin()), InvalidInput)
        assert isinstance(await refusal(begin(Request(stdin=b"hello"))), InvalidInput)
        empty = exec_pb2.SessionStart(machine_id="m1")
        assert isinstance(await refusal(begin(Request(start=empty))), InvalidInput)
        unknown = exec_pb2.SessionStart(machine_id="m9", command=["echo"])
        assert isinstance(await refusal(begin(Request(start=unknown))), NotFound)


async def test_a_lost_host_is_named() -> None:
    async with world() as hosts:
        hosts.lost.append("sin")
        error = await refusal(hosts.session("ams", "echo", typed=asyncio.Queue()))
        assert isinstance(error, Unavailable)
        assert "host sin" in error.message


async def test_a_terminal_has_a_size_that_the_kernel_can_hold() -> None:
    async with world() as hosts:
        size = exec_pb2.TerminalSize(columns=1_000_000, rows=0)
        start = exec_pb2.SessionStart(
            machine_id="m1", command=["echo"], terminal=exec_pb2.Terminal(size=size)
        )
        async for _ in hosts.call("sin", [Request(start=start)]):
            pass
        (terminal,) = cast(list[Any], hosts.driver.terminals)
        assert (terminal.size, terminal.kind) == (TerminalSize(columns=65535, rows=24), "xterm")


@THROUGH
async def test_both_outputs_at_once(through: str) -> None:
    async with world() as site, asyncio.timeout(WAIT_S):
        parts = [part async for part in site.session(through, "both", typed=asyncio.Queue())]
    assert b"".join(part.stdout for part in parts) == b"o" * 20_000
    assert b"".join(part.stderr for part in parts) == b"e" * 20_000
    assert parts[-1].exit_code == 7
