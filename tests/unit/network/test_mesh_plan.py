from __future__ import annotations

from base64 import b64encode
from hashlib import sha256

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyd.model import Host
from flyd.network.mesh_plan import (
    MeshChanges,
    MeshMode,
    MeshPlan,
    MeshState,
    Route,
    changes,
    mesh_plan,
)
from tests.support import edge as values


def key(name: str) -> str:
    return b64encode(sha256(name.encode()).digest()).decode()


def host(name: str, number: int, **different: str) -> Host:
    fields = {
        "name": name,
        "subnet": f"10.{number}",
        "address": f"10.{number}.0.1",
        "wg_public_key": key(name),
        "wg_endpoint": f"192.0.2.{number}:51820",
    }
    return msgspec.structs.replace(values.host("ams"), **{**fields, **different})


A, B, C = host("a", 11), host("b", 12), host("c", 13)


def plan(me: Host, *hosts: Host, mode: MeshMode = MeshMode.WIREGUARD, mtu: int = 1500) -> MeshPlan:
    return mesh_plan(me, hosts, mode, mtu)


def test_each_other_host_is_a_peer_with_its_subnet() -> None:
    made = plan(A, C, A, B)
    assert made.address == "10.11.0.1"
    assert made.mtu == 1420
    assert {p.public_key: p.allowed for p in made.peers} == {
        key("b"): ("10.12.0.0/16",),
        key("c"): ("10.13.0.0/16",),
    }
    assert made.routes == (Route(destination="10.12.0.0/16"), Route(destination="10.13.0.0/16"))
    assert not made.left_out


def test_the_mtu_follows_the_underlay() -> None:
    assert plan(A, B, mtu=1400).mtu == 1320
    assert plan(A, B, mtu=9000).mtu == 8920
    assert plan(A, B, mtu=1300).mtu == 1280


def test_a_hosts_own_address_goes_through_unless_the_tunnel_runs_on_it() -> None:
    apart = host("b", 12, address="10.99.0.2")
    assert plan(A, apart).peers[0].allowed == ("10.12.0.0/16", "10.99.0.2/32")
    beneath = host("b", 12, address="192.0.2.12")
    assert plan(A, beneath).peers[0].allowed == ("10.12.0.0/16",)


def test_ipv6_goes_through_the_tunnel_between_hosts_with_containers() -> None:
    a, b = host("a", 11, driver="docker"), host("b", 12, driver="docker")
    assert plan(a, b).peers[0].allowed == ("10.12.0.0/16", "fdaa:0:0:a0c::/64")
    assert [r.destination for r in plan(a, b, C).routes] == [
        "10.12.0.0/16",
        "10.13.0.0/16",
        "fdaa:0:0:a0c::/64",
    ]
    assert plan(A, b).peers[0].allowed == ("10.12.0.0/16",)
    assert plan(a, b, mode=MeshMode.ROUTES).left_out  # both are at their machines' addresses
    elsewhere = host("b", 12, driver="docker", address="192.0.2.12")
    assert [r.destination for r in plan(a, elsewhere, mode=MeshMode.ROUTES).routes] == ["10.12.0.0/16"]


def test_routes_go_by_the_hosts_addresses() -> None:
    made = plan(A, host("b", 12, address="192.0.2.12", wg_public_key=""), mode=MeshMode.ROUTES)
    assert made == MeshPlan(
        mode=MeshMode.ROUTES, routes=(Route(destination="10.12.0.0/16", via="192.0.2.12"),)
    )
    assert "machines'" in plan(A, B, mode=MeshMode.ROUTES).left_out["b"]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (host("b", 12, wg_public_key=""), "no key"),
        (host("b", 12, wg_public_key="nonsense"), "is none"),
        (host("b", 12, wg_public_key="ä" * 43 + "="), "is none"),
        (host("b", 12, wg_endpoint=""), "endpoint"),
        (host("b", 12, wg_endpoint="somewhere:51820"), "endpoint"),
        (host("b", 12, wg_endpoint="192.0.2.1:0"), "endpoint"),
        (host("b", 12, wg_public_key=key("a")), "is a's"),
        (host("b", 12, subnet="10.11"), "overlaps a's"),
        (host("b", 12, subnet="10.11.4"), "overlaps a's"),
        (host("b", 12, subnet="hello"), "subnet"),
    ],
)
def test_a_host_that_can_not_be_reached_is_left_out_with_the_reason(other: Host, reason: str) -> None:
    made = plan(A, other, C)
    assert reason in made.left_out["b"]
    assert [p.public_key for p in made.peers] == [key("c")]


