"""HostsService: what is known of the cluster's hosts."""

from __future__ import annotations

from typing import Any

from flyd.api import views
from flyd.api.context import ApiContext
from flyd.model import Host, Reservations
from flyd.store import keys
from flyd.v1 import hosts_pb2, hosts_pb2_grpc


class HostsServicer(hosts_pb2_grpc.HostsServiceServicer):
    """Hosts over gRPC."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def ListHosts(
        self, request: hosts_pb2.ListHostsRequest, context: Any
    ) -> hosts_pb2.ListHostsResponse:
        """From the mirror; a host without its lease is lost."""
        mirror = self._context.mirror
        hosts: list[hosts_pb2.Host] = []
        for item in mirror.list(keys.HOSTS, Host):
            host = item.value
            reserved = mirror.get(keys.reservations(host.name), Reservations)
            hosts.append(
                views.host(
                    host,
                    reserved.value if reserved else Reservations(host=host.name),
                    self._context.alive(host.name),
                )
            )
        return hosts_pb2.ListHostsResponse(hosts=hosts)

    async def GetVersion(
        self, request: hosts_pb2.GetVersionRequest, context: Any
    ) -> hosts_pb2.GetVersionResponse:
        """Of this flyd."""
        host = self._context.host
        return hosts_pb2.GetVersionResponse(version=host.version, host=host.name, region=host.region)
