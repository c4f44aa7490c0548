"""Envoy's xDS messages: between protobuf on the wire and flyd's own values.

Owns the only place that touches Envoy's generated protobuf classes, and grpc's calls for
registering them (neither carries types).
Resources are parsed from JSON by the messages' own descriptors, so a wrong field is an
error here and not a surprise in Envoy. Called by flyd/edge/xds.py; decides nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import lru_cache
from importlib import import_module
from typing import Any, cast

import grpc
import grpc.aio
from google.protobuf import any_pb2, descriptor_pool, json_format, message_factory

from flyd.edge.resources import Kind, Resource
from flyd.edge.subscription import Request, Response
from flyd.errors import InvariantBroken

ADS_SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"
ADS_METHOD = "StreamAggregatedResources"
TYPE_URL = "type.googleapis.com/"
PARSED_MAX = 4096
_KINDS = {kind.value: kind for kind in Kind}

_MODULES = (  # importing them registers the messages that our JSON names
    "envoy.service.discovery.v3.discovery_pb2",
    "envoy.config.cluster.v3.cluster_pb2",
    "envoy.config.endpoint.v3.endpoint_pb2",
    "envoy.config.listener.v3.listener_pb2",
    "envoy.config.route.v3.route_pb2",
    "envoy.extensions.filters.http.router.v3.router_pb2",
    "envoy.extensions.filters.network.http_connection_manager.v3.http_connection_manager_pb2",
    "envoy.extensions.filters.network.tcp_proxy.v3.tcp_proxy_pb2",
    "envoy.extensions.retry.host.previous_hosts.v3.previous_hosts_pb2",
    "envoy.extensions.retry.priority.previous_priorities.v3.previous_priorities_config_pb2",
    "envoy.extensions.upstreams.http.v3.http_protocol_options_pb2",
)


@lru_cache(maxsize=1)
def _registered() -> bool:
    for module in _MODULES:
        import_module(module)
    return True


@lru_cache(maxsize=64)
def _message_class(name: str) -> Any:
    _registered()
    return message_factory.GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(name))


@lru_cache(maxsize=PARSED_MAX)
def to_any(kind: Kind, resource: Resource) -> any_pb2.Any:
    """A resource as Envoy takes it."""
    message = _message_class(kind.value)()
    try:
        json_format.Parse(resource.body, message)
    except json_format.ParseError as e:
        raise InvariantBroken(
            f"flyd made a {kind} {resource.name!r} that Envoy's own schema refuses: {e}",
            hint="this is a bug in flyd/edge/envoy_config.py; the edge keeps its last configuration",
        ) from e
    packed = any_pb2.Any()
    packed.Pack(message, deterministic=True)
    return packed


def decode_request(data: bytes) -> Request | None:
    """Envoy's request; None if it asks for a kind of resource that flyd does not serve."""
    message = _message_class("envoy.service.discovery.v3.DiscoveryRequest").FromString(data)
    kind = _KINDS.get(str(message.type_url).removeprefix(TYPE_URL))
    if kind is None:
        return None
    error = ""
    if message.HasField("error_detail"):
        error = message.error_detail.message or "no reason given"
    return Request(
        kind=kind,
        version=message.version_info,
        names=tuple(sorted(message.resource_names)),
        nonce=message.response_nonce,
        error=error,
        node=message.node.id,
    )


def encode_response(response: Response) -> bytes:
    """Our answer as Envoy reads it."""
    message = _message_class("envoy.service.discovery.v3.DiscoveryResponse")(
        type_url=TYPE_URL + response.kind.value,
        version_info=response.version,
        nonce=response.nonce,
        resources=[to_any(response.kind, one) for one in response.resources],
    )
    return message.SerializeToString()


def new_server() -> grpc.aio.Server:
    """A gRPC server that shares its port with nobody."""
    return cast(Any, grpc.aio).server(options=[("grpc.so_reuseport", 0)])


def serve(server: grpc.aio.Server, behaviour: Callable[[Any, Any], Awaitable[None]]) -> None:
    """Make `behaviour` (requests, context) answer ADS streams on this server."""
    untyped = cast(Any, grpc)
    handler = untyped.stream_stream_rpc_method_handler(
        behaviour, request_deserializer=decode_request, response_serializer=encode_response
    )
    service = untyped.method_handlers_generic_handler(ADS_SERVICE, {ADS_METHOD: handler})
    cast(Any, server).add_generic_rpc_handlers((service,))
