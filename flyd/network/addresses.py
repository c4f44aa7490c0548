"""The private network's addresses: a subnet for each host, the first address for the host itself.

Pure. Numbers within a subnet are given by placement (flyd/placement/scheduler.py, `address`), which
never gives the first. All that a machine has besides its IPv4 address follows from that one: 10.211.0.7
is also fdaa:0:0:ad3::7, in its host's fdaa:0:0:ad3::/64, and has the MAC address 02:42:0a:d3:00:07.
"""

from __future__ import annotations

import hashlib
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from flyd.model import Host

OCTETS = 4
HALF_BITS = 16  # of an IPv4 address: its host's part, and its own within that
PREFIX6 = int(IPv6Address("fdaa::"))
PREFIX6_BITS = 64
MAC_PREFIX = "02:42:"  # what Docker gives, too
DOCKER = "docker"
BRIDGE_DIGITS = 8


def network(octets: str) -> IPv4Network:
    """The addresses that begin with `octets`: "10.11" is 10.11.0.0/16. ValueError if it is none."""
    given = octets.split(".")
    zeros = ["0"] * (OCTETS - len(given))
    return IPv4Network(".".join([*given, *zeros]) + f"/{8 * len(given)}")


def subnet(host: Host) -> IPv4Network:
    """The addresses of the host's machines. ValueError if its `subnet` is none."""
    return network(host.subnet)


def gateway(host: Host) -> str:
    """The host's own address among its machines."""
    return str(subnet(host)[1])


def address6(address: str) -> str:
    """The IPv6 address of what has this IPv4 address."""
    host, own = divmod(int(IPv4Address(address)), 1 << HALF_BITS)
    return str(IPv6Address(PREFIX6 | host << PREFIX6_BITS | own))


def network6(octets: str) -> IPv6Network:
    """The IPv6 addresses of those that begin with `octets`, which are two. ValueError if they are not."""
    whole = network(octets)
    if whole.prefixlen != HALF_BITS:
        raise ValueError(f"{octets!r} are not two octets")
    return IPv6Network(f"{address6(str(whole[0]))}/{PREFIX6_BITS}")


def subnet6(host: Host) -> IPv6Network | None:
    """The IPv6 addresses of the host's machines; None where they have none: processes of the host."""
    if host.driver != DOCKER:
        return None
    try:
        return network6(host.subnet)
    except ValueError:
        return None


def mac(address: str) -> str:
    """The MAC address of the machine that has this IPv4 address."""
    return MAC_PREFIX + IPv4Address(address).packed.hex(":")


def bridge(host_name: str) -> str:
    """The name, in the kernel, of the bridge that the host's machines are on (at most 15 characters)."""
    return "fly" + hashlib.sha256(host_name.encode()).hexdigest()[:BRIDGE_DIGITS]


def beneath(host: Host) -> bool:
    """Whether the host's own address is the one that carries its tunnel, and so is not reached by it."""
    return host.address == host.wg_endpoint.rpartition(":")[0].strip("[]")
