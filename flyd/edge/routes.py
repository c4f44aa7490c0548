"""What one host's edge routes: from what flyd knows to Envoy's resources. Pure.

Owns the rules of routing:
- an application's HTTP service answers to <app>, <app>.localhost, <app>.internal and
  <app>.flycast on the host's one HTTP port; a service port without handlers is raw TCP on
  the host's own address; a Postgres application's endpoint port follows its primary, and the
  port after it leads to the nearest member that is up to date, for reads;
- a machine is routed to while it is to be started, not cordoned, and its host last said
  that it runs and passes the checks that gate routing. Whether that host is alive now is
  deliberately not asked: losing flyd or etcd must not move traffic, and Envoy itself finds
  machines that do not answer;
- this host's region is priority 0, the others follow by distance;
- a cluster is one service of an application (its HTTP service, or one TCP port), and each
  machine takes part with the internal port of its own configuration, so a deploy may
  change the internal port without a gap. How the cluster behaves follows the newest machine.

Called by flyd/edge/loop.py on each change. Equal input gives equal bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flyd.edge import envoy_config as envoy
from flyd.edge.resources import Body, EdgeConfig, Resource, resource
from flyd.model import (
    App,
    AppKind,
    Desired,
    Host,
    Machine,
    MachineStatus,
    PostgresLeader,
    PostgresMember,
    Service,
    ServicePort,
    Value,
)
from flyd.network.regions import nearest_first

DOMAINS = ("{app}", "{app}.localhost", "{app}.internal", "{app}.flycast")
PREFERRED_HTTP_PORTS = (80, 443)
NOWHERE: list[tuple[str, list[Body]]] = [("", [{"endpoint": {"address": envoy.NOWHERE}}])]


class EdgeView(Value, frozen=True, kw_only=True):
    """All that the edge of `host` depends on. Statuses by machine id, leaders and members by application."""

    host: Host
    apps: tuple[App, ...] = ()
    machines: tuple[Machine, ...] = ()
    statuses: dict[str, MachineStatus] = {}
    leaders: dict[str, PostgresLeader] = {}
    members: dict[str, tuple[PostgresMember, ...]] = {}


class _Part(Value, frozen=True, kw_only=True):
    """The resources of one thing that is routed."""

    cluster: Resource
    endpoints: Resource
    listener: Resource | None = None
    virtual_host: Body | None = None


def edge_config(view: EdgeView) -> EdgeConfig:
    """Envoy's whole configuration for this view."""
    parts: list[_Part] = []
    for app in sorted(view.apps, key=lambda a: a.name):
        if app.kind is AppKind.POSTGRES:
            parts += _postgres(view, app)
        else:
            machines = _machines_newest_first(view, app)
            parts += _http(view, app, machines)
            parts += _tcp(view, app, machines)
    listeners = [p.listener for p in parts if p.listener]
    routes: list[Resource] = []
    host = view.host
    if host.http_port:
        listeners.insert(0, resource("http", envoy.http_listener(host.edge_address, host.http_port)))
        names = [p.virtual_host for p in parts if p.virtual_host]
        routes.append(
            resource(envoy.HTTP_ROUTES, envoy.http_routes(host.region, host.http_port, names)),
        )
    return EdgeConfig(
        clusters=tuple(p.cluster for p in parts),
        endpoints=tuple(p.endpoints for p in parts),
        listeners=tuple(listeners),
        routes=tuple(routes),
    )


# --------------------------------------------------------------------------- services


def _machines_newest_first(view: EdgeView, app: App) -> list[Machine]:
    mine = [m for m in view.machines if m.app == app.name and m.desired is not Desired.DESTROYED]
    return sorted(mine, key=lambda m: (-m.release, m.id))


def _http_service(machine: Machine) -> Service | None:
    """The machine's service behind the HTTP port: the one on 80 or 443, else on the lowest port."""
    ports = [
        (port.port not in PREFERRED_HTTP_PORTS, port.port, service.internal_port, service)
        for service in machine.config.services
        for port in service.ports
        if "http" in port.handlers
    ]
    return min(ports, key=lambda p: p[:3])[3] if ports else None


def _is_raw_tcp(service: Service, port: ServicePort) -> bool:
    return service.protocol == "tcp" and not port.handlers


