"""Erlang nodes in two regions find each other by name and form a cluster over the mesh."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from integration.cluster import wait_for
from integration.docker.conftest import World
from integration.docker.hosts import Hosts

pytestmark = pytest.mark.timeout(600)

IMAGE = "flyd-erlang:bookworm"
RECIPE = """
FROM flyd-base:bookworm
RUN apt-get update -qq \\
 && apt-get install -y -qq --no-install-recommends erlang-base \\
 && rm -rf /var/lib/apt/lists/*
"""
REGIONS = ("ams", "sin")


@pytest.fixture
def erlang_image(world: World) -> None:
    """Debian's Erlang, made once a machine."""
    if subprocess.run(("docker", "image", "inspect", IMAGE), capture_output=True, check=False).returncode:
        build = ("docker", "build", "--network", "host", "--tag", IMAGE, "-")
        subprocess.run(build, input=RECIPE, text=True, check=True, capture_output=True)


@pytest.mark.usefixtures("erlang_image")
def test_erlang_nodes_cluster_over_the_mesh(world: World) -> None:
    hosts = world.hosts
    hosts.fly("apps", "create", "peers")
    try:
        hosts.fly("deploy", cwd=Path(__file__).parent / "erlang")
        _meet(hosts)
    finally:  # after a cut, OTP's `global` has two nodes talk without end: nothing for the tests to come
        hosts.fly("apps", "destroy", "peers", "--yes")


def _meet(hosts: Hosts) -> None:
    machines = hosts.machines("peers")
    assert set(machines) == set(REGIONS)
    node = {region: f"peer@{machine['private_ip']}" for region, machine in machines.items()}
    for here, there in (REGIONS, REGIONS[::-1]):
        wanted = [f"{node[there]} pong", f"connected {node[there]}"]
        wait_for(
            lambda here=here, wanted=wanted: hosts.get(here, "peers").text.splitlines() == wanted,
            f"the node in {here} says {wanted}",
        )
        print(f"\n{node[here]} in {here}: {', '.join(wanted)}")
