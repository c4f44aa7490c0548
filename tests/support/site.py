"""A site: an edge with a real Envoy, small applications behind it, and clients of it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import InvalidHandshake

from flyd.edge.resources import EdgeConfig
from flyd.edge.routes import EdgeView, edge_config
from flyd.model import App, Check, Machine, Service
from tests.support.edge import host, http_service, machine, status
from tests.support.envoy import Edge, free_port, running_edge

CHAT = App(name="chat")
HTTP_METHODS = (b"GET ", b"POST ")


class Backend:
    """An application that can be killed as a process is: its connections are reset, its port refuses.

    It answers a request with its name, a line and the request it got; other bytes come back as they are.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.port = 0
        self.thawed = asyncio.Event()  # cleared: a frozen process, whose kernel still takes connections
        self.thawed.set()
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None

    async def start(self) -> Backend:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def kill(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        self._writers = []

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        try:
            while data := await reader.read(65536):
                await self.thawed.wait()
                if data.startswith(HTTP_METHODS):
                    data = await self._answer(data, reader)
                writer.write(data)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        finally:
            writer.close()

    async def _answer(self, data: bytes, reader: asyncio.StreamReader) -> bytes:
        while b"\r\n\r\n" not in data:
            data += await reader.readuntil(b"\r\n\r\n")
        head, _, rest = data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        await reader.readexactly(int(length.group(1)) - len(rest) if length else 0)
        body = f"{self.name}\n".encode() + data
        return f"HTTP/1.1 200 OK\r\nserver: own\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


@asynccontextmanager
async def backend(name: str) -> AsyncGenerator[Backend, None]:
    one = await Backend(name).start()
    try:
        yield one
    finally:
        one.kill()


class Site:
    """What one edge serves, and clients of it."""

    def __init__(self, edge: Edge) -> None:
        self.edge = edge
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        self.client = httpx.AsyncClient(timeout=10)

    def serve(self, *machines: Machine, apps: tuple[App, ...] = (CHAT,)) -> EdgeConfig:
        config = edge_config(
            EdgeView(
                host=host("fra", http_port=self.port),
                apps=apps,
                machines=machines,
                statuses={m.id: status(m) for m in machines},
            )
        )
        self.edge.ads.publish(config)
        return config

    async def get(self, name: str = "chat.localhost", **headers: str) -> httpx.Response:
        return await self.client.get(self.url, headers={"host": name, **headers})

    async def who(self) -> str:
        """Which backend answers, or the status."""
        try:
            answer = await self.get()
        except httpx.TransportError as e:
            return type(e).__name__
        return answer.text.split("\n")[0] if answer.status_code == 200 else str(answer.status_code)

    async def wait_who(self, name: str) -> None:
        async with asyncio.timeout(15):
            while await self.who() != name:
                await asyncio.sleep(0.01)

    @asynccontextmanager
    async def load(self) -> AsyncGenerator[list[str], None]:
        """GETs and POSTs without pause meanwhile; who answered each."""
        answers: list[str] = []

        async def client(method: str) -> None:
            while True:
                try:
                    answer = await self.client.request(
                        method, self.url, headers={"host": "chat"}, content=b"x"
                    )
                    body = answer.text.split("\n")[0]
                    answers.append(body if answer.status_code == 200 else f"{answer.status_code} {body}")
                except httpx.TransportError as e:
                    answers.append(repr(e))
                await asyncio.sleep(0.001)

        async with asyncio.TaskGroup() as group:
            clients = [group.create_task(client(method)) for method in ("GET", "GET", "POST")]
            yield answers
            for one in clients:
                one.cancel()


@asynccontextmanager
async def site() -> AsyncGenerator[Site, None]:
    async with running_edge("fra") as edge:
        here = Site(edge)
        async with here.client:
            yield here


def at(
    one: Backend, machine_id: str, region: str, service: Callable[[int], Service] = http_service
) -> Machine:
    return machine(machine_id, region, service(one.port), ip="127.0.0.1")


def checked(port: int) -> Service:
    return http_service(port, checks=(Check(kind="http", port=port, path="/up"),))


@asynccontextmanager
async def echo() -> AsyncGenerator[int, None]:
    async def answer(connection: ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    async with serve(answer, "127.0.0.1", 0, ping_interval=None) as server:
        yield next(iter(server.sockets)).getsockname()[1]


async def connected(here: Site, app: str = "chat") -> ClientConnection:
    """A WebSocket through the edge, as soon as it lets one through."""
    async with asyncio.timeout(15):
        while True:
            try:
                return await connect(f"ws://{app}.localhost:{here.port}/", host="127.0.0.1", port=here.port)
            except (OSError, InvalidHandshake):
                await asyncio.sleep(0.02)


async def answers(socket_: ClientConnection, text: str) -> bool:
    await socket_.send(text)
    async with asyncio.timeout(2):
        return await socket_.recv() == text
