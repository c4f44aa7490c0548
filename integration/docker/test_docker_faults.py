"""A host whose disk is full, and one whose link is slow: others do not suffer, and it recovers by itself."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from pathlib import Path

import httpx
import pytest

from integration.cluster import REGIONS, tiny_app, wait_for
from integration.docker.conftest import World
from integration.docker.hosts import PYTHON_IMAGE, Hosts

pytestmark = pytest.mark.timeout(600)

FULL, ELSEWHERE, SLOW = "sin", "iad", "iad"
RECOVERS_S = 60.0
KBIT = 8000  # less, and etcd, checks and replication on the same link suffer too
BODY_BYTES = 300_000
PATIENCE_S = 60.0  # other traffic shares the slow link
NEW_LAYER_BYTES = 8 << 20  # more than what is left anywhere on a full disk


@pytest.fixture(scope="module")
def hosts(world: World) -> Generator[Hosts]:
    """The cluster, with a small app in one region; whatever happens, no fault stays."""
    made = world.hosts
    yield made
    for verb, region in (("free-disk", FULL), ("fast-link", SLOW)):
        made.chaos(verb, region)


def app(hosts: Hosts, name: str, body: str) -> Path:
    """An app's folder; it answers with this body, and its image has a layer that no host has yet."""
    folder = tiny_app(hosts.folder(name), name, version=body)
    (folder / "Dockerfile").write_text(f"FROM {PYTHON_IMAGE}\nWORKDIR /app\nCOPY new.bin .\nCOPY app.py .\n")
    (folder / "new.bin").write_bytes(os.urandom(NEW_LAYER_BYTES))
    return folder


def flyd_pid(hosts: Hosts, region: str) -> str:
    return hosts.run(region, "pgrep", "-f", "flyd.daemon").split()[0]


def serves(hosts: Hosts, region: str, name: str, body: str) -> bool:
    return hosts.serves(region, name) and hosts.get(region, name).text == body


def test_a_full_disk(hosts: Hosts) -> None:
    hosts.put_primary("ams")
    fly = hosts.fly
    for name, region in (("there", ELSEWHERE), ("here", FULL)):
        fly("apps", "create", name, "--regions", region)
    fly("deploy", "--regions", FULL, cwd=app(hosts, "here", "one"))
    before = flyd_pid(hosts, FULL)
    told = fly("chaos", "fill-disk", "--name", hosts.name, FULL, "--json").json()
    assert told["free_mb"] == 0
    more = ("dd", "if=/dev/zero", "of=/var/lib/flyd/more", "bs=1M", "count=1")
    assert "No space left" in hosts.attempt(FULL, *more).stderr
    hosts.run(FULL, "rm", "/var/lib/flyd/more")

    fly("deploy", "--regions", ELSEWHERE, cwd=app(hosts, "there", "one"))
    wait_for(lambda: serves(hosts, ELSEWHERE, "there", "one"), "a deploy elsewhere works")
    ran = fly.run("deploy", "--regions", FULL, cwd=app(hosts, "here", "two"))
    assert ran.code == 1
    assert "No space left on device" in ran.err, ran.err
    log = hosts.run(FULL, "cat", "/var/log/flyd/flyd.log")
    assert "No space left on device" in log or "disk is full" in log
    assert flyd_pid(hosts, FULL) == before, log
    states = {h["region"]: h["state"] for h in fly("hosts", "list", "--json").json()}
    assert states == dict.fromkeys(REGIONS, "up")

    assert fly("chaos", "free-disk", "--name", hosts.name, FULL, "--json").json()["free_mb"] > 1000
    hosts.wait_replica(FULL)
    status = ("cluster", "status", "--name", hosts.name, "--json")
    wait_for(lambda: all(h["etcd_pid"] for h in fly(*status).json()), "etcd is complete", RECOVERS_S)
    fly("deploy", "--regions", FULL, cwd=app(hosts, "here", "three"))
    wait_for(lambda: serves(hosts, FULL, "here", "three"), "deploys there work again", RECOVERS_S)
    assert flyd_pid(hosts, FULL) == before
    for name in ("there", "here"):
        fly("apps", "destroy", name, "--yes")


def test_a_slow_link(hosts: Hosts) -> None:
    fly = hosts.fly
    fly("apps", "create", "large", "--regions", SLOW)
    folder = app(hosts, "large", "x" * BODY_BYTES)
    fly("deploy", "--regions", SLOW, cwd=folder)
    wait_for(lambda: serves(hosts, "ams", "large", "x" * BODY_BYTES), "it is served through ams")

    def fetch_s(letter: str) -> float:
        """How long ams takes to get it from there."""
        began = time.monotonic()
        url = f"http://{hosts.edges()['ams']}/"
        assert httpx.get(url, headers={"Host": "large"}, timeout=PATIENCE_S).text == letter * BODY_BYTES
        return time.monotonic() - began

    least_s = BODY_BYTES * 8 / 1000 / KBIT
    fast_s = min(fetch_s("x") for _ in range(5))  # without what else the machine does
    fly("chaos", "slow-link", "--name", hosts.name, SLOW, "--kbit", str(KBIT))
    fetch_s("x")  # a burst passes as before
    slow_s = fetch_s("x")
    print(f"\n{BODY_BYTES} bytes from {SLOW}: {fast_s:.2f} s, with {KBIT} kbit/s {slow_s:.2f} s")
    assert fast_s < least_s * 0.8 < slow_s

    began = time.monotonic()
    (folder / "app.py").write_text(
        (folder / "app.py").read_text().replace("x" * BODY_BYTES, "y" * BODY_BYTES)
    )
    fly("deploy", "--regions", SLOW, cwd=folder)
    print(f"a deploy over it: {time.monotonic() - began:.1f} s")
    assert {h["state"] for h in fly("hosts", "list", "--json").json()} == {"up"}

    fly("chaos", "fast-link", "--name", hosts.name, SLOW)
    wait_for(lambda: fetch_s("y") < least_s * 0.8, "it is as fast as before")
    fly("apps", "destroy", "large", "--yes")
