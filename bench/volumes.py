"""Volumes on btrfs: what snapshots and forks cost as the volume grows, and a volume its machine.

    python bench/volumes.py        (root, btrfs-progs; 16 GB free below /tmp)

A pool in a file of its own, gone at the end with its mount and loop device. A volume is filled with 1 GB,
then to 5 GB, of random data; each time its snapshot and its fork are made 15 times through the volume
store, as flyd does it. Then `dd ... conv=fsync` writes 256 MB in turn into the volume seen from inside a
machine (a mount of its own in a mount namespace, as a container sees it) and into the same directory
on the host, 15 pairs after one that warms up, who is first changing with each. Exit code 1 if a 5 GB
snapshot or fork takes over 200 ms (median), the cost grows more than 1.5 times from 1 to 5 GB, or the
throughput in the machine is under 0.95 of the host's (median of the pairs' ratios).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Generator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import support
from volumes.btrfs import BtrfsVolumes
from volumes.pool import close_pool, open_pool, why_none

POOL_GB = 14
SIZES_GB = (1, 5)
TIMES = 15
PAIRS = 15
DD_MB = 256
MAX_MS = 200.0
MAX_GROWTH = 1.5
MIN_THROUGHPUT = 0.95


@contextmanager
def pool() -> Generator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="flyd-bench-volumes-"))
    at = folder / "pool"
    try:
        open_pool(at, folder / "pool.btrfs", POOL_GB)
        yield at
    finally:
        close_pool(at)
        shutil.rmtree(folder)


def fill(data: Path, size_gb: int) -> None:
    """Have so much data in the volume, on disk."""
    with open(data / "data", "ab") as file:
        while file.tell() < (size_gb << 30) - (64 << 20):
            file.write(os.urandom(16 << 20))
        file.flush()
        os.fsync(file.fileno())
    os.sync()  # also what the pool's own file has not written yet


async def timed_ms(work: Awaitable[object]) -> float:
    began = time.perf_counter()
    await work
    return (time.perf_counter() - began) * 1000


async def measure_copies(store: BtrfsVolumes, size_gb: int) -> tuple[float, float]:
    """Medians of a snapshot and of a fork, in ms."""
    snapshots: list[float] = []
    forks: list[float] = []
    for number in range(TIMES):
        name = f"{size_gb}-{number}"
        snapshots.append(await timed_ms(store.snapshot("vol", f"s{name}", 1.0)))
        forks.append(await timed_ms(store.fork("vol", f"fork{name}", 6)))
    print(f"{size_gb} GB: snapshots {[round(v) for v in snapshots]} ms, forks {[round(v) for v in forks]} ms")
    return statistics.median(snapshots), statistics.median(forks)


def dd_s(folder: Path, *, inside: bool) -> float:
    """One write to disk, seconds by dd's own watch; `inside`: where the volume is seen as its own mount."""
    write = f"dd if=/dev/zero of=FOLDER/dd bs=1M count={DD_MB} conv=fsync"
    if inside:
        script = f"mount --bind {folder} /mnt && {write.replace('FOLDER', '/mnt')}"
        command = ["unshare", "--mount", "--pid", "--fork", "sh", "-c", script]
    else:
        command = ["sh", "-c", write.replace("FOLDER", str(folder))]
    env = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    (folder / "dd").unlink()
    os.sync()  # the next begins with nothing of this one left to write
    return float(done.stderr.rpartition("copied, ")[2].split()[0])


def measure_throughput(folder: Path) -> list[float]:
    """The host's time over the machine's, of each pair: 1 means that a volume costs nothing."""
    ratios: list[float] = []
    for pair in range(PAIRS + 1):
        order = (True, False) if pair % 2 else (False, True)
        took_s = {inside: dd_s(folder, inside=inside) for inside in order}
        if pair:
            ratios.append(took_s[False] / took_s[True])
            print(f"dd of {DD_MB} MB: host {took_s[False]:.2f} s, machine {took_s[True]:.2f} s")
    return ratios


async def measure(at: Path) -> dict[str, float]:
    store = BtrfsVolumes(at / "volumes")
    await store.create("vol", 6)
    data = Path(await store.attach("vol", "m1", 1))
    results: dict[str, float] = {}
    for size_gb in SIZES_GB:
        fill(data, size_gb)
        snapshot_ms, fork_ms = await measure_copies(store, size_gb)
        results |= {f"snapshot_{size_gb}gb_ms": snapshot_ms, f"fork_{size_gb}gb_ms": fork_ms}
    results["snapshot_growth"] = results["snapshot_5gb_ms"] / results["snapshot_1gb_ms"]
    results["fork_growth"] = results["fork_5gb_ms"] / results["fork_1gb_ms"]
    await store.create("dd", 2)
    results["throughput"] = statistics.median(measure_throughput(Path(await store.attach("dd", "m2", 1))))
    return results


def main() -> None:
    if reason := why_none():
        sys.exit(f"no pool can be made here: {reason}")
    with pool() as at:
        results = asyncio.run(measure(at))
    ok = (
        max(results["snapshot_5gb_ms"], results["fork_5gb_ms"]) <= MAX_MS
        and max(results["snapshot_growth"], results["fork_growth"]) <= MAX_GROWTH
        and results["throughput"] >= MIN_THROUGHPUT
    )
    support.report("volumes", {name: round(value, 3) for name, value in results.items()}, pool_gb=POOL_GB)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
