"""The private network between two real hosts: network namespaces with machines behind them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import dns.rcode
import msgspec
import pytest

from flyd.model import Membership, encode
from flyd.network.addresses import address6, bridge, mac
from flyd.network.mesh_plan import MeshMode
from flyd.store import keys
from tests.support.mesh_site import (
    ADDRESSES,
    API_PORT,
    ENDPOINT_PORT,
    HEALED_S,
    HOSTS,
    OTHER_PORT,
    STRANGER,
    Site,
    records,
    within,
)
from tests.support.netns import ECHO_PORT, UNDERLAY, net, python, why_not

PAYLOAD = "the-quick-brown-fox-of-flyd"

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
LISTEN = """
    import socket, sys
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("0.0.0.0", int(sys.argv[1])))
        print("ready", flush=True)
        print(s.recv(1500).decode(), flush=True)
"""
SAY = """
    import socket, sys
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind((sys.argv[1], 0))
        s.sendto(sys.argv[4].encode(), (sys.argv[2], int(sys.argv[3])))
"""
HOLD = """
    import socket, sys
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), 1) as s:
        for line in sys.stdin:
            try:
                s.sendall(line.encode())
                s.recv(100)
                print("answered", flush=True)
            except TimeoutError:
                print("silence", flush=True)
"""


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


def test_networks_are_apart_in_ipv6(site: Site) -> None:
    if site.mode is MeshMode.WIREGUARD:
        within(HEALED_S, lambda: site.reaches6("a1", "b1") and site.reaches6("b2", "a2"))
    assert site.reaches6("a1", "a3")
    for source, target in (("a1", "a2"), ("a2", "a1"), ("a1", "b2"), ("b2", "a1")):
        assert not site.reaches6(source, target), f"{source} reaches {target}"


def test_no_way_leads_around_networks_on_one_bridge(site: Site) -> None:
    """By addresses that machines give themselves, or by what goes to all at once."""
    within(HEALED_S, lambda: not site.reaches6("a1", "a2"))
    link_local = site.link_local("a2")
    site.net.run(
        "a1", "ip", "-6", "neighbour", "replace", link_local, "dev", "eth0", "lladdr", mac(ADDRESSES["a2"])
    )
    assert not site.net.connect("a1", f"{link_local}%eth0")
    assert site.net.connect("a", f"{link_local}%{bridge('a')}")  # it listens there
    listening = site.net.start("a2", *python(LISTEN, str(OTHER_PORT)))
    assert listening.stdout is not None
    assert listening.stdout.readline() == "ready\n"
    site.net.ip("a1", "route", "replace", "224.0.0.0/4", "dev", "eth0")
    for source, to in (("a1", "224.0.0.1"), ("a", ADDRESSES["a2"])):
        own = ADDRESSES.get(source, "10.11.0.1")
        assert site.net.run(source, *python(SAY, own, to, str(OTHER_PORT), source)).returncode == 0
    assert listening.stdout.readline() == "a\n"  # a1 spoke first


def test_a_default_route_that_a_router_told_is_told_again(site: Site) -> None:
    """A kernel that forwards IPv6 does not listen to routers, unless it is told to."""
    if site.mode is not MeshMode.WIREGUARD:
        pytest.skip("routes mode forwards no IPv6")
    within(HEALED_S, lambda: site.sysctl("a", "net.ipv6.conf.all.forwarding") == "1")
    assert site.sysctl("a", "net.ipv6.conf.eth0.accept_ra") == "2"
    assert site.sysctl("a", f"net.ipv6.conf.{bridge('a')}.accept_ra") == "1"  # machines are no routers


def test_a_stranger_gets_nothing_by_ipv6(site: Site) -> None:
    for name, number in (("a", HOSTS["a"]), ("x", STRANGER)):
        site.net.ip(name, "address", "replace", f"2001:db8::{number}/64", "dev", "eth0", "nodad")
    site.net.ip("x", "route", "replace", "fdaa::/16", "via", f"2001:db8::{HOSTS['a']}")
    within(HEALED_S, lambda: bool(site.net.connect("x", f"2001:db8::{HOSTS['a']}", port=OTHER_PORT)))
    for address, port in ((ADDRESSES["a1"], ECHO_PORT), ("10.11.0.1", OTHER_PORT)):
        assert site.net.connect("a", address6(address), port=port)  # it listens
        assert not site.net.connect("x", address6(address), port=port)


def test_names_follow_networks(site: Site) -> None:
    chat, secret = site.ask("a1", "chat.internal"), site.ask("a1", "secret.internal")
    assert chat is not None
    assert secret is not None
    assert records(chat) == ["10.11.0.2", "10.11.0.4", "10.12.0.2"]
    assert secret.rcode() == dns.rcode.NXDOMAIN
    six = site.ask("a1", "chat.internal", kind="AAAA")
    assert six is not None
    assert records(six) == (list(map(address6, records(chat))) if site.mode is MeshMode.WIREGUARD else [])


def test_an_endpoint_is_open_to_its_network_and_to_hosts(site: Site) -> None:
    within(HEALED_S, lambda: bool(site.net.connect("a1", site.address("a"), port=ENDPOINT_PORT)))
    for source in ("b1", "a", "b"):
        assert site.net.connect(source, site.address("a"), port=ENDPOINT_PORT), source
    for source in ("a2", "b2", "x"):
        assert not site.net.connect(source, site.address("a"), port=ENDPOINT_PORT), source


def test_a_stranger_on_the_hosts_network_gets_nothing(site: Site) -> None:
    for number in HOSTS.values():
        site.net.ip("x", "route", "replace", f"10.1{number}.0.0/16", "via", f"{UNDERLAY}.{number}")
    assert not site.net.connect("x", ADDRESSES["a1"])
    assert not site.net.connect("x", "10.11.0.1", port=OTHER_PORT)
    assert site.net.connect("b", "10.11.0.1", port=OTHER_PORT)
    assert site.net.connect("x", f"{UNDERLAY}.1", port=OTHER_PORT)  # it listens, and x has a way
    assert site.ask("x", "chat.internal") is None
    assert site.ask("a1", "chat.internal") is not None


def test_a_stranger_with_a_machines_address_gets_nothing(site: Site) -> None:
    if site.mode is not MeshMode.WIREGUARD:
        pytest.skip("routes mode is for networks that are private already")
    listening = site.net.start("a1", *python(LISTEN, str(OTHER_PORT)))
    assert listening.stdout is not None
    assert listening.stdout.readline() == "ready\n"
    site.net.ip("x", "address", "replace", f"{ADDRESSES['b1']}/32", "dev", "lo")
    site.net.ip("x", "route", "replace", "10.11.0.0/16", "via", f"{UNDERLAY}.1")
    for source in ("x", "b1"):
        said = (ADDRESSES["b1"], ADDRESSES["a1"], str(OTHER_PORT), source)
        assert site.net.run(source, *python(SAY, *said)).returncode == 0
    assert listening.stdout.readline() == "b1\n"  # x spoke first


def test_an_expelled_host_is_cut_off_in_the_middle_of_a_connection(site: Site) -> None:
    within(HEALED_S, lambda: site.reaches("a1", "b1"))
    held = {p: site.net.start("b", *python(HOLD, f"{UNDERLAY}.1", str(p))) for p in (OTHER_PORT, API_PORT)}

    def answered(port: int) -> bool:
        stdin, stdout = held[port].stdin, held[port].stdout
        assert stdin is not None
        assert stdout is not None
        print("hello", file=stdin, flush=True)
        return stdout.readline() == "answered\n"

    assert all(map(answered, held))
    stay = Membership(
        host="b",
        id="1",
        public_key="",
        addresses=(f"{UNDERLAY}.{HOSTS['b']}", site.address("b")),
        subnet="10.12",
        joined_at_s=1.0,
    )
    site.put(keys.membership("b"), encode(msgspec.structs.replace(stay, expelled_at_s=2.0)))
    within(HEALED_S, lambda: not answered(OTHER_PORT))
    assert not answered(API_PORT)
    assert not site.reaches("b1", "a1")
    assert not site.net.connect("b", f"{UNDERLAY}.1", port=OTHER_PORT)
    assert site.net.connect("b", f"{UNDERLAY}.1", port=API_PORT)  # to be told why, or to join again
    named = site.ask("a1", "chat.internal")
    assert named is not None
    assert records(named) == ["10.11.0.2", "10.11.0.4"]
    site.put(keys.membership("b"), encode(stay))  # it has joined again
    within(HEALED_S, lambda: site.reaches("a1", "b1"))
    assert site.net.connect("b", f"{UNDERLAY}.1", port=OTHER_PORT)


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
    """What `docker network disconnect` and `connect` do: the interface goes, and its routes with it;
    the new one has another name."""
    site.net.ip("b", "link", "del", "eth0")
    assert not site.reaches("a1", "b1")
    site.net.plug("b", HOSTS["b"], "eth1")
    took_s = within(HEALED_S, lambda: site.reaches("a1", "b1"))
    print(f"mesh ({site.mode}): healed {took_s:.2f} s after the reconnect")
    assert site.reaches("b1", "a1")


def test_what_a_clumsy_hand_removes_comes_back(site: Site) -> None:
    site.net.ip("a", "route", "del", "10.12.0.0/16")
    within(HEALED_S, lambda: site.reaches("a1", "b1"))
    if site.mode is MeshMode.WIREGUARD:
        site.net.run("a", "sysctl", "-qw", f"net.ipv6.conf.{site.interface('a')}.disable_ipv6=1")
        within(HEALED_S, lambda: site.reaches6("a1", "b1"))
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
        assert site.reaches6("a1", "b1", "x" * 60_000)
        shown = site.net.run("b", "ip", "-j", "link", "show", "dev", site.interface("b")).stdout
        assert json.loads(shown)[0]["mtu"] == 1420