def test_of_two_claims_the_first_by_name_holds() -> None:
    made = plan(A, host("z", 12), B)
    assert [p.public_key for p in made.peers] == [key("b")]
    assert "overlaps b's" in made.left_out["z"]


def test_an_expelled_host_is_no_peer_and_takes_nothing_from_another() -> None:
    made = mesh_plan(A, [B, host("c", 12)], MeshMode.WIREGUARD, 1500, expelled=("b",))
    assert made.left_out == {"b": "it was expelled"}
    assert [(p.public_key, p.allowed) for p in made.peers] == [(key("c"), ("10.12.0.0/16",))]


def fitting(made: MeshPlan) -> MeshState:
    return MeshState(
        there=made.mode is MeshMode.WIREGUARD,
        address=made.address,
        mtu=made.mtu,
        peers=made.peers,
        routes=made.routes,
    )


def applied(state: MeshState, todo: MeshChanges) -> MeshState:
    """What the system would say after the changes."""
    new_keys = {p.public_key for p in todo.set_peers}
    new_routes = {r.destination for r in todo.set_routes}
    peers = [p for p in state.peers if p.public_key not in todo.remove_peers and p.public_key not in new_keys]
    routes = [r for r in state.routes if r not in todo.remove_routes and r.destination not in new_routes]
    return MeshState(
        there=state.there or todo.create,
        address=todo.address or state.address,
        mtu=todo.mtu or state.mtu,
        peers=tuple(sorted((*peers, *todo.set_peers), key=lambda p: p.public_key)),
        routes=tuple(sorted((*routes, *todo.set_routes), key=lambda r: r.destination)),
    )


def test_lost_routes_come_back_and_nothing_else_is_touched() -> None:
    made = plan(A, B, C)
    damaged = msgspec.structs.replace(fitting(made), routes=made.routes[1:])
    assert changes(made, damaged) == MeshChanges(set_routes=made.routes[:1])
    assert not changes(made, fitting(made))


def test_a_host_that_is_gone_and_a_new_key() -> None:
    renewed = host("c", 13, wg_public_key=key("c2"))
    todo = changes(plan(A, renewed), fitting(plan(A, B, C)))
    assert sorted(todo.remove_peers) == sorted((key("b"), key("c")))
    assert [p.public_key for p in todo.set_peers] == [key("c2")]
    assert todo.remove_routes == (Route(destination="10.12.0.0/16"),)


def drawn(name: str, number: int, generation: str, endpoint: str) -> Host:
    public_key = generation and key(name + generation)
    return host(name, number, wg_public_key=public_key, wg_endpoint=endpoint)


HOSTS = st.lists(
    st.builds(
        drawn,
        st.sampled_from("abcde"),
        st.integers(10, 15),
        st.sampled_from(["", "1", "2"]),
        st.sampled_from(["192.0.2.1:1", "192.0.2.2:1", "x"]),
    ),
    max_size=5,
    unique_by=lambda h: h.name,
)


@settings(max_examples=100)
@given(HOSTS, HOSTS, st.sampled_from(MeshMode))
def test_changes_lead_from_any_plan_to_any_other_at_once(
    before: list[Host], after: list[Host], mode: MeshMode
) -> None:
    me = host("me", 9)
    one, two = plan(me, *before, mode=mode), plan(me, *after, mode=mode)
    state = applied(fitting(one), changes(two, fitting(one)))
    assert not changes(two, state)
    owned = [network for p in two.peers for network in p.allowed]
    assert len(owned) == len(set(owned))
    assert changes(two, MeshState()).set_peers == two.peers
    assert len(two.left_out) + len(two.routes) == len([h for h in after if h.name != "me"])
