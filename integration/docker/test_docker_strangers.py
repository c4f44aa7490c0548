"""Who is not of the cluster gets nothing but the edge; a fourth host joins, serves, and is put out."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from flyd.cluster.containers import CAPABILITIES, HOST_IMAGE
from flyd.cluster.layout import API_PORT, ETCD_CLIENT_PORT, ETCD_PEER_PORT, HTTP_PORT
from integration.cluster import REGIONS, wait_for
from integration.docker.conftest import World
from integration.docker.hosts import BASE, Hosts, bare_container, inside

pytestmark = pytest.mark.timeout(600)

REFUSED = 5
STRANGER_ADDRESS, NEWCOMER_ADDRESS = f"10.{BASE}.0.77", f"10.{BASE}.0.44"
NEWCOMER, NEW_REGION = "fra-1", "fra"
SCRIPT = Path(__file__).parent / "stranger.py"
FLY = str(Path(sys.executable).parent / "fly")


def _listening(hosts: Hosts, region: str) -> list[int]:
    """Every TCP port that anything in the host listens on, wherever it is bound."""
    shown = hosts.run(region, "ss", "-ltnH")
    return sorted({int(port) for port in re.findall(r":(\d+)\s+\S+:\*", shown)})


def test_only_the_edge_answers_a_stranger(world: World) -> None:
    """At the hosts' own addresses, and at those of the private network, to which it makes itself a route."""
    hosts = world.hosts
    everywhere = {region: _listening(hosts, region) for region in REGIONS}
    for ports in everywhere.values():
        assert {API_PORT, ETCD_CLIENT_PORT, ETCD_PEER_PORT, HTTP_PORT} <= set(ports)
    private = {m["private_ip"]: [5432, 8080] for m in hosts.machines("").values()}
    with bare_container(
        *(hosts, "stranger", STRANGER_ADDRESS, "--cap-add", "NET_ADMIN"),
        *("--entrypoint", "sleep", f"{HOST_IMAGE}:latest", "infinity"),
    ) as stranger:
        for region in REGIONS:
            subnet = hosts.private(region).rpartition(".0.")[0] + ".0.0/16"
            routed = inside(stranger, "ip", "route", "add", subnet, "via", hosts.public(region))
            assert routed.returncode == 0, routed.stderr
        doors = private
        for region, ports in everywhere.items():
            doors = {**doors, hosts.public(region): ports, hosts.private(region): ports}
        ran = inside(stranger, sys.executable, str(SCRIPT), stdin=json.dumps(doors))
        assert ran.returncode == 0, ran.stderr
        answered = json.loads(ran.stdout)
        print(f"{sum(map(len, doors.values()))} doors tried, these answered: {answered}")
        assert {(address, port) for address, port, *_ in answered} == {
            (hosts.public(region), HTTP_PORT) for region in REGIONS
        }


def test_a_fourth_host_joins_and_is_put_out(world: World) -> None:
    hosts = world.hosts
    token = hosts.fly("hosts", "token", "--ttl", "10m").out.strip()
    join = (FLY, "hosts", "join", "--token", token, "--region", NEW_REGION, "--address", NEWCOMER_ADDRESS)
    with bare_container(
        *(hosts, NEWCOMER, NEWCOMER_ADDRESS, "--device", "/dev/net/tun"),
        *(word for capability in CAPABILITIES for word in ("--cap-add", capability)),
        *("--security-opt", "seccomp=unconfined", "--security-opt", "apparmor=unconfined"),
        *("--volume", "/var/lib/docker", "--volume", "/var/lib/flyd"),
        *("--env", f"FLYD_PYTHON={sys.executable}", "--env", f"HOST_NAME={NEWCOMER}", f"{HOST_IMAGE}:latest"),
    ) as newcomer:
        joined = inside(newcomer, *join)
        assert joined.returncode == 0, joined.stderr
        wait_for(lambda: _state(hosts) == "up", "the fourth host is up")  # its init starts flyd
        again = inside(newcomer, *join, "--data-dir", "/tmp/other", "--name", "fra-2")
        assert again.returncode == REFUSED
        assert f"used already, by {NEWCOMER}" in again.stderr

        target = hosts.machines("chat")["ams"]["private_ip"]
        reached = "import socket,sys; socket.create_connection((sys.argv[1], 8080), timeout=2)"
        wait_for(
            lambda: inside(newcomer, sys.executable, "-c", reached, target).returncode == 0,
            "the mesh reaches the newcomer",
        )
        hosts.fly("hosts", "expel", NEWCOMER)
        wait_for(
            lambda: inside(newcomer, sys.executable, "-c", reached, target).returncode != 0,
            "the mesh is closed to it",
        )
        wait_for(
            lambda: (
                f"host {NEWCOMER} was expelled" in inside(newcomer, "cat", "/var/log/flyd/flyd.log").stdout
            ),
            "its flyd says why it ended",
        )
        edge = "import urllib.request,sys; urllib.request.urlopen(sys.argv[1], timeout=2)"
        url = f"http://{hosts.edges()['ams']}/"
        assert inside(newcomer, sys.executable, "-c", edge, url).returncode != 0  # not even the edge
        assert _state(hosts) == ""

        token = hosts.fly("hosts", "token", "--ttl", "10m").out.strip()
        back = inside(newcomer, *(token if word == join[4] else word for word in join))
        assert back.returncode == 0, back.stderr
        wait_for(lambda: _state(hosts) == "up", "it is a host again")
        hosts.fly("hosts", "expel", NEWCOMER)


def _state(hosts: Hosts) -> str:
    listed = hosts.fly("hosts", "list", "--json").json()
    return next((str(host["state"]) for host in listed if host["name"] == NEWCOMER), "")
