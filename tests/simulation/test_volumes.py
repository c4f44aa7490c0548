"""The volumes world in short (`make soak` runs 1,000 seeds of it), and that its checkers can fail.

A failure prints the command that shows the same run again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from tests.simulation import planted
from tests.simulation.mounts import Mount, overlap
from tests.simulation.runner import replay_command, run_world

MINUTES = 10.0  # 100 schedules
SEEDS = range(1, 4)


def test_no_volume_is_ever_mounted_twice() -> None:
    told: Counter[str] = Counter()
    for seed in SEEDS:
        finished = run_world("volumes", seed, MINUTES * 60)
        if finished.failures:
            pytest.fail("\n".join((*finished.failures, f"again: {replay_command('volumes', seed, MINUTES)}")))
        told += finished.result
    print(f"\n{dict(told)}")
    assert told["schedules"] == 100 * len(SEEDS)
    assert told["moves"]
    assert told["recoveries"]


def test_a_seed_has_one_history() -> None:
    first, second = run_world("volumes", 3), run_world("volumes", 3)
    assert first.trace == second.trace
    assert len(first.trace) > 100


@pytest.mark.parametrize(
    ("bug", "finding", "minutes", "within"),
    [
        (planted.mount_before_learning, "early:", 5.0, 40),
        (planted.mount_without_epochs, "two mounts:|volume:", 1.0, 30),
        (planted.move_without_stopping, "moved while mounted:|lost:", 5.0, 40),
    ],
)
def test_a_planted_bug_is_found(
    bug: Callable[[], AbstractContextManager[None]], finding: str, minutes: float, within: int
) -> None:
    with bug():
        for seed in range(1, within + 1):
            found = run_world("volumes", seed, minutes * 60).failures
            if any(re.search(finding, failure) for failure in found):
                return
    pytest.fail(f"{bug.__name__} was not found in {within} seeds")


def mount(began_s: float, ended_s: float, host: str = "ams", volume: str = "v") -> Mount:
    return Mount(volume, f"m{began_s}", host, 1, began_s, ended_s)


@pytest.mark.parametrize(
    ("mounts", "double"),
    [
        ([], False),
        ([mount(1, 2), mount(2, 3, "iad")], False),  # one begins at the instant in which the other ends
        ([mount(1, 2), mount(1.5, 3, "iad")], True),
        ([mount(1, 2), mount(1.5, 3, "iad", "w")], False),
        ([mount(1, 0), mount(5, 6)], True),  # the first has never ended
        ([mount(1, 9), mount(2, 3), mount(4, 5)], True),
        ([mount(4, 5), mount(1, 2), mount(2.5, 3)], False),
    ],
)
def test_the_checker_over_recorded_intervals(mounts: list[Mount], double: bool) -> None:
    assert (overlap(mounts, 10.0) is not None) is double
