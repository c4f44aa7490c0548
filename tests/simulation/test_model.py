"""The take-over protocol, every state at small bounds (model/, README.md); and that it can fail.

Larger bounds: python -m tests.simulation.model
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from tests.simulation.model.explore import CLIENTS, EVERY, Found, explore
from tests.simulation.model.mutants import CHANGE_MUTANTS, MUTANTS
from tests.simulation.model.steps import Bounds

# What is tried, what must have been come upon on the way, and how many states that are at least.
EXPLORED = (
    (Bounds(rows=1, renewals=1, last_epoch=3), ("renews", "promote 3", "follow"), 8_000),
    (Bounds(rows=1, losses=1, last_epoch=3), ("is lost", "unanswered", "release"), 6_000),
    (Bounds(rows=1, crashes=1, last_epoch=3), ("dies", "starts", "rewind is cut short", "copy"), 30_000),
    (Bounds(rows=1, last_epoch=4), ("promote 3", "promote 4", "rewind", "demote"), 30_000),
)
CHANGES = (
    (Bounds(rows=1, last_epoch=3, members=2, changes=1), ("to be a b c", "promote 3", "synchronise"), 1_000),
    pytest.param(
        Bounds(rows=1, last_epoch=3, members=3, changes=1),
        ("to be a b", "promote 3", "synchronise"),
        1_000,
        marks=pytest.mark.soak,  # 92,000 states take a busy machine half a minute
    ),
)
# Enough for each mutant: the real protocol holds here (the first of those above).
MUTANT_BOUNDS = EXPLORED[0][0]


@pytest.mark.parametrize(("bounds", "reached", "at_least"), EXPLORED + CHANGES)
def test_every_state_keeps_every_promise(
    bounds: Bounds, reached: tuple[str, ...], at_least: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found = explore(bounds, EVERY)
    with capsys.disabled():  # whoever reads the log of CI sees how much was tried
        print(f"\n{bounds}: {found.told()}")
    assert not found.broken, found.told()
    assert found.states > at_least
    for what in reached:
        assert any(what in step for step in found.kinds), f"the model never came to: {what}"


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_protocol_without_one_of_its_supports_loses_rows(
    mutant: Callable[[], AbstractContextManager[None]],
) -> None:
    with mutant():
        found: Found = explore(MUTANT_BOUNDS, CLIENTS)
    print(f"\n{mutant.__name__}: {found.told()}")
    assert found.broken.startswith("lost:")


@pytest.mark.parametrize(("mutant", "members"), CHANGE_MUTANTS)
def test_a_change_of_members_without_one_of_its_supports_loses_rows(
    mutant: Callable[[], AbstractContextManager[None]], members: int
) -> None:
    with mutant():
        found = explore(Bounds(rows=1, last_epoch=3, members=members, changes=1), CLIENTS)
    print(f"\n{mutant.__name__}: {found.told()}")
    assert found.broken.startswith("lost:")
