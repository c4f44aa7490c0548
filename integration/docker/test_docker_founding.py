"""A cluster founded on a machine of one's own, from the archive that `fly hosts found` writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flyd.cluster.containers import CAPABILITIES, HOST_IMAGE
from integration.cluster import Fly, wait_for
from integration.docker.conftest import World
from integration.docker.hosts import BASE, bare_container, inside

pytestmark = pytest.mark.timeout(600)

ADDRESS = f"10.{BASE}.0.90"
UNITS = "/etc/systemd/system"


def start(container: str, unit: str) -> None:
    """Do what systemd would: run the unit's command."""
    shown = inside(container, "sed", "-n", "s/^ExecStart=//p", f"{UNITS}/{unit}.service")
    assert shown.returncode == 0, shown.stderr
    programs = Path(sys.executable).parent
    command = f"PATH={programs}:$PATH exec {shown.stdout.strip()} >/var/log/{unit}.log 2>&1"
    subprocess.run(["docker", "exec", "--detach", container, "sh", "-c", command], check=True)


def test_an_archive_makes_a_bare_machine_the_first_host(world: World, tmp_path: Path) -> None:
    fly = Fly(tmp_path)
    fly(*("hosts", "found", "solo", f"ams-1=ams@{ADDRESS}"), *("--driver", "process", "--out", str(tmp_path)))
    with bare_container(
        *(world.hosts, "solo", ADDRESS, "--entrypoint", "sleep"),
        *(word for capability in CAPABILITIES for word in ("--cap-add", capability)),
        *(f"{HOST_IMAGE}:latest", "infinity"),
    ) as machine:
        subprocess.run(["docker", "cp", tmp_path / "flyd-ams-1.tar", f"{machine}:/root/"], check=True)
        unpacked = inside(machine, "tar", "-C", "/", "-xf", "/root/flyd-ams-1.tar")
        assert unpacked.returncode == 0, unpacked.stderr
        assert inside(machine, "stat", "-c", "%a", "/var/lib/flyd/identity/key.pem").stdout.strip() == "600"
        start(machine, "etcd")
        start(machine, "flyd")
        listed = wait_for(lambda: fly.run("hosts", "list", "--json"), "an answer")
        wait_for(lambda: fly.run("hosts", "list", "--json").code == 0, "the host is up, and knows its user")
        (host,) = fly("hosts", "list", "--json").json()
        assert (host["name"], host["state"]) == ("ams-1", "up"), listed
        assert host["cpus"] > 0  # measured: the archive does not say
        assert host["memory_mb"] > 0
        assert fly("hosts", "token").out.startswith("flyd1.")
        gone = inside(machine, "test", "-e", "/var/lib/flyd/identity/founding.json")
        assert gone.returncode == 1, "the founding is still on the disk"
