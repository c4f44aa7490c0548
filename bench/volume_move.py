"""A volume of 2 GB moves with its machine while it is written to: how long that stands, what is lost.

    python bench/volume_move.py                       (root, btrfs-progs; 50 GB free below /tmp)
    python bench/volume_move.py --provider docker     (a Docker engine; 30 GB free where it keeps volumes)

Three hosts, of processes or in containers, each with a btrfs pool. An application has 2 GB of random data on
its volume and keeps a numbered line with each request, flushed before it answers. `fly volumes move` brings
both to another host; then every acknowledged line is looked for. Exit code 1 if one is missing, the machine
stood for more than 3 s, or more than 1.1 times what the volume holds was moved.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import support
from integration.docker.hosts import Hosts, prepare_python_image
from integration.docker.volume_world import VolumeWorld
from integration.volume_pools import APP, Pools
from integration.volume_records import damaged, missing, recording
from volumes.pool import why_none

POOL_GB = 14
SIZE_GB = 4
DOCKER_BASE, DOCKER_POOL_GB, DOCKER_SIZE_GB = 231, 8, 3
PIECES, PIECE_MB = 32, 64
MAX_STOOD_S = 3.0
MAX_RATIO = 1.1


def measure_docker() -> dict[str, float]:
    """The same between two hosts in containers; records have checksums."""
    hosts = Hosts(DOCKER_POOL_GB, DOCKER_BASE)
    try:
        prepare_python_image()
        world = VolumeWorld(hosts, "ams")
        volume = world.volume()
        hosts.fly("volumes", "extend", volume["id"], "--size", str(DOCKER_SIZE_GB), "--app", APP)
        for _ in range(PIECES):
            if world.ask(f"/grow?mb={PIECE_MB}", timeout_s=60.0) != "ok":
                sys.exit("the volume could not be filled")
        with recording(world.keep) as records:
            began_s = time.monotonic()
            told = world.move("iad-1")
            took_s = time.monotonic() - began_s
        lines = world.lines(told["volume"])
        if broken := damaged(lines):
            sys.exit(f"damaged: {broken[:5]}")
        return {
            "stood_s": told["downtime_s"],
            "took_s": took_s,
            "moved_ratio": float(told["moved_bytes"]) / (PIECES * PIECE_MB << 20),
            "acknowledged": len(records.acked),
            "lost": len(missing(records, lines)),
        }
    finally:
        hosts.destroy()


def measure(pools: Pools) -> dict[str, float]:
    """Between two hosts of processes."""
    (volume,) = pools.volumes()
    pools.fly("volumes", "extend", volume["id"], "--size", str(SIZE_GB), "--app", APP)
    for _ in range(PIECES):
        if pools.ask(f"/grow?mb={PIECE_MB}") != "ok":
            sys.exit("the volume could not be filled")
    kept: list[str] = []
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            line = f"n{len(kept)}"
            if pools.ask(f"/keep?line={line}") == "ok" or pools.ask(f"/keep?line={line}", "iad") == "ok":
                kept.append(line)

    writer = threading.Thread(target=write)
    writer.start()
    began_s = time.monotonic()
    told = json.loads(pools.fly("volumes", "move", volume["id"], "--to", "iad-1", "--app", APP, "--json").out)
    took_s = time.monotonic() - began_s
    done.set()
    writer.join()
    there = frozenset(pools.ask("/lines", "iad").split())
    used_bytes = PIECES * PIECE_MB << 20
    return {
        "stood_s": told["downtime_s"],
        "took_s": took_s,
        "moved_ratio": float(told["moved_bytes"]) / used_bytes,
        "acknowledged": len(kept),
        "lost": sum(line not in there for line in kept),
    }


def measure_local() -> dict[str, float]:
    """In pools of this benchmark's own."""
    if reason := why_none():
        sys.exit(f"no pool can be made here: {reason}")
    pools = Pools(POOL_GB)
    try:
        pools.deploy()
        return measure(pools)
    finally:
        pools.destroy()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--provider", choices=("local", "docker"), default="local")
    provider = parser.parse_args().provider
    results = measure_docker() if provider == "docker" else measure_local()
    rounded = {name: round(value, 3) for name, value in results.items()}
    support.report("volume_move", rounded, provider=provider)
    ok = results["stood_s"] <= MAX_STOOD_S and results["moved_ratio"] <= MAX_RATIO and not results["lost"]
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
