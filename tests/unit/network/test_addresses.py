from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyd.network.addresses import address6, mac, network6, subnet6
from tests.support.network import host


@pytest.mark.parametrize(
    ("address", "six", "hardware"),
    [
        ("10.211.0.7", "fdaa:0:0:ad3::7", "02:42:0a:d3:00:07"),
        ("10.11.4.255", "fdaa:0:0:a0b::4ff", "02:42:0a:0b:04:ff"),
        ("255.255.255.255", "fdaa:0:0:ffff::ffff", "02:42:ff:ff:ff:ff"),
    ],
)
def test_all_follows_from_the_ipv4_address(address: str, six: str, hardware: str) -> None:
    assert (address6(address), mac(address)) == (six, hardware)


@given(st.ip_addresses(v=4), st.ip_addresses(v=4))
def test_no_two_share_an_address_and_each_is_in_its_hosts_network(one: IPv4Address, two: IPv4Address) -> None:
    assert (address6(str(one)) == address6(str(two))) == (one == two)
    octets = ".".join(str(one).split(".")[:2])
    assert IPv6Address(address6(str(one))) in network6(octets)


def test_only_hosts_of_containers_have_ipv6() -> None:
    containers = host("a", 11, driver="docker")
    assert str(subnet6(containers)) == "fdaa:0:0:a0b::/64"
    assert subnet6(host("a", 11)) is None
    for octets in ("10.11.4", "10", "", "hello", "10.256"):
        assert subnet6(msgspec.structs.replace(containers, subnet=octets)) is None
