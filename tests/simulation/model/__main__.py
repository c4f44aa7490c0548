"""The soak: python -m tests.simulation.model (minutes); and one exploration of your own bounds.

python -m tests.simulation.model --rows 1 --renewals 1 --crashes 1 --losses 0 --last-epoch 3
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.simulation.model.explore import EVERY, explore
from tests.simulation.model.steps import Bounds

# Each to exhaustion; together about a quarter of an hour.
SOAK = (
    Bounds(rows=1, renewals=1, crashes=1, losses=0, last_epoch=3),
    Bounds(rows=1, renewals=1, crashes=0, losses=0, last_epoch=4),
    Bounds(rows=1, renewals=1, crashes=0, losses=1, last_epoch=3),
    Bounds(rows=2, renewals=0, crashes=0, losses=0, last_epoch=4),
    Bounds(rows=2, renewals=1, crashes=0, losses=0, last_epoch=3),
    Bounds(rows=1, renewals=0, crashes=1, losses=1, last_epoch=3),
    Bounds(rows=1, renewals=0, crashes=1, losses=0, last_epoch=4),
)


def main() -> int:
    """1 if a promise was broken."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation.model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in Bounds.__struct_fields__:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    failed = 0
    for bounds in (Bounds(**given),) if given else SOAK:
        began_s = time.monotonic()
        found = explore(bounds, EVERY)
        print(f"{bounds}: {found.told()}, {time.monotonic() - began_s:.0f} s", flush=True)
        failed += bool(found.broken)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
