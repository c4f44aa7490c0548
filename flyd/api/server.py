"""The gRPC server of one flyd: all services, health and reflection, errors as statuses."""

from __future__ import annotations

from typing import Any, cast

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from flyd.api.admission import Admission
from flyd.api.apps import AppsServicer
from flyd.api.context import ApiContext
from flyd.api.events import EventsServicer
from flyd.api.exec import ExecServicer
from flyd.api.hosts import HostsServicer
from flyd.api.identity import IdentityServicer
from flyd.api.images import ImagesServicer
from flyd.api.interceptor import ErrorInterceptor
from flyd.api.machines import MachinesServicer
from flyd.api.placement import PlacementServicer
from flyd.api.postgres import PostgresServicer
from flyd.api.releases import ReleasesServicer
from flyd.api.volumes import VolumesServicer
from flyd.errors import Refused
from flyd.identity.credentials import Credentials
from flyd.v1 import (
    apps_pb2,
    apps_pb2_grpc,
    events_pb2,
    events_pb2_grpc,
    exec_pb2,
    exec_pb2_grpc,
    hosts_pb2,
    hosts_pb2_grpc,
    identity_pb2,
    identity_pb2_grpc,
    images_pb2,
    images_pb2_grpc,
    machines_pb2,
    machines_pb2_grpc,
    placement_pb2,
    placement_pb2_grpc,
    postgres_pb2,
    postgres_pb2_grpc,
    releases_pb2,
    releases_pb2_grpc,
    volumes_pb2,
    volumes_pb2_grpc,
)

MAX_MESSAGE_BYTES = 4 * 1024 * 1024

_FILES = (
    apps_pb2,
    events_pb2,
    exec_pb2,
    hosts_pb2,
    identity_pb2,
    images_pb2,
    machines_pb2,
    placement_pb2,
    postgres_pb2,
    releases_pb2,
    volumes_pb2,
)


def build_server(context: ApiContext, credentials: Credentials) -> grpc.aio.Server:
    """A server with every service, bound to this host's API address, not yet started."""
    server: grpc.aio.Server = cast(Any, grpc.aio).server(
        interceptors=(ErrorInterceptor(context.mirror.stale_s, Admission(context.mirror)),),
        options=(
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),
            # The other flyds ask for a sign of life every 5 s, also while a stream is silent.
            ("grpc.http2.min_ping_interval_without_data_ms", 2_000),
            # A client that does not answer is gone: what runs for it ends (sessions).
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.http2.ping_timeout_ms", 5_000),  # keepalive_timeout_ms alone changes nothing here
        ),
    )
    apps_pb2_grpc.add_AppsServiceServicer_to_server(AppsServicer(context), server)
    events_pb2_grpc.add_EventsServiceServicer_to_server(EventsServicer(context), server)
    exec_pb2_grpc.add_ExecServiceServicer_to_server(ExecServicer(context), server)
    identity_pb2_grpc.add_IdentityServiceServicer_to_server(IdentityServicer(context), server)
    hosts_pb2_grpc.add_HostsServiceServicer_to_server(HostsServicer(context), server)
    images_pb2_grpc.add_ImagesServiceServicer_to_server(ImagesServicer(context), server)
    machines_pb2_grpc.add_MachinesServiceServicer_to_server(MachinesServicer(context), server)
    placement_pb2_grpc.add_PlacementServiceServicer_to_server(
        PlacementServicer(context, context.placer), server
    )
    postgres_pb2_grpc.add_PostgresServiceServicer_to_server(PostgresServicer(context), server)
    releases_pb2_grpc.add_ReleasesServiceServicer_to_server(ReleasesServicer(context), server)
    volumes_pb2_grpc.add_VolumesServiceServicer_to_server(VolumesServicer(context, context.volumes), server)
    names = [
        name for file in _FILES for name in (s.full_name for s in file.DESCRIPTOR.services_by_name.values())
    ]
    health_pb2_grpc.add_HealthServicer_to_server(cast(Any, health).aio.HealthServicer(), server)
    reflection.enable_server_reflection(
        [*names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME], server
    )
    address = context.host.api_address
    try:
        server.add_secure_port(address, credentials.for_server())
    except RuntimeError:
        port = address.rpartition(":")[2]
        raise Refused(
            f"flyd can not listen on {address}: the port is taken or the address is not this host's",
            hint=f"`ss -ltnp 'sport = :{port}'` shows who has it; api_port names another.",
        ) from None
    return server
