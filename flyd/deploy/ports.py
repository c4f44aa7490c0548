"""Raw TCP ports of the edges: which a release wants, and the claims on them in etcd. Pure.

A raw TCP port carries no name, so that on all edges it belongs to one app. Invariant: an app
whose machines are deployed with such a port owns its claim (`ports/<port>`, the app's name): the
transaction that begins a deploy claims what is free, the one that ends it gives back what the
release then in force does not want, and deleting the app gives back the rest. Postgres clusters
claim the ports of their endpoints in the same way (flyd/postgres/clusters.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from flyd.deploy.appconfig import AppConfig
from flyd.errors import Conflict, InvalidInput
from flyd.model import decode
from flyd.ports import Delete, KeyValue, Put, Unchanged
from flyd.store import keys

MAX_TCP_PORTS = 50
"""Of one app: its claims go into one transaction, of which etcd takes 128 operations."""


def tcp_ports(config: AppConfig) -> tuple[int, ...]:
    """The edge ports that an app takes for itself: those of TCP without handlers."""
    found = {
        port.port
        for group in config.groups.values()
        for service in group.services
        for port in service.ports
        if service.protocol == "tcp" and not port.handlers
    }
    if len(found) > MAX_TCP_PORTS:
        raise InvalidInput(
            f"fly.toml publishes {len(found)} raw TCP ports; an app may have {MAX_TCP_PORTS}",
            hint='handlers = ["http"] needs no port of its own: HTTP is shared by name.',
        )
    return tuple(sorted(found))


def claims_of(
    app: str, wanted: Sequence[int], claims: Sequence[KeyValue]
) -> tuple[list[Unchanged], list[Put]]:
    """The compares and effects by which the app owns these ports; Conflict names another owner."""
    held = {item.key: item for item in claims}
    compares: list[Unchanged] = []
    effects: list[Put] = []
    for port in wanted:
        claim = held.get(keys.port(port))
        if claim is None:
            compares.append(Unchanged(keys.port(port), 0))
            effects.append(Put(keys.port(port), msgspec.json.encode(app)))
        elif (owner := decode(claim.value, str)) == app:
            compares.append(Unchanged(claim.key, claim.mod_revision))
        else:
            raise Conflict(
                f"port {port} on the edge is taken by {owner}",
                hint='Choose another in [[services.ports]], or handlers = ["http"]: HTTP is shared by name.',
            )
    return compares, effects


def given_back(
    app: str, in_force: AppConfig | None, claims: Sequence[KeyValue]
) -> tuple[list[Unchanged], list[Delete]]:
    """The compares and effects that end the app's claims on all but what this release wants."""
    kept = [keys.port(port) for port in tcp_ports(in_force)] if in_force is not None else []
    gone = [item for item in claims if item.key not in kept and decode(item.value, str) == app]
    return [Unchanged(item.key, item.mod_revision) for item in gone], [Delete(item.key) for item in gone]
