"""What machines say to each other crosses the network between hosts encrypted only."""

from __future__ import annotations

import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from integration.cluster import tiny_app, wait_for
from integration.docker.conftest import World
from integration.docker.hosts import DATABASE, EXEC_TIMEOUT_S, PYTHON_IMAGE, Hosts

pytestmark = pytest.mark.timeout(600)

REFUSED = 5
HERE, THERE = "ams", "iad"
PAYLOAD = "a-secret-that-nobody-may-read-on-the-way"
REQUESTS = 20
MESH_PORT = 51820
ASK = f"""
import sys, urllib.request, urllib.error
for _ in range({REQUESTS}):
    try:
        urllib.request.urlopen(sys.argv[1], timeout=5)
    except urllib.error.HTTPError as error:
        assert b"{PAYLOAD}" in error.read()
"""


@contextmanager
def _captured(hosts: Hosts, region: str, interface: str, to: Path) -> Generator[Path]:
    """Everything on an interface of a host, in a file, for as long as the block runs."""
    tcpdump = (
        f"tcpdump -U --immediate-mode -i {interface} -w -"  # else it reads, and at its end drops, blocks
    )
    listen = f"{tcpdump} & pid=$!; cat >/dev/null; kill $pid; wait $pid"
    with to.open("wb") as file:
        command = hosts.command(region, "sh", "-c", listen)
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: to.stat().st_size > 0, f"tcpdump listens on {interface} in {region}")
        yield to
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(EXEC_TIMEOUT_S)


def _interface(hosts: Hosts, region: str, address: str) -> str:
    """The interface with this address; a host that was cut off and healed has another than before."""
    lines = hosts.run(region, "ip", "-o", "-4", "address").splitlines()
    return next(words[1] for line in lines if (words := line.split())[3].partition("/")[0] == address)


def test_no_plain_text_between_hosts(world: World) -> None:
    hosts = world.hosts
    machines = hosts.machines("chat")
    url = f"http://{machines[THERE]['private_ip']}:8080/api/messages?after={PAYLOAD}"
    outside = {region: _interface(hosts, region, hosts.public(region)) for region in (HERE, THERE)}
    inside = _interface(hosts, HERE, hosts.private(HERE))
    with (
        _captured(hosts, HERE, outside[HERE], hosts.home / "here.pcap") as here,
        _captured(hosts, THERE, outside[THERE], hosts.home / "there.pcap") as there,
        _captured(hosts, HERE, inside, hosts.home / "bridge.pcap") as bridge,
    ):
        asked = hosts.in_machine(machines[HERE], "python", "-c", ASK, url)
        assert asked.returncode == 0, asked.stderr
        # The control: inside the host each request and each answer can be read.
        wait_for(lambda: _payloads(bridge) >= 2 * REQUESTS, "the bridge's capture has the payload")
    seen = {file.stem: _payloads(file) for file in (here, there, bridge)}
    tunnelled = {file.stem: _mesh_packets(file) for file in (here, there)}
    print(f"\nthe payload is seen: {seen}; packets of the mesh: {tunnelled}; on {outside}")
    assert seen["here"] == seen["there"] == 0
    assert min(tunnelled.values()) >= 2 * REQUESTS, "the answers came another way than the captured one"


def _payloads(capture: Path) -> int:
    return capture.read_bytes().count(PAYLOAD.encode())


def _mesh_packets(capture: Path) -> int:
    """How many UDP packets from or to the mesh's port a classic pcap file has."""
    data = capture.read_bytes()
    order = "little" if data[:4] == b"\xd4\xc3\xb2\xa1" else "big"
    found, at = 0, 24
    while at + 16 <= len(data):
        length = int.from_bytes(data[at + 8 : at + 12], order)
        ip = data[at + 16 + 14 : at + 16 + length]
        if ip[9:10] == b"\x11":
            header = 4 * (ip[0] & 15)
            ports = {int.from_bytes(ip[header + i : header + i + 2], "big") for i in (0, 2)}
            found += MESH_PORT in ports
        at += 16 + length
    return found


def test_an_app_on_another_network_is_out_of_reach(world: World) -> None:
    """By address and by name; a database of the one network is not attached to an app of the other."""
    hosts = world.hosts
    hosts.fly("apps", "create", "apart", "--network", "other")
    refused = hosts.fly.refused(REFUSED, "postgres", "attach", DATABASE, "--app", "apart")
    assert "on network 'other'" in refused
    folder = tiny_app(hosts.folder("apart"), "apart")
    (folder / "Dockerfile").write_text(f"FROM {PYTHON_IMAGE}\nWORKDIR /app\nCOPY app.py .\n")
    hosts.fly("deploy", "--regions", ",".join((HERE, THERE)), cwd=folder)
    apart, others = hosts.machines("apart"), hosts.machines("far")

    def reaches(target: str, machine: dict[str, Any] = apart[HERE]) -> bool:
        ask = "import socket, sys; socket.create_connection((sys.argv[1], 8000), timeout=2)"
        return hosts.in_machine(machine, "python", "-c", ask, target).returncode == 0

    wait_for(lambda: reaches(apart[THERE]["private_ip"]), "its own machine in the other region")
    wait_for(lambda: reaches("apart.internal"), "its own name")
    neighbour = hosts.machines("chat")[HERE]
    for target in (others[THERE]["private_ip"], "far.internal"):
        assert reaches(target, neighbour)  # the control: it answers its own network
        assert not reaches(target)
    hosts.fly("apps", "destroy", "apart", "--yes")