def _http(view: EdgeView, app: App, machines: list[Machine]) -> Iterable[_Part]:
    newest = next((s for s in map(_http_service, machines) if s is not None), None)
    if newest is None or not view.host.http_port:
        return
    name = f"{app.name}/http"
    yield _Part(
        cluster=resource(name, envoy.service_cluster(name, newest.checks, newest.concurrency, http=True)),
        endpoints=resource(name, _assignment(view, name, machines, _http_service)),
        virtual_host=envoy.virtual_host(app.name, [d.format(app=app.name) for d in DOMAINS], name),
    )


def _tcp(view: EdgeView, app: App, machines: list[Machine]) -> Iterable[_Part]:
    newest: dict[int, Service] = {}
    for machine in machines:
        for service in machine.config.services:
            for port in service.ports:
                if _is_raw_tcp(service, port):
                    newest.setdefault(port.port, service)
    for number in sorted(newest):
        name = f"{app.name}/tcp/{number}"
        service = newest[number]
        yield _Part(
            cluster=resource(
                name, envoy.service_cluster(name, service.checks, service.concurrency, http=False)
            ),
            endpoints=resource(name, _assignment(view, name, machines, _tcp_service_on(number))),
            listener=resource(name, envoy.tcp_listener(name, view.host.edge_address, number, name)),
        )


def _tcp_service_on(number: int) -> Callable[[Machine], Service | None]:
    def service_of(machine: Machine) -> Service | None:
        for service in machine.config.services:
            if any(port.port == number and _is_raw_tcp(service, port) for port in service.ports):
                return service
        return None

    return service_of


def _assignment(
    view: EdgeView, name: str, machines: list[Machine], service_of: Callable[[Machine], Service | None]
) -> Body:
    """Where a cluster's requests may go now, nearest region first."""
    places: dict[str, list[Body]] = {}
    for machine in sorted(machines, key=lambda m: m.id):
        service = service_of(machine)
        if service is not None and is_routed(machine, view.statuses.get(machine.id)):
            place = places.setdefault(machine.region, [])
            place.append(envoy.endpoint(machine.private_ip, service.internal_port))
    order = nearest_first(view.host.region, places)
    return envoy.assignment(name, [(region, places[region]) for region in order])


def is_routed(machine: Machine, status: MachineStatus | None) -> bool:
    """Whether the edge may send requests to this machine. A former host's word does not count."""
    return (
        machine.desired is Desired.STARTED
        and not machine.cordoned
        and status is not None
        and status.host == machine.host
        and status.routable()
    )


# --------------------------------------------------------------------------- Postgres


def _postgres(view: EdgeView, app: App) -> Iterable[_Part]:
    """The endpoints of a Postgres application: its primary while it serves, and the nearest member."""
    if not app.endpoint_port:
        return
    leader = view.leaders.get(app.name)
    serving = leader if leader is not None and leader.serving else None
    name, address = f"{app.name}/postgres", view.host.address
    primary = [("", [_database(serving.address)])] if serving is not None else []
    chain = f"epoch-{leader.epoch if leader is not None else 0}"
    yield _Part(
        cluster=resource(name, envoy.postgres_cluster(name)),
        endpoints=resource(name, envoy.assignment(name, primary or NOWHERE)),
        listener=resource(name, envoy.postgres_listener(name, address, app.endpoint_port, name, chain)),
    )
    reads, places = f"{app.name}/reads", _read_places(view, app)
    yield _Part(
        cluster=resource(reads, envoy.postgres_read_cluster(reads)),
        endpoints=resource(reads, envoy.assignment(reads, places or NOWHERE)),
        listener=resource(reads, envoy.postgres_listener(reads, address, app.read_port, reads, "reads")),
    )


def _read_places(view: EdgeView, app: App) -> list[tuple[str, list[Body]]]:
    """The members that have what the primary has, or are it, nearest region first.

    While nobody serves, replicas that last said they stream in the present epoch still do.
    """
    leader = view.leaders.get(app.name)
    places: dict[str, list[Body]] = {}
    for member in sorted(view.members.get(app.name, ()), key=lambda m: m.node):
        if leader is None or member.epoch != leader.epoch:
            continue
        is_primary = leader.serving and member.node == leader.node
        if is_primary or (member.role == "replica" and member.streaming):
            places.setdefault(member.region, []).append(_database(member.address))
    return [(region, places[region]) for region in nearest_first(view.host.region, places)]


def _database(address: str) -> Body:
    ip, _, port = address.rpartition(":")
    return {"endpoint": {"address": envoy.socket_address(ip, int(port))}}
