"""The private network between two real hosts: network namespaces with machines behind them."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dns.message
import dns.rcode
import msgspec
import pytest

from flyd.model import App, Host, decode, encode
from flyd.network.mesh_plan import MeshMode
from flyd.store import keys
from tests.support import edge as values
from tests.support.netns import UNDERLAY, Net, net, python, why_not

PAYLOAD = "the-quick-brown-fox-of-flyd"
HEALED_S = 10
ADDRESSES = {"a1": "10.11.0.2", "a2": "10.11.0.3", "b1": "10.12.0.2", "b2": "10.12.0.3"}
HOSTS = {"a": 1, "b": 2}
STRANGER = 9

pytestmark = pytest.mark.timeout(180)

SNIFF = """
    import select, socket, sys, time
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    raw.bind((sys.argv[1], 0))
    print("ready", flush=True)
    seen = frames = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        if select.select([raw], [], [], 0.1)[0]:
            frame = raw.recv(65536)
            frames += 1
            seen += sys.argv[2].encode() in frame
    print(frames, seen, flush=True)
"""
ASK = """
    import socket, sys
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(float(sys.argv[3]))
        s.connect((sys.argv[1], 53))
        s.send(bytes.fromhex(sys.argv[2]))
        print(s.recv(1500).hex())
"""


class Site:
    """Two hosts, a and b; machines a1 and b1 are chat's, a2 and b2 are of a network apart."""

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
        assert self.net.run(host, "iptables", "-A", "FORWARD", "-i", "br0", "-o", "br0", "-j", "ACCEPT")

    def _start(self, name: str) -> Host:
        number = HOSTS[name]
        underlay = f"{UNDERLAY}.{number}"
        host = msgspec.structs.replace(
            values.host({"a": "ams", "b": "iad"}[name]),
            name=name,
            subnet=f"10.1{number}",
            address=f"10.1{number}.0.1" if self.mode is MeshMode.WIREGUARD else underlay,
            wg_endpoint=f"{underlay}:51820",
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
        assert key_file.stat().st_mode & 0o777 == 0o600
        return made

    def take_down(self) -> None:
        """wireguard-go outlives flyd: it ends with its interface."""
        for name in HOSTS:
            self.net.run(name, "ip", "link", "del", self.interface(name))

    def interface(self, name: str) -> str:
        return f"{self.net.name(name)[-12:]}w0"

    def _state(self, hosts: list[Host]) -> Iterator[tuple[str, bytes]]:
        apps = {"1": App(name="chat"), "2": App(name="secret", network="apart")}
        for app in apps.values():
            yield keys.app(app.name), encode(app)
        for machine_id, ip in ADDRESSES.items():
            app, host = apps[machine_id[1]].name, machine_id[0]
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

    def ask(self, source: str, name: str, *, timeout_s: float = 1) -> dns.message.Message | None:
        """What the DNS of host a says."""
        query = dns.message.make_query(name, "A").to_wire().hex()
        server = "10.11.0.1" if self.mode is MeshMode.WIREGUARD else f"{UNDERLAY}.1"
        out = self.net.run(source, *python(ASK, server, query, str(timeout_s))).stdout.strip()
        return dns.message.from_wire(bytes.fromhex(out)) if out else None


def within(timeout_s: float, condition: Callable[[], bool]) -> float:
    """Seconds until the condition held."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, "not in time"
        time.sleep(0.05)
    return time.monotonic() - began


@pytest.fixture(scope="module", params=list(MeshMode))
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with net() as network:
        made = Site(network, request.param, tmp_path_factory.mktemp("mesh"))
        try:
            made.build()
            yield made
        finally:
            made.take_down()


def test_machines_reach_each_other_under_their_own_addresses(site: Site) -> None:
    took_s = within(HEALED_S, lambda: site.reaches("a1", "b1"))
    print(f"mesh ({site.mode}): first connection after {took_s:.2f} s")
    assert site.reaches("b1", "a1")
    assert site.net.connect("a", ADDRESSES["b1"])  # a host's edge to a machine of another


def test_networks_are_apart(site: Site) -> None:
    within(HEALED_S, lambda: site.reaches("a2", "b2"))
    for source, target in (("a1", "a2"), ("a1", "b2"), ("b2", "a1"), ("a2", "a1")):
        assert not site.reaches(source, target), f"{source} reaches {target}"


def test_names_follow_networks(site: Site) -> None:
    chat, secret = site.ask("a1", "chat.internal"), site.ask("a1", "secret.internal")
    assert chat is not None
    assert secret is not None
    assert [r.rpartition(" ")[2] for r in chat.answer[0].to_text().splitlines()] == ["10.11.0.2", "10.12.0.2"]
    assert secret.rcode() == dns.rcode.NXDOMAIN


def test_a_stranger_on_the_hosts_network_gets_nothing(site: Site) -> None:
    for number in HOSTS.values():
        site.net.ip("x", "route", "replace", f"10.1{number}.0.0/16", "via", f"{UNDERLAY}.{number}")
    assert not site.net.connect("x", ADDRESSES["a1"])
    assert site.ask("x", "chat.internal") is None
    assert site.ask("a1", "chat.internal") is not None


def test_the_wire_shows_no_plain_text(site: Site) -> None:
    if site.mode is not MeshMode.WIREGUARD:
        pytest.skip("routes mode is for networks that are private already")
    sniffers = [site.net.start(*where, PAYLOAD) for where in _places()]
    for sniffer in sniffers:
        assert sniffer.stdout is not None
        assert sniffer.stdout.readline() == "ready\n"
    for _ in range(5):
        assert site.reaches("a1", "b1", PAYLOAD * 20)
    counts: list[tuple[int, int]] = []
    for sniffer in sniffers:
        out, _ = sniffer.communicate("end\n", timeout=10)
        frames, seen = map(int, out.split())
        counts.append((frames, seen))
    (_, behind), (frames, on_the_wire) = counts
    assert behind >= 5  # the sniffer can see
    assert frames >= 10
    assert on_the_wire == 0


def _places() -> list[tuple[str, ...]]:
    """Behind host a, and between the hosts."""
    program = python(SNIFF)
    return [("a", *program, "to-a1"), ("sw", *program, "to-b")]


def test_a_partition_heals_by_itself(site: Site) -> None:
    flyds = [f.pid for f in site.flyds.values()]
    site.net.ip("sw", "link", "set", "to-b", "down")
    assert not site.reaches("a1", "b1")
    time.sleep(3)  # longer than a handshake's retry would need
    site.net.ip("sw", "link", "set", "to-b", "up")
    took_s = within(HEALED_S, lambda: site.reaches("a1", "b1"))
    print(f"mesh ({site.mode}): healed {took_s:.2f} s after the link")
    assert [f.pid for f in site.flyds.values() if f.poll() is None] == flyds


def test_a_network_taken_away_and_given_back_restores_routes(site: Site) -> None:
    """What `docker network disconnect` and `connect` do: the interface goes, and its routes with it."""
    site.net.ip("b", "link", "del", "u0")
    assert not site.reaches("a1", "b1")
    site.net.plug("b", HOSTS["b"])
    took_s = within(HEALED_S, lambda: site.reaches("a1", "b1"))
    print(f"mesh ({site.mode}): healed {took_s:.2f} s after the reconnect")
    assert site.reaches("b1", "a1")


def test_what_a_clumsy_hand_removes_comes_back(site: Site) -> None:
    site.net.ip("a", "route", "del", "10.12.0.0/16")
    within(HEALED_S, lambda: site.reaches("a1", "b1"))
    assert site.net.run("a", "nft", "delete", "table", "bridge", "flyd").returncode == 0
    assert site.net.run("a", "nft", "delete", "table", "inet", "flyd").returncode == 0
    within(HEALED_S, lambda: not site.reaches("a1", "a2"))
    if site.mode is MeshMode.WIREGUARD:
        site.net.ip("a", "link", "del", site.interface("a"))
        within(HEALED_S, lambda: site.reaches("a1", "b1"))


def test_traffic_goes_on_without_flyd(site: Site) -> None:
    site.flyds["a"].kill()
    site.flyds["a"].wait()
    assert site.reaches("a1", "b1")
    assert site.reaches("b1", "a1")
    assert not site.reaches("a1", "a2")


def test_large_packets_pass(site: Site) -> None:
    assert site.reaches("a1", "b1", "x" * 60_000)
    if site.mode is MeshMode.WIREGUARD:
        shown = site.net.run("b", "ip", "-j", "link", "show", "dev", site.interface("b")).stdout
        assert json.loads(shown)[0]["mtu"] == 1420
