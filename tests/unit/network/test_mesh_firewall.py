"""The text of the rules; integration/test_mesh.py has them in force."""

from __future__ import annotations

import msgspec
import pytest

from flyd.model import App, AppKind, Host
from flyd.network.firewall import FirewallView, docker_chain, firewall_view, rules
from tests.support import edge as values

APPS = (
    App(name="chat"),
    App(name="chat-db", kind=AppKind.POSTGRES, endpoint_port=5432),
    App(name="secret", network="apart"),
    App(name="empty-db", kind=AppKind.POSTGRES, endpoint_port=5433, network="empty"),
)
MACHINES = (
    values.machine("m3", "iad", ip="10.12.0.2"),
    values.machine("m1", "ams", ip="10.11.0.2"),
    values.machine("m2", "ams", app="secret", ip="10.11.0.3"),
    values.machine("m9", "ams", app="forgotten", ip="10.11.0.9"),
)


def host(name: str, number: int, address: str = "") -> Host:
    made = values.host("ams", address=address or f"10.{number}.0.1")
    return msgspec.structs.replace(made, name=name, subnet=f"10.{number}")


def view(*hosts: Host) -> FirewallView:
    return firewall_view(host("a", 11), hosts=hosts or (host("b", 12),), apps=APPS, machines=MACHINES)


def test_each_network_is_a_set_and_a_machine_of_no_app_is_in_none() -> None:
    assert view().networks == {"": ("10.11.0.2", "10.12.0.2"), "apart": ("10.11.0.3",)}


@pytest.mark.parametrize(
    "line",
    [
        "set private { type ipv4_addr; flags interval; elements = { 10.11.0.0/16, 10.12.0.0/16 }; }",
        "set hosts { type ipv4_addr; elements = { 10.11.0.1, 10.12.0.1 }; }",
        "ip saddr @network_1 ip daddr @network_1 return",
        "ip saddr 10.11.0.0/16 ip daddr != @private masquerade",
        "tcp dport { 5432 } ip saddr @private ip saddr != @hosts ip saddr != @network_0 counter drop",
        "tcp dport { 5433 } ip saddr @private ip saddr != @hosts counter drop",  # nobody is of its network
    ],
)
def test_rules(line: str) -> None:
    assert line in rules(view(), "flyd0", 53)


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
