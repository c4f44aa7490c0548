"""A volume of 2 GB moves with its machine while it is written to: how long that stands, what is lost.

    python bench/volume_move.py    (root, btrfs-progs; 50 GB free below /tmp)

Three hosts of processes, each with a btrfs pool. An application has 2 GB of random data on its volume and
keeps a numbered line with each request, flushed before it answers. `fly volumes move` brings both to another
host; then every acknowledged line is looked for. Exit code 1 if one is missing, the machine stood for more
than 3 s, or more than 1.1 times what the volume holds was moved.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import support
from integration.volume_pools import APP, Pools
from volumes.pool import why_none

POOL_GB = 14
SIZE_GB = 4
PIECES, PIECE_MB = 32, 64
MAX_STOOD_S = 3.0
MAX_RATIO = 1.1


def measure(pools: Pools) -> dict[str, float]:
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


def main() -> None:
    if reason := why_none():
        sys.exit(f"no pool can be made here: {reason}")
    pools = Pools(POOL_GB)
    try:
        pools.deploy()
        results = measure(pools)
    finally:
        pools.destroy()
    support.report("volume_move", {name: round(value, 3) for name, value in results.items()}, pool_gb=POOL_GB)
    ok = results["stood_s"] <= MAX_STOOD_S and results["moved_ratio"] <= MAX_RATIO and not results["lost"]
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
