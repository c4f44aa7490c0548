from __future__ import annotations

import pytest

from flyd.errors import Conflict, InvariantBroken
from flyd.machines.states import DEADLINES_S, REQUESTS, TRANSITIONS, Trigger, advance, diagram
from flyd.model import MachineState as S

PASSING = {S.STARTING, S.STOPPING, S.RESTARTING, S.REPLACING, S.DESTROYING}


@pytest.mark.parametrize(("row", "after"), TRANSITIONS.items())
def test_every_row_is_followed(row: tuple[S | None, Trigger], after: S) -> None:
    assert advance(*row) is after


def test_a_missing_request_is_a_conflict_that_names_what_is_possible() -> None:
    with pytest.raises(Conflict, match="can not start a machine that is started") as caught:
        advance(S.STARTED, Trigger.START)
    assert caught.value.hint == "possible now: destroy, restart, stop, update"
    with pytest.raises(Conflict) as caught:
        advance(S.DESTROYED, Trigger.START)
    assert "any more" in caught.value.hint


def test_a_missing_report_is_our_own_bug() -> None:
    with pytest.raises(InvariantBroken):
        advance(S.STOPPED, Trigger.SUCCEEDED)


def test_every_state_is_reached_and_all_but_the_last_are_left() -> None:
    assert set(TRANSITIONS.values()) == set(S)
    assert {before for before, _ in TRANSITIONS if before} == set(S) - {S.DESTROYED}


def test_every_passing_state_has_a_deadline_whose_exit_is_in_the_table() -> None:
    assert set(DEADLINES_S) >= PASSING
    for state, (deadline_s, trigger) in DEADLINES_S.items():
        assert deadline_s > 0
        assert trigger not in REQUESTS
        assert (state, trigger) in TRANSITIONS


def test_every_living_state_can_be_destroyed_or_passes() -> None:
    for state in set(S) - PASSING - {S.DESTROYED}:
        assert (state, Trigger.DESTROY) in TRANSITIONS


def test_the_diagram_has_every_row() -> None:
    lines = diagram().splitlines()
    assert lines[0] == "stateDiagram-v2"
    assert len(lines) == len(TRANSITIONS) + 2
    assert "    [*] --> created: create" in lines
