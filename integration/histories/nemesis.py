"""Random faults, one after the other: each is healed, and what it hurt has recovered, before the next.

Which one, and upon whom, comes from a seed; when, from the cluster: nothing here waits for a time.
"""

from __future__ import annotations

import os
import random
import secrets
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from integration.histories.checker import Anomaly

OLD_PRIMARY_ANSWERS = ("cut off", "frozen")

Hurt = Callable[[], Awaitable[None]]
"""Does harm, heals it, and returns when all is as before."""


class Harm(NamedTuple):
    """A fault that was done, from its beginning until all was as before."""

    name: str
    began_ns: int
    ended_ns: int


@dataclass(frozen=True)
class Plan:
    """How long, and by which dice."""

    minutes: float
    seed: int

    @staticmethod
    def from_environment(default_minutes: float) -> Plan:
        """FLY_HISTORY_MINUTES and FLY_HISTORY_SEED; without a seed a new one, which is printed."""
        minutes = float(os.environ.get("FLY_HISTORY_MINUTES", default_minutes))
        seed = int(os.environ.get("FLY_HISTORY_SEED", secrets.randbelow(10**6)))
        print(f"\nFLY_HISTORY_SEED={seed} FLY_HISTORY_MINUTES={minutes:g}", flush=True)
        return Plan(minutes, seed)

    def chance(self) -> random.Random:
        """The dice, as if never thrown."""
        return random.Random(self.seed)


async def hurt(plan: Plan, faults: Mapping[str, Hurt], kinds: int) -> list[Harm]:
    """All faults in a random order, again and again, until the time is over and `kinds` kinds were done."""
    until_s = time.monotonic() + plan.minutes * 60
    chance = plan.chance()
    done: list[Harm] = []
    while True:
        for name in chance.sample(sorted(faults), len(faults)):
            if time.monotonic() > until_s and len(counted(done)) >= kinds:
                return done
            began_ns = time.monotonic_ns()
            print(f"  {name} ...", end="", flush=True)
            await faults[name]()
            done.append(Harm(name, began_ns, time.monotonic_ns()))
            print(f" {(done[-1].ended_ns - began_ns) / 1e9:.1f} s", flush=True)


def pauses(acked_ns: Sequence[int], done: list[Harm]) -> dict[str, float]:
    """By kind of fault the longest time in seconds between two acknowledgements, of which some was in it."""
    longest = {harm.name: 0.0 for harm in done}
    for harm in done:
        first = max(1, bisect_left(acked_ns, harm.began_ns))
        last = bisect_right(acked_ns, harm.ended_ns)
        for before, after in pairwise(acked_ns[first - 1 : last + 1]):
            longest[harm.name] = max(longest[harm.name], (after - before) / 1e9)
    return longest


def unexcused(anomalies: Iterable[Anomaly], done: list[Harm]) -> list[Anomaly]:
    """What no fault excuses. Only stale reads can be: where an old primary is cut off or frozen, the clients
    beside it may read from it for a moment more (docs/guarantees.md), and see a state that was.
    """
    late = [harm for harm in done if harm.name.endswith(OLD_PRIMARY_ANSWERS)]
    return [
        anomaly
        for anomaly in anomalies
        if anomaly.kind != "stale" or not any(h.began_ns <= anomaly.at_ns <= h.ended_ns for h in late)
    ]


def counted(done: list[Harm]) -> Counter[str]:
    """How many of each kind."""
    return Counter(harm.name for harm in done)
