"""What one connected Envoy has, and what it must be sent next. Pure.

Owns the xDS protocol's state of one ADS stream as a frozen value:

    received(stream, request, config)  what Envoy says: asks, accepts (ACK) or refuses (NACK)
    next_response(stream, config)      the one message to send now, or None
    sent(stream, response)             the stream after sending it

Invariants: at most one message of a kind waits for an answer; Envoy gets the parts of a new route
before the route (clusters, endpoints, listeners, routes) and keeps a cluster until nothing
refers to it; what Envoy already has is not sent again, also not by another flyd (it says
which version it has when it connects), except that endpoints and routes, which Envoy waits
for after each change of clusters and listeners, are then repeated. What Envoy refused is not
sent again unless it changes or `forgiven`.

Called by flyd/edge/xds.py.
"""

from __future__ import annotations

import msgspec

from flyd.edge.resources import EdgeConfig, Kind, Resource, version_of
from flyd.model import Value

NAMED = (Kind.ENDPOINTS, Kind.ROUTES)  # asked for by name; the other two always whole
FOLLOWER = {Kind.CLUSTERS: Kind.ENDPOINTS, Kind.LISTENERS: Kind.ROUTES}


class Request(Value, frozen=True, kw_only=True):
    """A DiscoveryRequest. `version` is what Envoy has accepted, `error` why it refused `nonce`."""

    kind: Kind
    version: str = ""
    names: tuple[str, ...] = ()
    nonce: str = ""
    error: str = ""
    node: str = ""


class Response(Value, frozen=True, kw_only=True):
    """A DiscoveryResponse."""

    kind: Kind
    version: str
    nonce: str
    resources: tuple[Resource, ...]


class Subscription(Value, frozen=True, kw_only=True):
    """One kind on one stream."""

    names: tuple[str, ...] = ()
    delivered: tuple[str, ...] = ()  # the names that were asked for when we last sent
    version: str = ""  # sent, or had from an earlier stream
    resources: tuple[Resource, ...] = ()  # the content of `version`
    repeat: bool = False  # to be sent even though it is the same
    nonce: str = ""
    answered: bool = True
    refused: bool = False  # Envoy refused `version`


class Stream(Value, frozen=True, kw_only=True):
    """One connected Envoy."""

    subscriptions: dict[Kind, Subscription] = {}
    count: int = 0  # messages sent

    def having(self, kind: Kind, subscription: Subscription, count: int) -> Stream:
        """The stream with one subscription replaced."""
        return Stream(subscriptions={**self.subscriptions, kind: subscription}, count=count)


def received(stream: Stream, request: Request, config: EdgeConfig) -> Stream:
    """The stream after Envoy's request."""
    old = stream.subscriptions.get(request.kind)
    if old is None:
        return stream.having(request.kind, _first(request, config), stream.count)
    new = msgspec.structs.replace(old, names=request.names)
    if request.nonce == old.nonce and not old.answered:
        new = msgspec.structs.replace(new, answered=True, refused=bool(request.error))
    return stream.having(request.kind, new, stream.count)


def _first(request: Request, config: EdgeConfig) -> Subscription:
    resources = config.of(request.kind)
    if request.kind in NAMED or version_of(resources) != request.version:
        # By names we cannot know which of them arrived before the last stream broke.
        return Subscription(names=request.names, repeat=request.kind in NAMED)
    return Subscription(names=request.names, version=request.version, resources=resources)


def next_response(stream: Stream, config: EdgeConfig) -> Response | None:
    """What to send now; None while an answer is awaited or Envoy has it all.

    Only the answer to the same kind is awaited: Envoy accepts a changed cluster no sooner
    than it has got its endpoints, and a changed database port shall not wait for either.
    """
    routed = all(_has(stream, kind, config.of(kind)) for kind in (Kind.LISTENERS, Kind.ROUTES))
    clusters = config.clusters if routed else _with_old(stream, config.clusters)
    due = _due(stream, Kind.CLUSTERS, clusters) or _due(stream, Kind.ENDPOINTS, config.endpoints)
    if due or not _clusters_complete(stream, clusters):
        return due
    return _due(stream, Kind.LISTENERS, config.listeners) or _due(stream, Kind.ROUTES, config.routes)


def sent(stream: Stream, response: Response) -> Stream:
    """The stream once `response` is on its way."""
    old = stream.subscriptions[response.kind]
    now = msgspec.structs.replace(
        old,
        delivered=old.names,
        version=response.version,
        resources=response.resources,
        repeat=False,
        nonce=response.nonce,
        answered=False,
        refused=False,
    )
    after = stream.having(response.kind, now, stream.count + 1)
    follower = FOLLOWER.get(response.kind)
    following = after.subscriptions.get(follower) if follower else None
    if follower is None or following is None:
        return after
    return after.having(follower, msgspec.structs.replace(following, repeat=True), after.count)


def refusals(stream: Stream) -> tuple[Kind, ...]:
    """The kinds whose newest content Envoy has refused."""
    return tuple(k for k in Kind if k in stream.subscriptions and stream.subscriptions[k].refused)


def forgiven(stream: Stream) -> Stream:
    """The stream with what was refused due again: a port that was taken may be free now."""
    for kind in refusals(stream):
        again = msgspec.structs.replace(stream.subscriptions[kind], refused=False, repeat=True)
        stream = stream.having(kind, again, stream.count)
    return stream


def _has(stream: Stream, kind: Kind, resources: tuple[Resource, ...]) -> bool:
    """Whether Envoy has (or has refused) this content, or does not want any."""
    subscription = stream.subscriptions.get(kind)
    return subscription is None or (subscription.answered and subscription.version == version_of(resources))


def _with_old(stream: Stream, clusters: tuple[Resource, ...]) -> tuple[Resource, ...]:
    """The new clusters, and those old ones that listeners and routes may still refer to."""
    subscription = stream.subscriptions.get(Kind.CLUSTERS)
    new = {c.name for c in clusters}
    old = subscription.resources if subscription else ()
    return (*clusters, *(c for c in old if c.name not in new))


def _due(stream: Stream, kind: Kind, resources: tuple[Resource, ...]) -> Response | None:
    subscription = stream.subscriptions.get(kind)
    if subscription is None or not subscription.answered:
        return None
    version = version_of(resources)
    missing = kind in NAMED and not set(subscription.names) <= set(subscription.delivered)
    same = subscription.version == version and not subscription.repeat and not missing
    if same:
        return None
    return Response(kind=kind, version=version, nonce=str(stream.count + 1), resources=resources)


def _clusters_complete(stream: Stream, clusters: tuple[Resource, ...]) -> bool:
    """Whether Envoy has asked for, and got, the endpoints of every cluster it was told of."""
    told = stream.subscriptions.get(Kind.CLUSTERS)
    if told is None or (told.answered and told.refused):
        return True
    endpoints = stream.subscriptions.get(Kind.ENDPOINTS, Subscription())
    return {c.name for c in clusters} <= set(endpoints.delivered)
