"""This host's end of the mesh, as the system has it: a WireGuard interface and routes.

Owns `WireguardLink`: the interface, its key file (made here, 0600, never read by anybody else:
only the public key is told) and the routes marked with ROUTE_PROTOCOL. The kernel's WireGuard
where it has one, else `wireguard-go`, which is a daemon of its own: stopping flyd stops no traffic
(under systemd that needs KillMode=process, as machines do).

Called by flyd/network/mesh.py, built by flyd/composition.py. Decides nothing: mesh_plan.py does.
Touches no interface, peer or route that is not its own.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import msgspec
import structlog

from flyd.errors import Unavailable
from flyd.network.commands import lines, run
from flyd.network.mesh_plan import KEEPALIVE_S, MeshChanges, MeshState, Peer, Route

log = structlog.get_logger(__name__)

INTERFACE = "flyd0"
LISTEN_PORT = 51820
ROUTE_PROTOCOL = "76"  # marks our routes, so that nobody else's are ever removed
DISCARD_PORT = 9
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
IPV6 = Path("/proc/sys/net/ipv6/conf")  # not there: the kernel has no IPv6
FORWARDING_IPV6 = IPV6 / "all" / "forwarding"


class WireguardLink:
    """The interface `interface` with the private key in `key_file`."""

    def __init__(self, key_file: Path, *, interface: str = INTERFACE, listen_port: int = LISTEN_PORT) -> None:
        self.interface = interface
        self._key_file = key_file
        self._listen_port = listen_port

    async def public_key(self) -> str:
        """This host's public key; the private one is made if there is none yet."""
        if not self._key_file.exists():
            private = await run("wg", "genkey")
            self._key_file.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
            fresh = self._key_file.with_suffix(".new")
            fresh.unlink(missing_ok=True)
            handle = os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(private)
                file.flush()
                os.fsync(file.fileno())
            fresh.rename(self._key_file)
        return (await run("wg", "pubkey", stdin=self._key_file.read_text())).strip()

    async def state(self) -> MeshState:
        """What is there now. An interface with another key or port counts as not there."""
        routes = tuple(sorted(await self._routes(), key=lambda r: r.destination))
        found = await self._interface()
        if found is None:
            return MeshState(routes=routes)
        own, *dump = (await run("wg", "show", self.interface, "dump")).splitlines()
        _, public_key, port, _ = own.split("\t")
        there = public_key == await self.public_key() and port == str(self._listen_port)
        addresses = [a["local"] for a in found.get("addr_info", ()) if a["family"] == "inet"]
        return MeshState(
            there=there,
            address=addresses[0] if addresses and "UP" in found["flags"] else "",
            mtu=found["mtu"],
            peers=tuple(sorted((_peer(line) for line in dump), key=lambda p: p.public_key)),
            routes=routes,
        )

    async def apply(self, changes: MeshChanges) -> None:
        """Carry the changes out. What can not be done now does not keep the rest from it."""
        if FORWARDING.read_text().strip() != "1":
            FORWARDING.write_text("1")
        failures: list[str] = []
        commands = await self._commands(changes)
        if any(_is_ipv6(route.destination) for route in changes.set_routes):
            try:
                await self._enable_ipv6()
            except (OSError, Unavailable) as error:
                failures.append(f"no IPv6: {error}")
        for command in commands:
            try:
                await run(*command)
            except Unavailable as error:
                failures.append(error.message)
        if failures:
            raise Unavailable("; ".join(failures))

    async def underlay_mtu(self, endpoints: Iterable[str]) -> int:
        """The smallest MTU on the way to any of the endpoints, 0 if none is reachable."""
        found: dict[str, int] = {}
        for endpoint in endpoints:
            try:
                (route,) = _json(
                    await run("ip", "-j", "route", "get", endpoint.rpartition(":")[0].strip("[]"))
                )
                if route["dev"] not in found:
                    (device,) = _json(await run("ip", "-j", "link", "show", "dev", route["dev"]))
                    found[route["dev"]] = device["mtu"]
            except Unavailable:
                continue
        return min(found.values(), default=0)

    def greet(self, routes: Iterable[Route]) -> None:
        """An empty datagram to the first address of each network: after a cut the way through the
        tunnel, and the neighbours' tables beneath, would otherwise wait for their own time-outs.
        """
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as greeter:
            for destination in (r.destination for r in routes if not _is_ipv6(r.destination)):
                network = IPv4Network(destination)
                with suppress(OSError):  # no way there now: the next event greets again
                    greeter.sendto(b"", (str(network[min(1, network.num_addresses - 1)]), DISCARD_PORT))

    async def events(self) -> AsyncIterator[None]:
        """Something about links, addresses or routes has changed; told by the kernel, not by polling."""
        async for _ in lines("ip", "-o", "monitor", "link", "address", "route"):
            yield

    async def remove(self) -> None:
        """Take the interface and all routes away: for a host that leaves the cluster."""
        for route in await self._routes():
            await run("ip", "route", "del", route.destination, "proto", ROUTE_PROTOCOL)
        if await self._interface() is not None:
            await run("ip", "link", "del", self.interface)

    async def _commands(self, changes: MeshChanges) -> list[tuple[str, ...]]:
        name = self.interface
        commands: list[tuple[str, ...]] = []
        if changes.create:
            await self._create()
            port = str(self._listen_port)
            commands.append(("wg", "set", name, "listen-port", port, "private-key", str(self._key_file)))
        if changes.mtu:
            commands.append(("ip", "link", "set", name, "mtu", str(changes.mtu)))
        if changes.address:
            commands.append(("ip", "address", "flush", "dev", name))
            commands.append(("ip", "address", "replace", f"{changes.address}/32", "dev", name))
            commands.append(("ip", "link", "set", name, "up"))
        for route in changes.remove_routes:
            commands.append(("ip", "route", "del", route.destination, "proto", ROUTE_PROTOCOL))
        for key in changes.remove_peers:
            commands.append(("wg", "set", name, "peer", key, "remove"))
        for peer in changes.set_peers:
            allowed, keepalive = ",".join(peer.allowed), str(KEEPALIVE_S)
            place = ("endpoint", peer.endpoint, "allowed-ips", allowed, "persistent-keepalive", keepalive)
            commands.append(("wg", "set", name, "peer", peer.public_key, *place))
        for route in changes.set_routes:
            way = ("via", route.via) if route.via else ("dev", name)
            commands.append(("ip", "route", "replace", route.destination, *way, "proto", ROUTE_PROTOCOL))
        return commands

    async def _create(self) -> None:
        if await self._interface() is not None:
            return
        try:
            await run("ip", "link", "add", self.interface, "type", "wireguard")
        except Unavailable as error:
            log.info("mesh.wireguard_in_user_space", interface=self.interface, kernel=error.message)
            await run("wireguard-go", self.interface)

    async def _interface(self) -> dict[str, Any] | None:
        found = _json(await run("ip", "-j", "address", "show"))
        return next((i for i in found if i.get("ifname") == self.interface), None)

    async def _enable_ipv6(self) -> None:
        """Let IPv6 through the interface and between interfaces, as an engine in a container does not.

        A kernel that forwards takes routes from routers no more unless told so: where a default route
        came from one, it goes on coming.
        """
        if FORWARDING_IPV6.read_text().strip() != "1":
            learned = ("route", "show", "default", "proto", "ra")
            for route in _json(await run("ip", "-6", "-j", *learned)):
                (IPV6 / route["dev"] / "accept_ra").write_text("2")
            FORWARDING_IPV6.write_text("1")
        (IPV6 / self.interface / "disable_ipv6").write_text("0")

    async def _routes(self) -> list[Route]:
        families = ("-4", "-6") if IPV6.exists() else ("-4",)
        shown = [await run("ip", f, "-j", "route", "show", "proto", ROUTE_PROTOCOL) for f in families]
        return [self._route(route) for text in shown for route in _json(text)]

    def _route(self, found: dict[str, Any]) -> Route:
        destination = found["dst"] if "/" in found["dst"] else f"{found['dst']}/32"
        elsewhere = "" if found.get("dev") == self.interface else found.get("dev", "")
        return Route(destination=destination, via=found.get("gateway", elsewhere))


def _json(text: str) -> list[dict[str, Any]]:
    return msgspec.json.decode(text or "[]", type=list[dict[str, Any]])


def _is_ipv6(destination: str) -> bool:
    return ":" in destination


def _peer(line: str) -> Peer:
    """One line of `wg show IF dump`."""
    key, _, endpoint, allowed, *_ = line.split("\t")
    networks = () if allowed == "(none)" else tuple(sorted(allowed.split(",")))
    return Peer(public_key=key, endpoint=endpoint, allowed=networks)
