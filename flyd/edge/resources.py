"""What Envoy is told, as plain frozen values.

Owns: `EdgeConfig`, the whole configuration of one host's edge, four kinds of Envoy
resources, each in its stable order. A resource's body is canonical JSON in the shape of
Envoy's own protobuf messages (the JSON of Envoy's documentation), so equality is equality
of bytes and the version of a kind is a hash of its content: two flyds that know the same
say the same. Made by flyd/edge/routes.py, sent by flyd/edge/xds.py, turned into protobuf
by flyd/edge/wire.py alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any, TypeAlias

import msgspec

from flyd.model import Value

Body: TypeAlias = Mapping[str, Any]
"""An Envoy message as JSON would show it."""

VERSION_BYTES = 8


class Kind(StrEnum):
    """The kinds of resources, in the order in which Envoy must learn of a new route's parts."""

    CLUSTERS = "envoy.config.cluster.v3.Cluster"
    ENDPOINTS = "envoy.config.endpoint.v3.ClusterLoadAssignment"
    LISTENERS = "envoy.config.listener.v3.Listener"
    ROUTES = "envoy.config.route.v3.RouteConfiguration"


class Resource(Value, frozen=True, kw_only=True):
    """One named resource; `body` is canonical JSON."""

    name: str
    body: bytes


class EdgeConfig(Value, frozen=True, kw_only=True):
    """All that one host's Envoy serves."""

    clusters: tuple[Resource, ...] = ()
    endpoints: tuple[Resource, ...] = ()
    listeners: tuple[Resource, ...] = ()
    routes: tuple[Resource, ...] = ()

    def of(self, kind: Kind) -> tuple[Resource, ...]:
        """The resources of one kind."""
        return {
            Kind.CLUSTERS: self.clusters,
            Kind.ENDPOINTS: self.endpoints,
            Kind.LISTENERS: self.listeners,
            Kind.ROUTES: self.routes,
        }[kind]


def resource(name: str, body: Body) -> Resource:
    """A resource with its body in canonical form."""
    return Resource(name=name, body=msgspec.json.encode(body, order="deterministic"))


def version_of(resources: Iterable[Resource]) -> str:
    """The name of this content: the same bytes have the same version, in any flyd."""
    digest = hashlib.blake2b(digest_size=VERSION_BYTES)
    for one in resources:
        digest.update(len(one.body).to_bytes(4, "big") + one.body)
    return digest.hexdigest()
