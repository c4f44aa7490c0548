"""Channels to the other flyds, one each, opened when first needed and kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc.aio
import structlog

from flyd.api.status import from_rpc
from flyd.errors import FlydError, NotFound, Unavailable
from flyd.identity.credentials import Credentials, SecureChannel
from flyd.identity.subjects import ANY_HOST, host_dns_name
from flyd.model import Host
from flyd.store import keys
from flyd.store.mirror import Mirror
from flyd.v1 import hosts_pb2, hosts_pb2_grpc, releases_pb2, releases_pb2_grpc

log = structlog.get_logger(__name__)

CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),  # what this version of gRPC really goes by
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

ASK_TIMEOUT_S = 3.0

SPREAD_TIMEOUT_S = 60.0
"""How long a source may take to be on a second host."""

SPREAD_AGAIN_S = 0.5
"""Until the others are asked anew: a host that is gone loses its lease, one that restarts is back."""

SPREAD_REST_S = 2.0
"""How much longer than the first the other hosts may take; a machine's host fetches what it lacks."""


class Peers:
    """The other hosts' flyds, by their address in the mirror."""

    def __init__(self, self_name: str, mirror: Mirror, credentials: Credentials | None = None) -> None:
        self._self_name = self_name
        self._mirror = mirror
        self._credentials = credentials
        self._channels: dict[tuple[str, str], SecureChannel] = {}

    def host(self, name: str) -> Host:
        """A host's description, or NotFound."""
        found = self._mirror.get(keys.host(name), Host)
        if found is None:
            raise NotFound(f"no host is called {name!r}", hint="`fly hosts list` shows the hosts.")
        return found.value

    def channel(self, host: Host) -> grpc.aio.Channel:
        """The channel to a host's flyd, which must show that host's certificate."""
        return self._channel(host.api_address, host.name)

    async def ask_whether_admitted(self, address: str) -> None:
        """Have the flyd at an address answer anything; its error says why it does not."""
        stub = hosts_pb2_grpc.HostsServiceStub(self._channel(address, ANY_HOST))
        try:
            await stub.GetVersion(hosts_pb2.GetVersionRequest(), timeout=ASK_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, address) from None

    def _channel(self, address: str, name: str) -> grpc.aio.Channel:
        if (address, name) not in self._channels:
            shown = host_dns_name(name)
            self._channels[address, name] = SecureChannel(address, self._credentials, CHANNEL_OPTIONS, shown)
        return self._channels[address, name].get()

    def living(self) -> list[Host]:
        """The other hosts whose lease stands."""
        hosts = [item.value for item in self._mirror.list(keys.HOSTS, Host)]
        return [
            host
            for host in hosts
            if host.name != self._self_name and self._mirror.get(keys.alive(host.name), bool) is not None
        ]

    async def fetch_source(self, digest: str) -> AsyncIterator[bytes]:
        """A packed source tree from the first living host that has it."""
        tried: list[str] = []
        for host in self.living():
            stub = releases_pb2_grpc.ReleasesServiceStub(self.channel(host))
            began = False
            try:
                async for part in stub.DownloadSource(releases_pb2.DownloadSourceRequest(digest=digest)):
                    began = True
                    yield part.data
            except grpc.aio.AioRpcError as rpc_error:
                error = from_rpc(rpc_error, host.api_address)
                if began:
                    raise error from rpc_error
                tried.append(f"{host.name}: {error.message}")
            else:
                return
        raise FlydError(
            f"source {digest[:12]} is on no host that answers ({'; '.join(tried) or 'no other host is up'})",
            hint="Deploy again: `fly deploy` uploads it anew.",
        )

    async def spread_source(self, digest: str) -> None:
        """Have every other living host fetch a source; return when one has and the rest had their moment.

        Returns at once where no other host lives.
        """
        failed: list[str] = []
        try:
            async with asyncio.timeout(SPREAD_TIMEOUT_S):
                while hosts := self.living():
                    failed = await self._spread(digest, hosts)
                    if len(failed) < len(hosts):
                        return
                    await asyncio.sleep(SPREAD_AGAIN_S)
        except TimeoutError:
            raise Unavailable(
                f"source {digest[:12]} is on {self._self_name} alone: no other host took it within "
                f"{SPREAD_TIMEOUT_S:g} s ({'; '.join(failed) or 'none answered'})",
                hint="Were this host lost, so would be the source. Deploy again once the others answer.",
            ) from None

    async def _spread(self, digest: str, hosts: list[Host]) -> list[str]:
        """Ask these hosts to fetch it; those that failed, with the reason."""
        failed: list[str] = []
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(self._ensure_source(digest, host)) for host in hosts]
            waiting = set(asked)
            while waiting and len(failed) == len(hosts) - len(waiting):
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                failed += [task.result() for task in done if task.result()]
            if waiting:
                await asyncio.wait(waiting, timeout=SPREAD_REST_S)
            for task in asked:
                task.cancel()
        return sorted(failed)

    async def _ensure_source(self, digest: str, host: Host) -> str:
        """Have one host fetch it; why it did not, empty if it did."""
        stub = releases_pb2_grpc.ReleasesServiceStub(self.channel(host))
        try:
            await stub.EnsureSource(releases_pb2.EnsureSourceRequest(digest=digest))
        except grpc.aio.AioRpcError as error:
            return f"{host.name}: {from_rpc(error, host.api_address).message}"
        return ""

    async def close(self) -> None:
        """Close all channels."""
        for channel in self._channels.values():
            await channel.close()
