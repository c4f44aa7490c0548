from __future__ import annotations

from flyd.edge.resources import EdgeConfig, Kind, Resource, resource, version_of
from flyd.edge.subscription import Request, Stream, forgiven, next_response, received, refusals, sent


def some(*names: str, note: str = "") -> tuple[Resource, ...]:
    return tuple(resource(name, {"name": name, "note": note}) for name in names)


ONE = EdgeConfig(clusters=some("a"), endpoints=some("a"), listeners=some("l"), routes=some("http"))
TWO = EdgeConfig(clusters=some("b"), endpoints=some("b"), listeners=some("m"), routes=some("http", note="b"))


Resources = tuple[Resource, ...]


class Peer:
    """An Envoy that behaves: asks for what it learns of, accepts (or refuses) what it gets."""

    def __init__(self, refuses: tuple[Kind, ...] = ()) -> None:
        self.stream = Stream()
        self.has: dict[Kind, Resources] = {}
        self.refuses = refuses
        self.held = ""
        self.log: list[tuple[Kind, tuple[str, ...]]] = []

    def connect(self, config: EdgeConfig) -> None:
        """A new stream; says which versions it has from before."""
        self.stream = Stream()
        self.log = []
        for kind in (Kind.CLUSTERS, *list(Kind)):
            if kind in (Kind.CLUSTERS, Kind.LISTENERS) or kind in self.has:
                self._ask(kind, config, nonce="")

    def _ask(self, kind: Kind, config: EdgeConfig, nonce: str, error: str = "") -> None:
        names: tuple[str, ...] = ()
        if kind is Kind.ENDPOINTS:
            names = tuple(r.name for r in self.has.get(Kind.CLUSTERS, ()))
        if kind is Kind.ROUTES:
            names = ("http",)
        version = version_of(self.has[kind]) if kind in self.has else ""
        request = Request(kind=kind, version=version, names=names, nonce=nonce, error=error)
        self.stream = received(self.stream, request, config)

    def follow(self, config: EdgeConfig) -> list[tuple[Kind, tuple[str, ...]]]:
        """Exchange messages until there are none; what was sent, in order."""
        self.log = []
        for _ in range(50):
            response = next_response(self.stream, config)
            if response is None:
                return self.log
            self.stream = sent(self.stream, response)
            self.log.append((response.kind, tuple(r.name for r in response.resources)))
            error = "no" if response.kind in self.refuses else ""
            known = {r.name for r in self.has.get(response.kind, ())}
            if not error:
                self.has[response.kind] = response.resources
            if response.kind is Kind.CLUSTERS and known & {r.name for r in response.resources}:
                self.held = response.nonce  # a changed cluster is accepted once its endpoints are there
                continue
            if response.kind is Kind.ENDPOINTS and self.held:
                self._ask(Kind.CLUSTERS, config, self.held)
                self.held = ""
            self._ask(response.kind, config, response.nonce, error)
            learnt = {Kind.CLUSTERS: Kind.ENDPOINTS, Kind.LISTENERS: Kind.ROUTES}.get(response.kind)
            if learnt and not error and response.resources:
                nonce = self.stream.subscriptions[learnt].nonce if learnt in self.stream.subscriptions else ""
                self._ask(learnt, config, nonce)
        raise AssertionError(f"never quiet: {self.log[-8:]}")


def test_a_new_envoy_gets_each_part_before_what_refers_to_it() -> None:
    peer = Peer()
    peer.connect(ONE)
    assert [kind for kind, _ in peer.follow(ONE)] == list(Kind)
    assert peer.follow(ONE) == []


def test_a_cluster_goes_only_after_the_routes_that_used_it() -> None:
    peer = Peer()
    peer.connect(ONE)
    peer.follow(ONE)
    log = peer.follow(TWO)
    assert log[0] == (Kind.CLUSTERS, ("b", "a"))
    gone = log.index((Kind.CLUSTERS, ("b",)))
    assert log.index((Kind.LISTENERS, ("m",))) < gone
    assert log.index((Kind.ROUTES, ("http",))) < gone
    assert peer.has[Kind.CLUSTERS] == TWO.clusters


