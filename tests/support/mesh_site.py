"""Two hosts with their private network in namespaces (netns.py), machines behind them, and a stranger."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dns.message
import msgspec

from flyd.model import App, AppKind, Host, decode, encode
from flyd.network.addresses import address6, bridge
from flyd.network.mesh_plan import MeshMode
from flyd.store import keys
from tests.support import edge as values
from tests.support.netns import UNDERLAY, Net, python

HEALED_S = 10
ADDRESSES = {
    "a1": "10.11.0.2",
    "a2": "10.11.0.3",
    "a3": "10.11.0.4",
    "b1": "10.12.0.2",
    "b2": "10.12.0.3",
}
APART = ("a2", "b2")
HOSTS = {"a": 1, "b": 2}
STRANGER = 9
ENDPOINT_PORT = 5432  # of an app of chat's network, on every host's own address
API_PORT = 4280
OTHER_PORT = 7001  # something else that listens on a host

ASK = """
    import socket, sys
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(float(sys.argv[3]))
        s.connect((sys.argv[1], 53))
        s.send(bytes.fromhex(sys.argv[2]))
        print(s.recv(1500).hex())
"""


class Site:
    """Two hosts, a and b; machines a1, a3 and b1 are chat's, a2 and b2 are of a network apart."""

    def __init__(self, network: Net, mode: MeshMode, folder: Path) -> None:
        self.net = network
        self.mode = mode
        self._folder = folder
        self.flyds: dict[str, subprocess.Popen[str]] = {}

    def build(self) -> None:
        self.net.switch()
        for name, number in HOSTS.items():
            self.net.host(name, number, f"10.1{number}")
            self._as_docker_leaves_it(name)
        self.net.namespace("x")
        self.net.plug("x", STRANGER)
        for machine, address in ADDRESSES.items():
            self.net.machine(machine, machine[0], address)
        for port in (ENDPOINT_PORT, OTHER_PORT, API_PORT):
            self.net.echo("a", port)
        hosts = [self._start(name) for name in HOSTS]
        for key, value in self._state(hosts):
            self.put(key, value)

    def _as_docker_leaves_it(self, host: str) -> None:
        for rule in (
            ("-N", "DOCKER-USER"),
            ("-A", "FORWARD", "-j", "DOCKER-USER"),
            ("-P", "FORWARD", "DROP"),
        ):
            assert self.net.run(host, "iptables", *rule).returncode == 0
        within = ("-i", bridge(host), "-o", bridge(host), "-j", "ACCEPT")
        assert self.net.run(host, "iptables", "-A", "FORWARD", *within).returncode == 0
        no_ipv6 = self.net.run(host, "sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
        assert no_ipv6.returncode == 0  # what a host that is a container finds
        self.net.ip(host, "route", "add", "default", "via", "fe80::1", "dev", "eth0", "proto", "ra")

    def address(self, host: str) -> str:
        """The host's own address on the private network."""
        number = HOSTS[host]
        return f"10.1{number}.0.1" if self.mode is MeshMode.WIREGUARD else f"{UNDERLAY}.{number}"

    def _start(self, name: str) -> Host:
        number = HOSTS[name]
        host = msgspec.structs.replace(
            values.host({"a": "ams", "b": "iad"}[name]),
            driver="docker",
            name=name,
            subnet=f"10.1{number}",
            address=self.address(name),
            api_address=f"{UNDERLAY}.{number}:{API_PORT}",
            wg_endpoint=f"{UNDERLAY}.{number}:51820" if self.mode is MeshMode.WIREGUARD else "",
        )
        key_file = self._folder / f"{name}.key"
        program = ("-m", "tests.support.mesh_process", self.interface(name), str(key_file), self.mode)
        flyd = self.net.start(name, python("")[0], *program)
        self.flyds[name] = flyd
        assert flyd.stdin is not None
        assert flyd.stdout is not None
        flyd.stdin.write(encode(host).decode() + "\n")
        flyd.stdin.flush()
        made = decode(flyd.stdout.readline().encode(), Host)
        if self.mode is MeshMode.WIREGUARD:
            assert key_file.stat().st_mode & 0o777 == 0o600
        return made

    def take_down(self) -> None:
        """wireguard-go outlives flyd: it ends with its interface, which flyd would make again."""
        for name, flyd in self.flyds.items():
            flyd.kill()
            flyd.wait()
            self.net.run(name, "ip", "link", "del", self.interface(name))

    def interface(self, name: str) -> str:
        return f"{self.net.name(name)[-12:]}w0"

    def _state(self, hosts: list[Host]) -> Iterator[tuple[str, bytes]]:
        apps = {"1": App(name="chat"), "2": App(name="secret", network="apart")}
        database = App(name="chat-db", kind=AppKind.POSTGRES, endpoint_port=ENDPOINT_PORT)
        yield keys.app(database.name), encode(database)
        for app in apps.values():
            yield keys.app(app.name), encode(app)
        for machine_id, ip in ADDRESSES.items():
            app, host = apps["2" if machine_id in APART else "1"].name, machine_id[0]
            region = {"a": "ams", "b": "iad"}[host]
            machine = msgspec.structs.replace(values.machine(machine_id, region, app=app, ip=ip), host=host)
            yield keys.machine(app, machine_id), encode(machine)
            yield keys.status(app, machine_id), encode(values.status(machine))
        for host in hosts:
            yield keys.host(host.name), encode(host)
            yield keys.alive(host.name), b"true"

    def put(self, key: str, value: bytes) -> None:
        for flyd in self.flyds.values():
            assert flyd.stdin is not None
            flyd.stdin.write(f"{key} {value.decode()}\n")
            flyd.stdin.flush()

    def reaches(self, source: str, target: str, payload: str = "hello") -> bool:
        """Whether a machine reaches another one, and is seen there under its own address."""
        seen = self.net.connect(source, ADDRESSES[target], payload)
        assert seen in ("", ADDRESSES[source])
        return bool(seen)

    def sysctl(self, host: str, name: str) -> str:
        """A setting of the host's kernel."""
        return self.net.run(host, "sysctl", "-n", name).stdout.strip()

    def link_local(self, machine: str) -> str:
        """The address that a machine gave itself."""
        shown = json.loads(self.net.run(machine, "ip", "-6", "-j", "address", "show", "dev", "eth0").stdout)
        return next(a["local"] for a in shown[0]["addr_info"] if a["scope"] == "link")

    def reaches6(self, source: str, target: str, payload: str = "hello") -> bool:
        """The same by IPv6."""
        seen = self.net.connect(source, address6(ADDRESSES[target]), payload)
        assert seen in ("", address6(ADDRESSES[source]))
        return bool(seen)

    def ask(
        self, source: str, name: str, *, kind: str = "A", timeout_s: float = 1
    ) -> dns.message.Message | None:
        """What the DNS of host a says."""
        query = dns.message.make_query(name, kind).to_wire().hex()
        out = self.net.run(source, *python(ASK, self.address("a"), query, str(timeout_s))).stdout.strip()
        return dns.message.from_wire(bytes.fromhex(out)) if out else None


def records(message: dns.message.Message) -> list[str]:
    return [line.rpartition(" ")[2] for rrset in message.answer for line in rrset.to_text().splitlines()]


def within(timeout_s: float, condition: Callable[[], bool]) -> float:
    """Seconds until the condition held."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, "not in time"
        time.sleep(0.05)
    return time.monotonic() - began
