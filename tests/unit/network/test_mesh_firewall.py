"""The text of the rules; integration/test_mesh.py has them in force."""

from __future__ import annotations

import re

import msgspec
import pytest

from flyd.model import App, AppKind, Host, Membership
from flyd.network.addresses import bridge
from flyd.network.firewall import FirewallView, docker_chain, docker_chain6, firewall_view, rules
from tests.support import edge as values
from tests.support.network import host

APPS = (
    App(name="chat"),
    App(name="chat-db", kind=AppKind.POSTGRES, endpoint_port=5432),
    App(name="secret", network="apart"),
    App(name="empty-db", kind=AppKind.POSTGRES, endpoint_port=5434, network="empty"),
)
MACHINES = (
    values.machine("m3", "iad", ip="10.12.0.2"),
    values.machine("m1", "ams", ip="10.11.0.2"),
    values.machine("m2", "ams", app="secret", ip="10.11.0.3"),
    values.machine("m9", "ams", app="forgotten", ip="10.11.0.9"),
)


INSIDE = '{ "lo", "flyd0", "flyca978112" }'  # of host a


def view_of_containers() -> FirewallView:
    hosts = [host(name, n, driver="docker") for name, n in (("a", 11), ("b", 12))]
    return firewall_view(hosts[0], hosts=hosts, apps=APPS, machines=MACHINES)


def view(*hosts: Host) -> FirewallView:
    return firewall_view(host("a", 11), hosts=hosts or (host("b", 12),), apps=APPS, machines=MACHINES)


def test_each_network_is_a_set_and_a_machine_of_no_app_is_in_none() -> None:
    assert view().networks == {"": ("10.11.0.2", "10.12.0.2"), "apart": ("10.11.0.3",)}


@pytest.mark.parametrize(
    "line",
    [
        "set private { type ipv4_addr; flags interval; elements = { 10.11.0.0/16, 10.12.0.0/16 }; }",
        "set hosts { type ipv4_addr; elements = { 10.11.0.1, 10.12.0.1 }; }",
        "ip saddr @network_1 ip daddr @network_1 accept",
        "ip saddr 10.11.0.0/16 ip daddr != @private masquerade",
        "ip daddr { 10.11.0.1 } tcp dport { 5432, 5433 } "
        "ip saddr != @hosts ip saddr != @network_0 counter drop",
        "ip daddr { 10.11.0.1 } tcp dport { 5434, 5435 } ip saddr != @hosts counter drop",  # nobody's network
        "ip daddr @hosts tcp dport { 5432, 5433 } ip saddr != @hosts ip saddr != @network_0 counter drop",
        f"iifname != {INSIDE} ip saddr @tunnelled counter drop",
        f"iifname != {INSIDE} ip daddr @tunnelled counter drop",
        f"oifname != {INSIDE} ip daddr @tunnelled counter drop",
        'iifname != "lo" ip saddr @private fib saddr . iif oif missing counter drop',
        'iifname != "lo" ip daddr 10.11.0.1 ip saddr != @private ip saddr != @hosts ct state != ',
        "set tunnelled { type ipv4_addr; flags interval; elements = { 10.11.0.0/16, 10.12.0.0/16 }; }",
    ],
)
def test_rules(line: str) -> None:
    assert line in rules(view(), "flyd0", 53)


@pytest.mark.parametrize(
    ("other", "reached"),
    [
        (host("b", 12, "10.99.0.2"), True),
        (host("b", 12, "198.51.100.2", beneath="198.51.100.2"), False),  # this address carries the tunnel
        (host("b", 12, "198.51.100.2", key=""), False),  # no tunnel leads there: it is reached as ever
    ],
)
def test_a_hosts_own_address_comes_by_the_tunnel_if_it_leads_there(other: Host, *, reached: bool) -> None:
    (line,) = [line for line in rules(view(other), "flyd0", 53).splitlines() if "set tunnelled" in line][:1]
    assert (f", {other.address} " in line) == reached


def test_without_a_tunnel_the_network_between_hosts_is_trusted() -> None:
    trusting = firewall_view(host("a", 11, "192.0.2.1", key=""), hosts=(), apps=APPS, machines=MACHINES)
    text = rules(trusting, "flyd0", 53)
    assert INSIDE not in text
    assert "ip daddr { 10.11.0.1, 192.0.2.1 } tcp dport { 5432, 5433 } ip saddr != @hosts" in text


def test_an_expelled_host_is_cut_off_and_its_machines_are_of_no_network() -> None:
    membership = Membership(
        host="iad-1",
        id="1",
        public_key="",
        addresses=("192.0.2.12", "2001:db8::12"),
        subnet="10.12",
        joined_at_s=1.0,
        expelled_at_s=2.0,
    )
    gone = msgspec.structs.replace(host("b", 12), name="iad-1")  # m3 is there
    seen = firewall_view(
        host("a", 11), hosts=(gone,), apps=APPS, machines=MACHINES, memberships=(membership,)
    )
    assert seen.networks == {"": ("10.11.0.2",), "apart": ("10.11.0.3",)}
    lines = [line.strip() for line in rules(seen, "flyd0", 53).splitlines()]
    arrive = lines.index("chain arrive {") + 2
    assert lines[arrive : arrive + 4] == [
        f"{ip} saddr @{cut} {what} counter drop"
        for ip, cut in (("ip", "cut"), ("ip6", "cut6"))
        for what in ("meta l4proto != tcp", "tcp dport != 1")  # the API of host a
    ]
    assert "ip daddr @cut tcp sport != 1 counter drop" in lines
    assert "ip saddr @cut counter drop" in lines[lines.index("jump isolate", arrive) - 9 :]
    assert "set cut { type ipv4_addr; flags interval; elements = { 10.12.0.0/16, 192.0.2.12/32 }; }" in lines
    assert "set private { type ipv4_addr; flags interval; elements = { 10.11.0.0/16 }; }" in lines


