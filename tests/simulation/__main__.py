"""The replay command: python -m tests.simulation --world postgres --seed 7 --trace."""

from __future__ import annotations

import argparse
import sys
import time

from tests.simulation.runner import WORLDS, replay_command, run_world


def main() -> int:
    """Run the seeds; exit 1 if any run failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--world", choices=sorted(WORLDS), required=True)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--seeds", metavar="A..B", help="every seed from A to B")
    parser.add_argument("--trace", action="store_true", help="print every event")
    arguments = parser.parse_args()
    if (arguments.seed is None) == (arguments.seeds is None):
        parser.error("give either --seed N or --seeds A..B")
    first, last = (arguments.seed,) * 2 if arguments.seeds is None else map(int, arguments.seeds.split(".."))
    began, failed = time.process_time(), 0
    for seed in range(first, last + 1):
        finished = run_world(arguments.world, seed)
        if arguments.trace:
            print(*finished.trace, sep="\n")
        if finished.failures:
            failed += 1
            print(f"seed {seed} failed:", *finished.failures, sep="\n", file=sys.stderr)
            print(f"again: {replay_command(arguments.world, seed)}", file=sys.stderr)
        elif first == last:
            print(f"seed {seed}: {finished.result}; {finished.signature}")
    cpu_s = time.process_time() - began
    print(f"{last - first + 1} seeds, {failed} failed, {cpu_s:.1f} s of CPU", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
