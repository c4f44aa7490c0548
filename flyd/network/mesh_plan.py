"""How one host reaches the machines of all others: peers, routes and addresses. Pure.

Two modes: `wireguard` sends what is for another host's subnet through one WireGuard
interface (kernel or user space), `routes` sends it by the host's address, on networks that are
already private.

Invariants: an address belongs to one host (WireGuard would silently give it to the last that
claims it: of two hosts that claim the same, the first by name has it and the other is left out,
with the reason); nothing is routed through the tunnel that carries the tunnel itself; equal input
gives an equal plan; `changes` of a state that fits the plan is empty.

Called by flyd/network/mesh.py; carried out by flyd/network/wireguard.py.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Iterable, Sequence
from enum import StrEnum
from ipaddress import IPv4Address, ip_address

from flyd.model import Host, Value
from flyd.network.addresses import beneath, gateway, subnet, subnet6

KEY_BYTES = 32
WIREGUARD_OVERHEAD_BYTES = 80  # outer IPv6 40, UDP 8, WireGuard 32
MIN_MTU = 1280
KEEPALIVE_S = 25


class MeshMode(StrEnum):
    """How hosts reach each other's machines."""

    WIREGUARD = "wireguard"
    ROUTES = "routes"


class Peer(Value, frozen=True, kw_only=True):
    """Another host's end of the tunnel. `allowed` are the networks that are its own, sorted."""

    public_key: str
    endpoint: str
    allowed: tuple[str, ...]


class Route(Value, frozen=True, kw_only=True):
    """How to reach one network: through the tunnel, or (`via`) through another host."""

    destination: str
    via: str = ""


class MeshPlan(Value, frozen=True, kw_only=True):
    """What this host's end is to be. `address` is "" where there is no tunnel."""

    mode: MeshMode
    address: str = ""
    mtu: int = 0
    peers: tuple[Peer, ...] = ()  # by key
    routes: tuple[Route, ...] = ()  # by destination
    left_out: dict[str, str] = {}  # host -> why it is not reached


class MeshState(Value, frozen=True, kw_only=True):
    """What this host's end is, as the system says. Not there: no interface (or no need of one)."""

    there: bool = False
    address: str = ""
    mtu: int = 0
    peers: tuple[Peer, ...] = ()
    routes: tuple[Route, ...] = ()


class MeshChanges(Value, frozen=True, kw_only=True):
    """What is to be done, in the order of the fields."""

    create: bool = False
    address: str = ""
    mtu: int = 0
    remove_routes: tuple[Route, ...] = ()
    remove_peers: tuple[str, ...] = ()
    set_peers: tuple[Peer, ...] = ()
    set_routes: tuple[Route, ...] = ()

    def __bool__(self) -> bool:
        return self != MeshChanges()


def mesh_plan(
    me: Host, hosts: Iterable[Host], mode: MeshMode, underlay_mtu: int, expelled: Sequence[str] = ()
) -> MeshPlan:
    """The plan of `me` among `hosts` (which may contain `me`); `expelled` are names of hosts."""
    taken = {me.name: me}
    reached: list[tuple[Host, tuple[str, ...]]] = []
    left_out: dict[str, str] = {}
    for host in sorted(hosts, key=lambda h: h.name):
        if host.name == me.name:
            continue
        reason = "it was expelled" if host.name in expelled else _obstacle(host, taken, mode)
        if reason:
            left_out[host.name] = reason
            continue
        taken[host.name] = host
        reached.append((host, _own_networks(host, mode, me)))
    if mode is MeshMode.ROUTES:
        routes = [Route(destination=n, via=h.address) for h, networks in reached for n in networks]
        return MeshPlan(mode=mode, routes=_sorted(routes), left_out=left_out)
    peers = [Peer(public_key=h.wg_public_key, endpoint=h.wg_endpoint, allowed=n) for h, n in reached]
    return MeshPlan(
        mode=mode,
        address=gateway(me),
        mtu=max(MIN_MTU, underlay_mtu - WIREGUARD_OVERHEAD_BYTES),
        peers=tuple(sorted(peers, key=lambda p: p.public_key)),
        routes=_sorted([Route(destination=n) for _, networks in reached for n in networks]),
        left_out=left_out,
    )


def changes(plan: MeshPlan, state: MeshState) -> MeshChanges:
    """What makes of `state` what `plan` says."""
    wanted_keys = {p.public_key for p in plan.peers}
    wanted_destinations = {r.destination for r in plan.routes}
    tunnel = plan.mode is MeshMode.WIREGUARD
    return MeshChanges(
        create=tunnel and not state.there,
        address=plan.address if plan.address != state.address else "",
        mtu=plan.mtu if plan.mtu != state.mtu else 0,
        remove_routes=tuple(r for r in state.routes if r.destination not in wanted_destinations),
        remove_peers=tuple(p.public_key for p in state.peers if p.public_key not in wanted_keys),
        set_peers=tuple(p for p in plan.peers if p not in state.peers),
        set_routes=tuple(r for r in plan.routes if r not in state.routes),
    )


def _sorted(routes: list[Route]) -> tuple[Route, ...]:
    return tuple(sorted(routes, key=lambda r: r.destination))


def _obstacle(host: Host, taken: dict[str, Host], mode: MeshMode) -> str:
    """Why this host can not be reached, "" if it can."""
    try:
        own = subnet(host)
    except ValueError:
        return f"its subnet {host.subnet!r} is none"
    for name, other in taken.items():
        if own.overlaps(subnet(other)):
            return f"its subnet {own} overlaps {name}'s {subnet(other)}"
        if host.wg_public_key and host.wg_public_key == other.wg_public_key:
            return f"its key is {name}'s: a host was copied with its key file"
    if mode is MeshMode.ROUTES:
        return f"its address {host.address} is one of its machines'" if _inside(host) else ""
    if not host.wg_public_key:
        return "it has published no key"
    if not is_key(host.wg_public_key):
        return f"its key {host.wg_public_key!r} is none"
    return "" if _is_endpoint(host.wg_endpoint) else f"its endpoint {host.wg_endpoint!r} is no ip:port"


def _own_networks(host: Host, mode: MeshMode, me: Host) -> tuple[str, ...]:
    """The host's subnets, and its own address where that is neither in them nor beneath the tunnel.

    IPv6 goes through tunnels only: the network between hosts, which `routes` uses, may have none.
    """
    own = [str(subnet(host))]
    if mode is MeshMode.ROUTES:
        return tuple(own)
    six = subnet6(host)
    if six is not None and subnet6(me) is not None:
        own.append(str(six))
    if not _inside(host) and not beneath(host):
        own.append(f"{host.address}/32")
    return tuple(sorted(own))


def _inside(host: Host) -> bool:
    return IPv4Address(host.address) in subnet(host)


def is_key(text: str) -> bool:
    """Whether the text is a WireGuard key."""
    try:
        return len(b64decode(text, validate=True)) == KEY_BYTES
    except (binascii.Error, ValueError):
        return False


def _is_endpoint(text: str) -> bool:
    address, _, port = text.rpartition(":")
    try:
        ip_address(address.strip("[]"))
    except ValueError:
        return False
    return port.isdecimal() and 0 < int(port) < 65536