def test_only_endpoints_are_sent_when_only_endpoints_change() -> None:
    peer = Peer()
    peer.connect(ONE)
    peer.follow(ONE)
    moved = EdgeConfig(
        clusters=ONE.clusters, endpoints=some("a", note="x"), listeners=ONE.listeners, routes=ONE.routes
    )
    assert peer.follow(moved) == [(Kind.ENDPOINTS, ("a",))]


def test_a_changed_cluster_gets_its_endpoints_before_it_is_accepted() -> None:
    peer = Peer()
    peer.connect(ONE)
    peer.follow(ONE)
    limited = EdgeConfig(
        clusters=some("a", note="x"), endpoints=ONE.endpoints, listeners=ONE.listeners, routes=ONE.routes
    )
    assert peer.follow(limited) == [(Kind.CLUSTERS, ("a",)), (Kind.ENDPOINTS, ("a",))]


def test_a_listener_does_not_wait_for_a_cluster_that_is_still_warming() -> None:
    peer = Peer()
    peer.connect(ONE)
    peer.follow(ONE)
    two = EdgeConfig(
        clusters=some("a", note="x"),
        endpoints=ONE.endpoints,
        listeners=some("l", note="x"),
        routes=ONE.routes,
    )
    stream, kinds = peer.stream, list[Kind]()
    while response := next_response(stream, two):
        stream = sent(stream, response)
        kinds.append(response.kind)
    assert kinds == [Kind.CLUSTERS, Kind.ENDPOINTS, Kind.LISTENERS, Kind.ROUTES]


def test_a_new_flyd_with_the_same_content_repeats_nothing_that_envoy_would_rebuild() -> None:
    peer = Peer()
    peer.connect(ONE)
    peer.follow(ONE)
    peer.connect(ONE)
    assert {kind for kind, _ in peer.follow(ONE)} <= {Kind.ENDPOINTS, Kind.ROUTES}


def test_a_new_flyd_that_knows_more_sends_it() -> None:
    peer = Peer()
    peer.connect(ONE)
    peer.follow(ONE)
    peer.connect(TWO)
    peer.follow(TWO)
    assert peer.has[Kind.CLUSTERS] == TWO.clusters
    assert peer.has[Kind.LISTENERS] == TWO.listeners


def test_what_is_refused_is_not_sent_again_until_forgiven_and_the_rest_goes_on() -> None:
    peer = Peer(refuses=(Kind.LISTENERS,))
    peer.connect(ONE)
    assert (Kind.ENDPOINTS, ("a",)) in peer.follow(ONE)
    assert refusals(peer.stream) == (Kind.LISTENERS,)
    assert peer.follow(ONE) == []
    peer.refuses = ()
    peer.stream = forgiven(peer.stream)
    assert (Kind.LISTENERS, ("l",)) in peer.follow(ONE)
    assert refusals(peer.stream) == ()


def test_refused_clusters_do_not_hold_up_the_listeners() -> None:
    peer = Peer(refuses=(Kind.CLUSTERS,))
    peer.connect(ONE)
    assert (Kind.LISTENERS, ("l",)) in peer.follow(ONE)


def test_an_answer_to_an_older_message_is_not_taken_for_the_newest() -> None:
    peer = Peer()
    peer.connect(ONE)
    response = next_response(peer.stream, ONE)
    assert response is not None
    stream = sent(peer.stream, response)
    stale = Request(kind=response.kind, nonce="0")
    assert next_response(received(stream, stale, ONE), ONE) is None


def test_an_empty_configuration_is_sent_too() -> None:
    peer = Peer()
    peer.connect(EdgeConfig())
    assert peer.follow(EdgeConfig()) == [(Kind.CLUSTERS, ()), (Kind.LISTENERS, ())]


def test_versions_name_the_content() -> None:
    assert version_of(some("a", "b")) == version_of(some("a", "b"))
    assert version_of(some("a", "b")) != version_of(some("b", "a"))
    assert resource("a", {"x": 1, "y": 2}) == resource("a", {"y": 2, "x": 1})
