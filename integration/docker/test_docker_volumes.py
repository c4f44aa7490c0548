"""Volumes of hosts in containers: on btrfs, seen by the machine's own engine as what they are."""

from __future__ import annotations

import pytest

from integration.cluster import REGIONS, wait_for
from integration.docker.conftest import World
from volumes.pool import why_none

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(why_none()), reason=f"no btrfs: {why_none()}"),
]

FILL = (
    "import os\nfile = open('/data/fat', 'ab', buffering=0)\n"
    "try:\n while True: file.write(bytes(1 << 24)); os.fsync(file.fileno())\n"
    "except OSError as error: print(error.strerror)\nfinally: os.unlink('/data/fat')"
)


def test_a_container_meets_its_volumes_limit_and_its_copies_are_whole(world: World) -> None:
    hosts = world.hosts
    (volume,) = hosts.fly("volumes", "list", "--app", "notes", "--json").json()
    machine = hosts.machines("notes")[volume["region"]]
    filled = hosts.in_machine(machine, "python3", "-c", FILL)
    assert "Disk quota exceeded" in filled.stdout, filled.stderr
    kept = hosts.in_machine(machine, "sh", "-c", "echo one > /data/kept && sync /data/kept")
    assert kept.returncode == 0, kept.stderr
    forked = hosts.fly("volumes", "fork", volume["id"], "--name", "copied", "--app", "notes", "--json").json()
    data = f"/var/lib/flyd/volumes/{forked['id']}/data"
    assert hosts.run(volume["region"], "cat", f"{data}/kept") == "one\n"
    hosts.fly("volumes", "destroy", forked["id"], "--app", "notes", "--yes")


def test_a_volume_moves_to_another_host_with_its_container(world: World) -> None:
    hosts = world.hosts
    (volume,) = hosts.fly("volumes", "list", "--app", "notes", "--json").json()
    home, away = volume["host"], next(f"{r}-1" for r in REGIONS if f"{r}-1" != volume["host"])
    machine = hosts.machines("notes")[volume["region"]]
    hosts.in_machine(machine, "sh", "-c", "echo moved > /data/kept && sync /data/kept")
    for target in (away, home):
        ran = hosts.fly("volumes", "move", volume["id"], "--to", target, "--app", "notes", "--json").json()
        volume = ran["volume"]
        print(f"\nto {target}: {ran['moved_bytes']} bytes, {ran['downtime_s']:.2f} s without the machine")
        assert volume["host"] == target
        machine = hosts.machines("notes")[volume["region"]]
        assert hosts.in_machine(machine, "cat", "/data/kept").stdout == "moved\n"
        region = volume["region"]
        wait_for(lambda region=region: hosts.serves(region, "notes"), f"notes answers in {region}")
