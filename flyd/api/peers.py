"""Channels to the other flyds, one each, opened when first needed and kept."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc.aio
import structlog

from flyd.api.status import from_rpc
from flyd.errors import FlydError, NotFound
from flyd.model import Host
from flyd.store import keys
from flyd.store.mirror import Mirror
from flyd.v1 import releases_pb2, releases_pb2_grpc

log = structlog.get_logger(__name__)

CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


class Peers:
    """The other hosts' flyds, by their address in the mirror."""

    def __init__(self, self_name: str, mirror: Mirror) -> None:
        self._self_name = self_name
        self._mirror = mirror
        self._channels: dict[str, grpc.aio.Channel] = {}

    def host(self, name: str) -> Host:
        """A host's description, or NotFound."""
        found = self._mirror.get(keys.host(name), Host)
        if found is None:
            raise NotFound(f"no host is called {name!r}", hint="`fly hosts list` shows the hosts.")
        return found.value

    def channel(self, host: Host) -> grpc.aio.Channel:
        """The channel to a host's flyd."""
        if host.api_address not in self._channels:
            self._channels[host.api_address] = grpc.aio.insecure_channel(
                host.api_address, options=CHANNEL_OPTIONS
            )
        return self._channels[host.api_address]

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

    async def close(self) -> None:
        """Close all channels."""
        for channel in self._channels.values():
            await channel.close(None)
