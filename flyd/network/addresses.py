"""The private network's addresses: a subnet for each host, the first address for the host itself.

Pure. Numbers within a subnet are given by placement (flyd/placement/scheduler.py, `address`), which
never gives the first.
"""

from __future__ import annotations

from ipaddress import IPv4Network

from flyd.model import Host

OCTETS = 4


def subnet(host: Host) -> IPv4Network:
    """The addresses of the host's machines: `subnet` "10.11" is 10.11.0.0/16. ValueError if it is none."""
    octets = host.subnet.split(".")
    zeros = ["0"] * (OCTETS - len(octets))
    return IPv4Network(".".join([*octets, *zeros]) + f"/{8 * len(octets)}")


def gateway(host: Host) -> str:
    """The host's own address among its machines."""
    return str(subnet(host)[1])
