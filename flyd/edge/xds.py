"""The ADS server: tells each connected Envoy this host's edge configuration.

Owns `AdsServer`, a grpc.aio server on a Unix socket or a loopback port. What to send and
when is decided by flyd/edge/subscription.py; here is only the stream. Invariants: nothing
is sent before the first `publish`, so a flyd that has just started never empties an edge;
a version is a hash of the content, so a new flyd that knows the same changes nothing; a
refused configuration is logged once with what to do, kept in `problems`, and tried again
every RETRY_REFUSED_S, while Envoy goes on with its last good one.

Built by flyd/daemon.py; `publish` is called by flyd/edge/loop.py.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import structlog
from grpc.aio import Server

from flyd.edge import wire
from flyd.edge.resources import EdgeConfig, Kind
from flyd.edge.subscription import Request, Stream, forgiven, next_response, received, refusals, sent
from flyd.errors import InvariantBroken, Unavailable

log = structlog.get_logger(__name__)

RETRY_REFUSED_S = 5.0
STOP_GRACE_S = 0.1
REMEDIES = {
    "Address already in use": "See who has it with `ss -ltnp 'sport = :{port}'`; "
    "stop that, or choose another port. ",
    "Cannot assign requested address": "The address {address} is not one of this host's: see `ip address`. ",
    "Permission denied": "Ports below 1024 need root or CAP_NET_BIND_SERVICE: choose a higher port. ",
}


class _Connection:
    """One Envoy's stream: its state, and a bell for the sender."""

    def __init__(self) -> None:
        self.stream = Stream()
        self.bell = asyncio.Event()
        self.node = ""


class AdsServer:
    """Serves ADS at `address`: `unix:/path` or `host:port` (port 0: see `start`)."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._config = EdgeConfig()
        self._published = asyncio.Event()
        self._connections: list[_Connection] = []
        self._problems: dict[str, str] = {}
        self._server: Server | None = None

    @property
    def problems(self) -> tuple[str, ...]:
        """What Envoy refuses now, in words for a person; empty when all is well."""
        return tuple(self._problems[what] for what in sorted(self._problems))

    async def start(self) -> str:
        """Listen; returns the address that Envoy is to be given. `Unavailable` if it is taken."""
        server = wire.new_server()
        wire.serve(server, self._serve)
        try:
            port = server.add_insecure_port(self._address)
        except RuntimeError as e:
            raise Unavailable(
                f"the edge's ADS server cannot listen on {self._address}: {e}",
                hint="another flyd of this host may still run: look with `ss -lxtnp`",
            ) from e
        await server.start()
        self._server = server
        if self._address.startswith("unix:"):
            return self._address
        return f"{self._address.rpartition(':')[0]}:{port}"

    async def stop(self) -> None:
        """End all streams. Envoy keeps what it has and reconnects for ever."""
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)

    def publish(self, config: EdgeConfig) -> None:
        """Make this what every Envoy has, now and when it connects; what no Envoy could read is not sent."""
        try:
            for kind in Kind:
                for resource in config.of(kind):
                    wire.to_any(kind, resource)
        except InvariantBroken as e:
            self._note("flyd", f"{e.message} ({e.hint})")
            return
        self._problems.pop("flyd", None)
        self._config = config
        self._published.set()
        for connection in self._connections:
            connection.bell.set()

    async def _serve(self, requests: AsyncIterator[Request | None], context: Any) -> None:
        connection = _Connection()
        await self._published.wait()
        self._connections.append(connection)
        try:
            async with asyncio.TaskGroup() as group:
                sender = group.create_task(self._send(connection, context))
                async for request in requests:
                    if request is not None:
                        self._take(connection, request)
                sender.cancel()
        finally:
            self._connections.remove(connection)

    def _take(self, connection: _Connection, request: Request) -> None:
        connection.node = request.node or connection.node
        connection.stream = received(connection.stream, request, self._config)
        what = f"{connection.node} {request.kind}"
        if request.error:
            self._note(what, explain_refusal(request.error))
        elif request.nonce and request.kind not in refusals(connection.stream):
            self._problems.pop(what, None)
        connection.bell.set()

    async def _send(self, connection: _Connection, context: Any) -> None:
        while True:
            connection.bell.clear()
            response = next_response(connection.stream, self._config)
            if response is not None:
                connection.stream = sent(connection.stream, response)
                await context.write(response)
                continue
            try:
                async with asyncio.timeout(RETRY_REFUSED_S if refusals(connection.stream) else None):
                    await connection.bell.wait()
            except TimeoutError:
                connection.stream = forgiven(connection.stream)

    def _note(self, what: str, problem: str) -> None:
        if self._problems.get(what) != problem:
            log.error("edge.config_refused", what=what, problem=problem)
        self._problems[what] = problem


def explain_refusal(error: str) -> str:
    """Envoy's reason for refusing a configuration, with what to do about it."""
    taken = re.search(r"cannot bind '([^']+):(\d+)': (.+?)$", error, re.MULTILINE)
    if taken is None:
        return f"Envoy refuses the new configuration and keeps the last good one: {error}"
    address, port, reason = taken.groups()
    remedy = REMEDIES.get(reason.strip(), "").format(address=address, port=port)
    return (
        f"the edge cannot listen on {address} port {port}: {reason.strip()}. {remedy}"
        f"Tried again every {RETRY_REFUSED_S:g} s"
    )
