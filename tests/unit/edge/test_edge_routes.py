from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyd.edge import wire
from flyd.edge.resources import EdgeConfig, Kind
from flyd.edge.routes import EdgeView, edge_config, is_routed
from flyd.model import (
    App,
    AppKind,
    Check,
    Concurrency,
    Desired,
    Machine,
    MachineState,
    PostgresLeader,
    PostgresMember,
    Service,
    ServicePort,
)
from flyd.network.regions import nearest_first
from tests.support.edge import host, http_service, machine, status, tcp_service

CHAT = App(name="chat")
DB = App(name="db", kind=AppKind.POSTGRES, endpoint_port=5432)


def configured(*machines: Machine, region: str = "fra", apps: tuple[App, ...] = (CHAT,)) -> EdgeConfig:
    """The edge of a host in `region` while all machines run and pass."""
    return edge_config(
        EdgeView(
            host=host(region), apps=apps, machines=machines, statuses={m.id: status(m) for m in machines}
        )
    )


def bodies(config: EdgeConfig, kind: Kind) -> dict[str, Any]:
    return {one.name: json.loads(one.body) for one in config.of(kind)}


def places(config: EdgeConfig, cluster: str) -> list[tuple[str, list[str]]]:
    """A cluster's endpoints as (region, [ip:port]) by priority; priorities must be contiguous."""
    groups = bodies(config, Kind.ENDPOINTS)[cluster]["endpoints"]
    assert [g["priority"] for g in groups] == list(range(len(groups)))
    found: list[tuple[str, list[str]]] = []
    for group in groups:
        sockets = [e["endpoint"]["address"]["socket_address"] for e in group["lb_endpoints"]]
        found.append((group["locality"]["region"], [f"{s['address']}:{s['port_value']}" for s in sockets]))
    return found


def test_the_own_region_comes_first_then_the_nearest() -> None:
    config = configured(
        machine("m1", "sin", http_service(), ip="127.13.0.2"),
        machine("m2", "iad", http_service(), ip="127.12.0.2"),
        machine("m4", "fra", http_service(), ip="127.11.0.3"),
        machine("m3", "fra", http_service(), ip="127.11.0.2"),
    )
    assert places(config, "chat/http") == [
        ("fra", ["127.11.0.2:8080", "127.11.0.3:8080"]),
        ("iad", ["127.12.0.2:8080"]),
        ("sin", ["127.13.0.2:8080"]),
    ]


def test_priorities_have_no_gap_where_the_own_region_has_no_machine() -> None:
    config = configured(machine("m1", "sin", http_service()), machine("m2", "iad", http_service()))
    assert [region for region, _ in places(config, "chat/http")] == ["iad", "sin"]


@pytest.mark.parametrize(
    ("change", "state", "gate", "routed"),
    [
        ({}, MachineState.STARTED, "passing", True),
        ({}, MachineState.STARTED, "warning", False),
        ({}, MachineState.STARTED, "critical", False),
        ({}, MachineState.STARTING, "passing", False),
        ({}, MachineState.STOPPING, "passing", False),
        ({"desired": Desired.STOPPED}, MachineState.STARTED, "passing", False),
        ({"desired": Desired.DESTROYED}, MachineState.STARTED, "passing", False),
        ({"cordoned": True}, MachineState.STARTED, "passing", False),
    ],
)
def test_which_machines_are_routed_to(
    change: dict[str, Any], state: MachineState, gate: str, routed: bool
) -> None:
    one = msgspec.structs.replace(machine("m1", "fra", http_service()), **change)
    assert is_routed(one, status(one, state=state, gate=gate)) is routed


def test_a_machine_without_status_or_with_its_former_hosts_is_not_routed_to() -> None:
    one = machine("m1", "fra", http_service())
    assert not is_routed(one, None)
    assert not is_routed(one, status(one, host="iad-1"))


def test_an_app_has_four_names_and_any_other_name_is_refused() -> None:
    config = configured(machine("m1", "fra", http_service()))
    routes = bodies(config, Kind.ROUTES)["http"]
    assert routes["ignore_port_in_host_matching"] is True
    chat, nobody = routes["virtual_hosts"]
    assert chat["domains"] == ["chat", "chat.localhost", "chat.internal", "chat.flycast"]
    assert nobody["domains"] == ["*"]
    assert nobody["routes"][0]["direct_response"]["status"] == 404
    assert "chat" not in json.dumps(nobody)


def test_a_stopped_app_keeps_its_name_and_has_nowhere_to_go() -> None:
    config = configured(machine("m1", "fra", http_service(), desired=Desired.STOPPED))
    assert places(config, "chat/http") == []
    assert len(bodies(config, Kind.ROUTES)["http"]["virtual_hosts"]) == 2


