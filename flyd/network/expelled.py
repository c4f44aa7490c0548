"""Hosts that were expelled from the cluster: the private network holds them no longer.

A host without a membership record counts as a member. A host never holds itself to be expelled: it
is the others who cut it off. Called by mesh.py, nftables.py and dns.py, for what each reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_address, ip_network

from flyd.model import Host, Membership
from flyd.network.addresses import network, network6
from flyd.store import keys
from flyd.store.mirror import Mirror


def read_memberships(mirror: Mirror) -> list[Membership]:
    """All that etcd holds, by host."""
    return [v.value for v in mirror.list(keys.MEMBERSHIPS, Membership)]


def expelled_hosts(me: str, memberships: Iterable[Membership]) -> tuple[str, ...]:
    """The names of the hosts that were expelled, sorted, without `me`."""
    return tuple(sorted(m.host for m in memberships if m.expelled_at_s > 0 and m.host != me))


def cut_off(
    hosts: Iterable[Host], memberships: Iterable[Membership], out: tuple[str, ...]
) -> tuple[str, ...]:
    """The networks of the expelled hosts `out`, sorted: their own addresses and their machines'.

    What a member (of `hosts`, or by its membership) has too is not cut off: a machine that was set up
    again under another name.
    """
    gone: list[IPv4Network | IPv6Network] = []
    kept: list[IPv4Network | IPv6Network] = []
    for membership in memberships:
        (gone if membership.host in out else kept).extend(_networks(membership.addresses, membership.subnet))
    for host in hosts:
        endpoint = host.wg_endpoint.rpartition(":")[0].strip("[]")
        kept.extend(_networks((host.address, host.public_address, endpoint), host.subnet))
    cut = [n for n in gone if not any(n.version == k.version and n.overlaps(k) for k in kept)]
    four = collapse_addresses(n for n in cut if isinstance(n, IPv4Network))
    six = collapse_addresses(n for n in cut if isinstance(n, IPv6Network))
    return tuple(sorted(map(str, (*four, *six))))


def _networks(addresses: Iterable[str], octets: str) -> list[IPv4Network | IPv6Network]:
    """Those that are addresses at all, without the loopback's, which every host has."""
    found: list[IPv4Network | IPv6Network] = []
    for text in addresses:
        try:
            found.append(ip_network(ip_address(text)))
        except ValueError:
            continue
    with suppress(ValueError):
        found += [network(octets), network6(octets)]
    return [n for n in found if not n.is_loopback]
