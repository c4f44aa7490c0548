from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyd.errors import InvariantBroken
from flyd.machines.saga import Do, Finished, Operation, Step, Undo, next_action
from flyd.model import RunEvent

A, B, C = Step(name="a", undoable=True), Step(name="b"), Step(name="c", undoable=True)
OPERATION = Operation(name="op", steps=(A, B, C))


def log(*entries: str) -> list[RunEvent]:
    """`done:a` and so on as events."""
    events: list[RunEvent] = []
    for number, entry in enumerate(entries):
        kind, _, step = entry.partition(":")
        data = {"error": "broken"} if kind == "failed" else {}
        events.append(RunEvent(run_id="r", sequence=number, kind=kind, step=step, data=data))
    return events


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (["begin"], Do(step=A)),
        (["begin", "done:a"], Do(step=B)),
        (["begin", "done:a", "done:b", "done:c"], Finished(ok=True)),
        (["begin", "done:a", "done:b", "done:c", "end"], Finished(ok=True, ended=True)),
        (["begin", "failed:a"], Undo(step=A)),
        (["begin", "failed:a", "undone:a"], Finished(ok=False, error="broken")),
        (["begin", "done:a", "failed:b"], Undo(step=A)),
        (["begin", "done:a", "done:b", "failed:c"], Undo(step=C)),
        (["begin", "done:a", "done:b", "failed:c", "undone:c"], Undo(step=A)),
        (
            ["begin", "done:a", "done:b", "failed:c", "undone:c", "undone:a", "end"],
            Finished(ok=False, error="broken", ended=True),
        ),
    ],
)
def test_next_action(entries: list[str], expected: object) -> None:
    assert next_action(OPERATION, log(*entries)) == expected


@pytest.mark.parametrize(
    "entries",
    [
        [],
        ["done:a"],
        ["begin", "begin"],
        ["begin", "done:b"],
        ["begin", "done:a", "done:a"],
        ["begin", "failed:b"],
        ["begin", "done:a", "failed:b", "failed:b"],
        ["begin", "end", "done:a"],
    ],
)
def test_a_log_that_no_run_writes_is_refused(entries: list[str]) -> None:
    with pytest.raises(InvariantBroken):
        next_action(OPERATION, log(*entries))


class Effects:
    """What steps have left behind, and how often they were called."""

    def __init__(self) -> None:
        self.left: set[str] = set()
        self.calls = 0


def walk(operation: Operation, events: list[RunEvent], effects: Effects, fails: str, calls: int) -> bool:
    """Act at most `calls` times; False if that was not enough. The last effect may go unlogged."""
    while True:
        action = next_action(operation, events)
        if isinstance(action, Finished):
            return True
        if calls == 0:
            return False
        calls -= 1
        name = action.step.name
        if isinstance(action, Undo):
            effects.left.discard(name)
            kind = "undone"
        else:
            effects.left.add(name)
            kind = "failed" if name == fails else "done"
        if calls == 0:
            return False  # killed between the effect and its log
        events.append(RunEvent(run_id="r", sequence=len(events), kind=kind, step=name))


def steps() -> st.SearchStrategy[Sequence[Step]]:
    def number(flags: list[bool]) -> tuple[Step, ...]:
        return tuple(Step(name=f"s{i}", undoable=flag) for i, flag in enumerate(flags))

    return st.lists(st.booleans(), min_size=1, max_size=5).map(number)


@settings(max_examples=100, deadline=None)
@given(steps=steps(), fails=st.integers(0, 6), crashes=st.lists(st.integers(1, 4), max_size=6))
def test_crashed_and_resumed_it_reaches_the_same_end(
    steps: Sequence[Step], fails: int, crashes: list[int]
) -> None:
    operation = Operation(name="op", steps=tuple(steps))
    whole, undisturbed = log("begin"), Effects()
    assert walk(operation, whole, undisturbed, f"s{fails}", 100)
    events, effects = log("begin"), Effects()
    for calls in crashes:
        walk(operation, events, effects, f"s{fails}", calls)
    assert walk(operation, events, effects, f"s{fails}", 100)
    assert next_action(operation, events) == next_action(operation, whole)
    assert effects.left == undisturbed.left
    assert [e.kind for e in events] == [e.kind for e in whole]


@settings(max_examples=100, deadline=None)
@given(steps=steps(), fails=st.integers(0, 6))
def test_a_failure_leaves_nothing_undoable(steps: Sequence[Step], fails: int) -> None:
    effects = Effects()
    events = log("begin")
    assert walk(Operation(name="op", steps=tuple(steps)), events, effects, f"s{fails}", 100)
    if fails < len(steps):
        assert not {s.name for s in steps if s.undoable} & effects.left
    else:
        assert effects.left == {s.name for s in steps}
