"""The replay command: python -m tests.simulation --world postgres --seed 7 --trace.

And the soak: python -m tests.simulation --world machines --seeds 2000 --minutes 5 --jobs 2
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from functools import partial
from typing import NamedTuple, cast

from tests.simulation.runner import WORLDS, replay_command, run_world

PROGRESS_EVERY_S = 60.0


class Ran(NamedTuple):
    """One seed's run, as another process can tell it."""

    seed: int
    failures: tuple[str, ...]
    simulated_s: float
    cpu_s: float
    counted: Counter[str]


def run_one(world: str, minutes: float | None, seed: int) -> Ran:
    """One run, without its trace."""
    began_s = time.process_time()
    finished = run_world(world, seed, minutes * 60 if minutes else None)
    result: object = finished.result
    counted = cast("Counter[str]", result) if isinstance(result, Counter) else Counter[str]()
    return Ran(seed, finished.failures, finished.simulated_s, time.process_time() - began_s, counted)


def run_many(world: str, minutes: float | None, seeds: range, jobs: int) -> int:
    """Run all seeds; how many failed. Prints what it cost."""
    began_s = told_s = time.monotonic()
    cpu_s = simulated_s = 0.0
    done = failed = 0
    counted: Counter[str] = Counter()
    with multiprocessing.Pool(jobs) as pool:
        for ran in pool.imap_unordered(partial(run_one, world, minutes), seeds):
            done += 1
            cpu_s += ran.cpu_s
            simulated_s += ran.simulated_s
            counted += ran.counted
            if ran.failures:
                failed += 1
                print(f"seed {ran.seed} failed:", *ran.failures, sep="\n", file=sys.stderr)
                print(f"again: {replay_command(world, ran.seed, minutes)}", file=sys.stderr, flush=True)
            if time.monotonic() - told_s > PROGRESS_EVERY_S:
                told_s = time.monotonic()
                print(f"{done} of {len(seeds)} seeds, {failed} failed", file=sys.stderr, flush=True)
    print(
        f"{world}: {done} seeds, {failed} failed; {simulated_s / 60:.0f} simulated minutes "
        f"({simulated_s / 60 / done:.1f} each) in {time.monotonic() - began_s:.0f} s, "
        f"{cpu_s:.0f} s of CPU, {jobs} at once"
    )
    if counted:
        print(", ".join(f"{number} {what}" for what, number in sorted(counted.items())))
    return failed


def show_one(world: str, minutes: float | None, seed: int, trace: bool) -> int:
    """Run one seed and show it; 1 if it failed."""
    finished = run_world(world, seed, minutes * 60 if minutes else None)
    if trace:
        print(*finished.trace, sep="\n")
    if finished.failures:
        print(f"seed {seed} failed:", *finished.failures, sep="\n", file=sys.stderr)
        print(f"again: {replay_command(world, seed, minutes)}", file=sys.stderr)
        return 1
    print(f"seed {seed}: {finished.result}; {finished.signature}")
    return 0


def main() -> int:
    """Run the seeds; exit 1 if any run failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--world", choices=sorted(WORLDS), required=True)
    parser.add_argument("--seed", type=int, help="this one, and say how it ended")
    parser.add_argument("--seeds", metavar="N|A..B", help="every seed from 1 to N, or from A to B")
    parser.add_argument("--minutes", type=float, help="simulated minutes of faults; default: the world's own")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at once")
    parser.add_argument("--trace", action="store_true", help="print every event (of one seed)")
    arguments = parser.parse_args()
    if (arguments.seed is None) == (arguments.seeds is None):
        parser.error("give either --seed N or --seeds N|A..B")
    if arguments.seed is not None:
        return show_one(arguments.world, arguments.minutes, arguments.seed, arguments.trace)
    first, _, last = arguments.seeds.rpartition("..")
    seeds = range(int(first or 1), int(last) + 1)
    return 1 if run_many(arguments.world, arguments.minutes, seeds, arguments.jobs) else 0


if __name__ == "__main__":
    sys.exit(main())