def test_a_deploy_that_changes_the_internal_port_keeps_both_machines() -> None:
    config = configured(
        machine("m1", "fra", http_service(8080), ip="127.11.0.2", release=1),
        machine("m2", "fra", http_service(9090), ip="127.11.0.3", release=2),
    )
    assert places(config, "chat/http") == [("fra", ["127.11.0.2:8080", "127.11.0.3:9090"])]


def test_the_cluster_behaves_as_the_newest_release_says() -> None:
    checks = (Check(kind="tcp", port=8080), Check(kind="http", port=8080, path="/up", headers={"X-A": "50%"}))
    old = machine("m1", "fra", http_service(concurrency=Concurrency(hard_limit=10)), release=1)
    new = machine("m2", "fra", http_service(checks=checks, concurrency=Concurrency(hard_limit=25)), release=2)
    cluster = bodies(configured(old, new), Kind.CLUSTERS)["chat/http"]
    assert cluster["circuit_breakers"]["per_host_thresholds"] == [{"max_connections": 25}]
    check = cluster["health_checks"][0]
    assert check["http_health_check"]["path"] == "/up"
    assert check["http_health_check"]["request_headers_to_add"] == [
        {"header": {"key": "X-A", "value": "50%%"}}
    ]


@pytest.mark.parametrize(
    "check",
    [
        Check(kind="tcp", port=8080),
        Check(kind="http", port=8080, protocol="https"),
        Check(kind="http", port=8080, method="BREW"),
    ],
)
def test_a_check_that_envoy_cannot_make_becomes_a_connection(check: Check) -> None:
    config = configured(machine("m1", "fra", http_service(checks=(check,))))
    assert "tcp_health_check" in bodies(config, Kind.CLUSTERS)["chat/http"]["health_checks"][0]


def test_the_http_service_is_the_one_on_a_well_known_port() -> None:
    other = Service(internal_port=7000, ports=(ServicePort(port=79, handlers=("http",)),))
    config = configured(machine("m1", "fra", other, http_service(8080)))
    assert places(config, "chat/http") == [("fra", ["127.11.0.2:8080"])]


def test_a_port_without_handlers_is_raw_tcp_on_the_hosts_own_address() -> None:
    config = configured(machine("m1", "fra", http_service(), tcp_service(7, 7000)))
    assert places(config, "chat/tcp/7000") == [("fra", ["127.11.0.2:7"])]
    listener = bodies(config, Kind.LISTENERS)["chat/tcp/7000"]
    assert listener["address"]["socket_address"] == {"address": "127.0.0.1", "port_value": 7000}
    assert listener["enable_reuse_port"] is False


def test_a_udp_or_tls_port_gets_no_listener() -> None:
    udp = Service(internal_port=53, protocol="udp", ports=(ServicePort(port=53),))
    tls = Service(internal_port=9, ports=(ServicePort(port=9000, handlers=("tls",)),))
    config = configured(machine("m1", "fra", udp, tls))
    assert bodies(config, Kind.LISTENERS).keys() == {"http"}


def test_a_host_without_an_http_port_serves_tcp_only() -> None:
    one = machine("m1", "fra", http_service(), tcp_service(7, 7000))
    view = EdgeView(
        host=host("fra", http_port=0), apps=(CHAT,), machines=(one,), statuses={"m1": status(one)}
    )
    config = edge_config(view)
    assert bodies(config, Kind.LISTENERS).keys() == {"chat/tcp/7000"}
    assert config.routes == ()


def postgres(leader: PostgresLeader | None) -> tuple[Any, str]:
    """The one endpoint of the database's port, and the name of its filter chain."""
    view = EdgeView(host=host("fra"), apps=(DB,), leaders={"db": leader} if leader else {})
    config = edge_config(view)
    (group,) = bodies(config, Kind.ENDPOINTS)["db/postgres"]["endpoints"]
    (endpoint,) = group["lb_endpoints"]
    (chain,) = bodies(config, Kind.LISTENERS)["db/postgres"]["filter_chains"]
    return endpoint["endpoint"]["address"], chain["name"]


def test_a_database_port_leads_to_the_primary_only_while_it_serves() -> None:
    nowhere, none = postgres(None)
    leader = PostgresLeader(cluster="db", epoch=7, node="db-1", address="127.11.0.2:5433")
    assert postgres(leader) == (nowhere, "epoch-7")
    address, chain = postgres(msgspec.structs.replace(leader, serving=True))
    assert address == {"socket_address": {"address": "127.11.0.2", "port_value": 5433}}
    assert (none, chain) == ("epoch-0", "epoch-7")


def test_only_a_new_epoch_replaces_the_chain_and_so_cuts_sessions() -> None:
    leader = PostgresLeader(cluster="db", epoch=8, node="db-2", address="127.12.0.2:5433")
    _, waiting = postgres(leader)
    _, serving = postgres(msgspec.structs.replace(leader, serving=True))
    _, older = postgres(msgspec.structs.replace(leader, epoch=7))
    assert waiting == serving != older


