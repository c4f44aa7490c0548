"""What an interrupted operation does next, decided by its log alone.

An `Operation` is a name and named steps. Its log holds begin, then done/failed/undone
per step, then end (flyd.model.RunEvent). Invariants:

- Steps are done in order, each at most once with success; a step that was begun and not
  logged is done again, so every step is idempotent.
- After `failed`, the failed step and the done ones are undone, last first; the failed
  step may have half happened, so it is undone too.
- The answer depends on nothing but the operation and the events: a daemon killed at any
  instruction goes on exactly where the log ends.

Pure. operations.py holds the operations and the executor.
"""

from __future__ import annotations

from collections.abc import Sequence

from flyd.errors import InvariantBroken
from flyd.model import RunEvent, Value

BEGIN = "begin"
DONE = "done"
FAILED = "failed"
UNDONE = "undone"
END = "end"


class Step(Value, frozen=True, kw_only=True):
    """One idempotent step; `undoable` says that it leaves something a failure must clear."""

    name: str
    undoable: bool = False


class Operation(Value, frozen=True, kw_only=True):
    """A name and the steps in their order."""

    name: str
    steps: tuple[Step, ...]


class Do(Value, frozen=True, kw_only=True):
    """Do this step (perhaps again), then log done or failed."""

    step: Step


class Undo(Value, frozen=True, kw_only=True):
    """Undo this step (perhaps again), then log undone."""

    step: Step


class Finished(Value, frozen=True, kw_only=True):
    """Nothing is left to do; log end if it is not there yet."""

    ok: bool
    error: str = ""
    ended: bool = False  # the end is logged


Action = Do | Undo | Finished


def next_action(operation: Operation, events: Sequence[RunEvent]) -> Action:
    """What comes next after `events`; raises InvariantBroken if they are no log of `operation`."""
    _check(operation, events)
    done = [e.step for e in events if e.kind == DONE]
    undone = {e.step for e in events if e.kind == UNDONE}
    failure = next((e for e in events if e.kind == FAILED), None)
    ended = any(e.kind == END for e in events)
    if failure is None:
        if len(done) == len(operation.steps):
            return Finished(ok=True, ended=ended)
        return Do(step=operation.steps[len(done)])
    touched = operation.steps[: len(done) + 1]
    for step in reversed(touched):
        if step.undoable and step.name not in undone:
            return Undo(step=step)
    return Finished(ok=False, error=str(failure.data.get("error", "")), ended=ended)


def _check(operation: Operation, events: Sequence[RunEvent]) -> None:
    """A log that this operation can not have written is our own bug: say so, touch nothing."""
    kinds = [e.kind for e in events]
    done = [e.step for e in events if e.kind == DONE]
    names = [step.name for step in operation.steps]
    failed = [e.step for e in events if e.kind == FAILED]
    fits = (
        kinds[:1] == [BEGIN]
        and kinds.count(BEGIN) == 1
        and done == names[: len(done)]
        and len(failed) <= 1
        and all(step in names[len(done) : len(done) + 1] for step in failed)
        and END not in kinds[:-1]
    )
    if not fits:
        run = events[0].run_id if events else "?"
        raise InvariantBroken(
            f"the log of run {run} is not one of operation {operation.name}",
            hint="keep the host's run log file and report this; the machine itself is untouched",
        )