def test_no_interface_between_hosts_is_named() -> None:
    """An engine that reconnects a network calls it eth1 instead of eth0."""
    named = set(re.findall(r'"([^"]*)"', rules(view(), "flyd0", 53)))
    assert named == {"lo", "flyd0", bridge("a")}


@pytest.mark.parametrize(
    "line",
    [
        "set private6 { type ipv6_addr; flags interval; elements = { fdaa:0:0:a0b::/64, fdaa:0:0:a0c::/64 };",
        "set tunnelled6 { type ipv6_addr; flags interval; elements = { fdaa:0:0:a0b::/64, fdaa",
        "set hosts6 { type ipv6_addr; elements = { fdaa:0:0:a0b::1, fdaa:0:0:a0c::1 }; }",
        "set network6_0 { type ipv6_addr; elements = { fdaa:0:0:a0b::2, fdaa:0:0:a0c::2 }; }",
        "ip6 saddr @network6_1 ip6 daddr @network6_1 accept",
        "ip6 saddr @private6 counter drop",
        'iifname != "lo" ip6 saddr @private6 fib saddr . iif oif missing counter drop',
        f"iifname != {INSIDE} ip6 saddr @tunnelled6 counter drop",
        f"iifname != {INSIDE} ip6 daddr @tunnelled6 counter drop",
        f"oifname != {INSIDE} ip6 daddr @tunnelled6 counter drop",
        "ip6 daddr fdaa:0:0:a0b::/64 ip6 saddr != @private6 ip6 saddr != @hosts6 ct state != ",
        'iifname != "lo" ip6 daddr fdaa:0:0:a0b::1 ip6 saddr != @private6 ',
        "ip6 saddr fdaa:0:0:a0b::/64 ip6 daddr != @private6 masquerade",
    ],
)
def test_rules_of_ipv6(line: str) -> None:
    assert line in rules(view_of_containers(), "flyd0", 53)


def test_each_rule_of_ipv4_between_machines_has_its_like_in_ipv6() -> None:
    lines = rules(view_of_containers(), "flyd0", 53).splitlines()
    start = lines.index("  chain isolate {")
    chain = lines[start + 1 : lines.index("  }", start)]
    four, six = chain[: len(chain) // 2], chain[len(chain) // 2 :]
    assert [re.sub(r"\bip\b", "ip6", re.sub(r"(@[a-z]+)", r"\g<1>6", line)) for line in four] == six


def test_machines_of_one_bridge_have_no_way_around_their_networks() -> None:
    """Also where machines have no IPv6 that we know of: what is not known is dropped."""
    own = "ether saddr 02:42:0a:0b:00:00-02:42:0a:0b:ff:ff"
    for seen in (view(), view_of_containers()):
        text = rules(seen, "flyd0", 53)
        bridged = text[: text.index("table inet flyd {")]
        assert bridged.splitlines()[-4:-2] == [
            f"    {own} icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept",
            f"    {own} ether type {{ ip, ip6 }} counter drop",
        ]


def test_both_tables_end_isolation_with_a_drop() -> None:
    text = rules(view(), "flyd0", 53)
    assert text.count("ip saddr @private counter drop\n  }") == 2
    assert text.startswith("table inet flyd\ndelete table inet flyd\ntable bridge flyd\n")


def test_equal_state_in_another_order_is_the_same_text() -> None:
    turned = firewall_view(
        host("a", 11),
        hosts=(host("b", 12), host("a", 11)),
        apps=APPS[::-1],
        machines=MACHINES[::-1],
    )
    assert rules(turned, "flyd0", 53) == rules(view(), "flyd0", 53)


def test_hosts_with_wrong_or_taken_subnets_spoil_nothing() -> None:
    wrong = msgspec.structs.replace(host("w", 1), subnet="hello")
    text = rules(view(host("b", 12), host("z", 12), wrong), "flyd0", 53)
    assert "elements = { 10.11.0.0/16, 10.12.0.0/16 }" in text


def test_docker_lets_the_private_network_and_hosts_apart_through() -> None:
    lines = docker_chain(view(host("b", 12, "192.0.2.2"))).splitlines()
    assert lines[:2] == ["*filter", ":FLYD - [0:0]"]
    assert "-A FLYD -s 10.12.0.0/16 -d 10.11.0.0/16 -j ACCEPT" in lines
    assert "-A FLYD -s 192.0.2.2/32 -d 10.11.0.0/16 -j ACCEPT" in lines
    assert not any("-s 10.11.0.1/32" in line for line in lines)
    pair = "-A FLYD -s fdaa:0:0:a0b::/64 -d fdaa:0:0:a0c::/64 -j ACCEPT"
    assert pair in docker_chain6(view_of_containers())
    assert docker_chain6(view(host("b", 12, driver="docker"))).splitlines()[1:] == [":FLYD - [0:0]", "COMMIT"]