MEMBERS = (
    PostgresMember(node="db-1", region="fra", address="127.11.0.2:5433", role="primary", epoch=7),
    PostgresMember(
        node="db-2", region="iad", address="127.12.0.2:5433", role="replica", epoch=7, streaming=True
    ),
    PostgresMember(
        node="db-3", region="sin", address="127.13.0.2:5433", role="replica", epoch=7, streaming=True
    ),
)
LEADER = PostgresLeader(cluster="db", epoch=7, node="db-1", address="127.11.0.2:5433", serving=True)


def readers(leader: PostgresLeader | None, *members: PostgresMember, region: str = "iad") -> list[str]:
    """Who gets reads, nearest first."""
    view = EdgeView(
        host=host(region), apps=(DB,), leaders={"db": leader} if leader else {}, members={"db": members}
    )
    config = edge_config(view)
    listener = bodies(config, Kind.LISTENERS)["db/reads"]
    assert listener["address"]["socket_address"]["port_value"] == DB.endpoint_port + 1
    return [one.split(".")[1] for _, found in places(config, "db/reads") for one in found]


def test_reads_go_to_the_nearest_member_that_is_up_to_date() -> None:
    assert readers(LEADER, *MEMBERS) == ["12", "11", "13"]
    assert readers(LEADER, *reversed(MEMBERS), region="sin") == ["13", "11", "12"]
    silent = msgspec.structs.replace(MEMBERS[1], streaming=False)
    assert readers(LEADER, MEMBERS[0], silent, MEMBERS[2]) == ["11", "13"]
    older = msgspec.structs.replace(MEMBERS[1], epoch=6)
    assert readers(LEADER, MEMBERS[0], older, MEMBERS[2]) == ["11", "13"]


def test_reads_go_on_while_no_primary_serves_and_never_to_a_former_one() -> None:
    waiting = msgspec.structs.replace(LEADER, serving=False)
    assert readers(waiting, *MEMBERS) == ["12", "13"]
    successor = msgspec.structs.replace(LEADER, node="db-2", address="127.12.0.2:5433")
    zombie = msgspec.structs.replace(MEMBERS[0], role="primary")
    assert readers(successor, zombie, MEMBERS[1]) == ["12"]


def test_without_a_member_for_reads_connections_wait_as_for_a_primary() -> None:
    for leader in (None, LEADER):
        config = edge_config(EdgeView(host=host("fra"), apps=(DB,), leaders={"db": leader} if leader else {}))
        (group,) = bodies(config, Kind.ENDPOINTS)["db/reads"]["endpoints"]
        assert group["lb_endpoints"][0]["endpoint"]["address"]["pipe"]


def test_a_database_without_an_endpoint_port_is_not_served() -> None:
    view = EdgeView(host=host("fra", http_port=0), apps=(App(name="db", kind=AppKind.POSTGRES),))
    assert edge_config(view) == EdgeConfig()


def test_envoys_own_schema_takes_everything() -> None:
    one = machine("m1", "fra", http_service(checks=(Check(kind="http", port=1),)), tcp_service(7, 7000))
    leader = PostgresLeader(cluster="db", epoch=1, node="a", address="127.0.0.1:1", serving=True)
    config = edge_config(
        EdgeView(
            host=host("fra"),
            apps=(CHAT, DB),
            machines=(one,),
            statuses={"m1": status(one)},
            leaders={"db": leader},
            members={"db": MEMBERS},
        )
    )
    for kind in Kind:
        for resource in config.of(kind):
            assert wire.to_any(kind, resource).value


REGIONS = st.sampled_from(["fra", "iad", "sin", "lab"])


@settings(max_examples=60)
@given(
    here=REGIONS,
    regions=st.lists(REGIONS, max_size=6),
    up=st.lists(st.booleans(), min_size=6, max_size=6),
    order=st.randoms(use_true_random=False),
)
def test_routed_machines_appear_once_nearest_first_whatever_the_order_of_the_input(
    here: str, regions: list[str], up: list[bool], order: Any
) -> None:
    machines = [machine(f"m{i}", r, http_service(), ip=f"127.11.0.{i}") for i, r in enumerate(regions)]
    states = [MachineState.STARTED if alive else MachineState.STOPPED for alive in up]
    statuses = {m.id: status(m, state=s) for m, s in zip(machines, states, strict=False)}
    view = EdgeView(host=host(here), apps=(CHAT,), machines=tuple(machines), statuses=statuses)
    config = edge_config(view)
    shuffled = list(machines)
    order.shuffle(shuffled)
    assert edge_config(msgspec.structs.replace(view, machines=tuple(shuffled))) == config
    if not machines:
        return
    groups = places(config, "chat/http")
    live = [m for m, alive in zip(machines, up, strict=False) if alive]
    assert [region for region, _ in groups] == list(nearest_first(here, {m.region for m in live}))
    assert sorted(a for _, addresses in groups for a in addresses) == sorted(
        f"{m.private_ip}:8080" for m in live
    )
