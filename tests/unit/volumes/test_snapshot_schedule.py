"""When snapshots are taken and which go: a table, and laws over a year of rounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyd.storage.schedule import EVERY_S, KEPT, Plan, plan
from volumes.contract import Snapshot

DAY_S = EVERY_S


def snapshot(name: str, day: float, *, scheduled: bool = True) -> Snapshot:
    return Snapshot(id=name, made_at_s=day * DAY_S, size_gb=1, used_bytes=0, scheduled=scheduled)


WEEK = tuple(snapshot(f"d{day}", day) for day in range(1, 6))
CASES = {
    "the first": ((), 10.0, Plan(take=True)),
    "not yet": ((snapshot("d1", 1),), 1.9, Plan(take=False)),
    "due": ((snapshot("d1", 1),), 2.0, Plan(take=True)),
    "people's own do not count": ((snapshot("mine", 5, scheduled=False),), 5.1, Plan(take=True)),
    "the sixth replaces the first": (WEEK, 6.0, Plan(take=True, remove=("d1",))),
    "five stay": (WEEK, 5.5, Plan(take=False)),
    "in any order": (WEEK[::-1], 6.0, Plan(take=True, remove=("d1",))),
    "too many go at once": ((*WEEK, snapshot("d6", 6)), 7.5, Plan(take=True, remove=("d1", "d2"))),
    "a clock set back a little": ((snapshot("d5", 5),), 4.9, Plan(take=False)),
    "a clock set back by years": ((snapshot("d5000", 5000),), 5.0, Plan(take=True)),
    "one is enough then too": ((snapshot("d5000", 5000), snapshot("d5", 5)), 5.1, Plan(take=False)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_due(case: str) -> None:
    snapshots, day, expected = CASES[case]
    assert plan(snapshots, day * DAY_S) == expected


@given(st.lists(st.floats(0.001, 3.0), min_size=10, max_size=80), st.sets(st.integers(0, 79), max_size=5))
def test_a_year_of_rounds(waits: list[float], own: set[int]) -> None:
    held: list[Snapshot] = []
    day = 1.0
    for number, wait in enumerate(waits):
        day += wait
        if number in own:
            held.append(snapshot(f"own{number}", day, scheduled=False))
        due = plan(held, day * DAY_S)
        if due.take:
            held.append(snapshot(f"s{number}", day))
        held = [s for s in held if s.id not in due.remove]
        scheduled = [s for s in held if s.scheduled]
        assert 1 <= len(scheduled) <= KEPT
        assert day * DAY_S - max(s.made_at_s for s in scheduled) < EVERY_S
        assert not plan(held, day * DAY_S).take
        assert not plan(held, day * DAY_S).remove
    assert len([s for s in held if not s.scheduled]) == len([n for n in own if n < len(waits)])
