from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyd.machines.decide import (
    CREATE,
    DESTROY,
    RECYCLE,
    RESTART,
    START,
    STOP,
    UPDATE,
    Decision,
    NoteExit,
    Nothing,
    Perform,
    Record,
    Retire,
    Unclaimed,
    View,
    Wait,
    decide,
    entered,
    exited,
    failed,
    gave_up,
    judged,
    recycled,
    sickened,
    status_of,
    succeeded,
    taken_on,
)
from flyd.machines.environment import Assignment
from flyd.machines.operations import ENTERS, OPERATIONS
from flyd.model import (
    MAX_EVENTS,
    Check,
    Desired,
    ExitStatus,
    Machine,
    MachineConfig,
    MachineEvent,
    Observed,
)
from flyd.model import MachineState as S

CLAIM = Machine(
    id="m1",
    app="web",
    name="web-1",
    region="fra",
    host="h1",
    instance_id="01A",
    config=MachineConfig(image="host:", checks={"up": Check(kind="tcp", port=1)}),
    private_ip="127.10.0.2",
    epoch=2,
)
UP = Observed(machine_id="m1", instance_id="01A", running=True, pid=7, started_at_s=1.0)
DOWN = Observed(machine_id="m1", instance_id="01A", running=False, exit=ExitStatus(code=1))
EVENT = MachineEvent(type="x", status="", at_s=1.0)


def claim(**changes: object) -> Machine:
    return msgspec.structs.replace(CLAIM, **changes)


def record(state: S, **changes: object) -> Record:
    made = Record(assignment=Assignment(claim=CLAIM, primary_region="fra"), state=state, prepared=True)
    return msgspec.structs.replace(made, **changes)


NEWER = claim(instance_id="01B")
BRIEF = claim(config=MachineConfig(image="host:", auto_destroy=True))
BRIEF_STOPPED = msgspec.structs.replace(BRIEF, desired=Desired.STOPPED)
STOPPED, DESTROYED = claim(desired=Desired.STOPPED), claim(desired=Desired.DESTROYED)
HOURLY = claim(config=MachineConfig(image="host:", schedule="hourly"))
ASKED = msgspec.structs.replace(HOURLY, restart_nonce=1)
MOVED = msgspec.structs.replace(HOURLY, starts_at_s=1050.0)
MOVED_TO_STAY = msgspec.structs.replace(MOVED, desired=Desired.STOPPED)
CASES: list[tuple[str, Machine | None, Record | None, Observed | None, Decision]] = [
    ("nothing at all", None, None, None, Nothing()),
    ("stray", None, None, UP, Unclaimed()),
    ("another's, here", claim(host="h2"), None, UP, Perform(operation=DESTROY)),
    ("another's", claim(host="h2"), None, None, Nothing()),
    ("new", CLAIM, None, None, Perform(operation=CREATE)),
    ("new, already running", CLAIM, None, UP, Perform(operation=CREATE)),
    ("new, to be gone", DESTROYED, None, None, Perform(operation=DESTROY)),
    ("claim gone", None, record(S.STARTED), UP, Perform(operation=DESTROY)),
    ("given away", claim(host="h2", epoch=3), record(S.STARTED), UP, Perform(operation=DESTROY)),
    ("given again", claim(epoch=3), record(S.STARTED), UP, Perform(operation=DESTROY)),
    ("older claim", claim(epoch=1), record(S.STARTED), UP, Nothing()),
    ("to be gone", DESTROYED, record(S.STOPPED, ended=True), DOWN, Perform(operation=DESTROY)),
    ("not made yet", CLAIM, record(S.FAILED, prepared=False), None, Perform(operation=CREATE)),
    ("made", CLAIM, record(S.CREATED), None, Perform(operation=START)),
    ("made, to stay", STOPPED, record(S.CREATED), None, Nothing()),
    ("runs", CLAIM, record(S.STARTED), UP, Nothing()),
    ("ended", CLAIM, record(S.STARTED), DOWN, NoteExit(exit=ExitStatus(code=1))),
    ("ended unseen", CLAIM, record(S.STARTED), None, NoteExit(exit=None)),
    ("runs, to stop", STOPPED, record(S.STARTED), UP, Perform(operation=STOP)),
    ("ended, to stop", STOPPED, record(S.STARTED), DOWN, Perform(operation=STOP)),
    ("stopped", STOPPED, record(S.STOPPED), DOWN, Nothing()),
    ("ended for good, to stop", STOPPED, record(S.STOPPED, ended=True), DOWN, Perform(operation=STOP)),
    ("stopped, yet runs", STOPPED, record(S.STOPPED), UP, Perform(operation=STOP)),
    ("stopped, to start", CLAIM, record(S.STOPPED), DOWN, Perform(operation=START)),
    ("ended for good", CLAIM, record(S.STOPPED, ended=True), DOWN, Nothing()),
    ("asked again", claim(restart_nonce=1), record(S.STOPPED, ended=True), DOWN, Perform(operation=START)),
    ("restart", claim(restart_nonce=1), record(S.STARTED), UP, Perform(operation=RESTART)),
    ("restarted", claim(restart_nonce=1), record(S.STARTED, restart_nonce=1), UP, Nothing()),
    ("back-off", CLAIM, record(S.RESTARTING), DOWN, Wait(until=150.0)),
    ("back-off, to stop", STOPPED, record(S.RESTARTING), DOWN, Perform(operation=STOP)),
    ("failed, back-off", CLAIM, record(S.FAILED), None, Wait(until=150.0)),
    ("failed for good", CLAIM, record(S.FAILED, ended=True), None, Nothing()),
    ("newer version, runs", NEWER, record(S.STARTED), UP, Perform(operation=UPDATE)),
    ("newer version, ended", NEWER, record(S.STARTED), DOWN, Perform(operation=UPDATE)),
    (
        "newer version, to stay",
        claim(instance_id="01B", desired=Desired.STOPPED),
        record(S.STOPPED),
        DOWN,
        Perform(operation=UPDATE),
    ),
    ("newer version, ended for good", NEWER, record(S.STOPPED, ended=True), DOWN, Perform(operation=UPDATE)),
    (
        "newer version, to be gone",
        claim(instance_id="01B", desired=Desired.DESTROYED),
        record(S.STARTED),
        UP,
        Perform(operation=DESTROY),
    ),
    (
        "newer version, given again",
        claim(instance_id="01B", epoch=3),
        record(S.STARTED),
        UP,
        Perform(operation=DESTROY),
    ),
    ("update failed, old one runs", NEWER, record(S.FAILED, prepared=False), UP, Perform(operation=UPDATE)),
    ("update failed, nothing runs", NEWER, record(S.FAILED, prepared=False), DOWN, Perform(operation=CREATE)),
    ("sick", CLAIM, record(S.STARTED, sick="check up failed"), UP, Perform(operation=RECYCLE)),
    ("sick, ended by itself", CLAIM, record(S.STARTED, sick="x"), DOWN, NoteExit(exit=ExitStatus(code=1))),
    ("sick, to stop", STOPPED, record(S.STARTED, sick="x"), UP, Perform(operation=STOP)),
    ("not to stay, runs", BRIEF, record(S.STARTED), UP, Nothing()),
    ("not to stay, ended for good", BRIEF, record(S.STOPPED, ended=True), DOWN, Retire()),
    ("not to stay, but stopped", BRIEF_STOPPED, record(S.STOPPED, ended=True), DOWN, Perform(operation=STOP)),
    ("not to stay, never started", BRIEF, record(S.FAILED, ended=True), None, Retire()),
    (
        "by schedule, not due",
        HOURLY,
        record(S.STOPPED, ended=True, next_start_s=1050.0),
        DOWN,
        Wait(until=150.0),
    ),
    (
        "by schedule, gave up",
        HOURLY,
        record(S.FAILED, ended=True, next_start_s=1050.0),
        None,
        Wait(until=150.0),
    ),
    (
        "by schedule, due",
        HOURLY,
        record(S.STOPPED, ended=True, next_start_s=1000.0),
        DOWN,
        Perform(operation=START),
    ),
    ("by schedule, runs", HOURLY, record(S.STARTED, next_start_s=1000.0), UP, Nothing()),
    (
        "by schedule, asked",
        ASKED,
        record(S.STOPPED, ended=True, next_start_s=1050.0),
        DOWN,
        Perform(operation=START),
    ),
    ("by schedule, moved", MOVED, record(S.CREATED), None, Wait(until=150.0)),
    ("by schedule, moved, to stay", MOVED_TO_STAY, record(S.CREATED), None, Nothing()),
    ("failed, asked again", claim(restart_nonce=1), record(S.FAILED), None, Perform(operation=START)),
]


@pytest.mark.parametrize(
    ("claimed", "kept", "seen", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_decide(
    claimed: Machine | None, kept: Record | None, seen: Observed | None, expected: Decision
) -> None:
    late = 150.0 if isinstance(expected, Wait) or (kept and kept.state is S.RESTARTING) else 0.0
    view = View(
        host="h1", now=100.0, wall_s=1000.0, claim=claimed, record=kept, observed=seen, not_before=late
    )
    assert decide(view) == expected
    if isinstance(expected, Wait):
        assert decide(msgspec.structs.replace(view, now=150.0, wall_s=1050.0)) == Perform(operation=START)


class Body:
    """A host whose operations all take effect at once, some with a failure."""

    def __init__(self) -> None:
        self.record: Record | None = None
        self.observed: Observed | None = None

    def view(self, claimed: Machine | None) -> View:
        return View(host="h1", now=0.0, claim=claimed, record=self.record, observed=self.observed)

    def carry_out(self, decision: Decision, claimed: Machine | None, fails: bool) -> None:
        if isinstance(decision, NoteExit):
            assert self.record
            self.record = exited(self.record, decision.exit or ExitStatus(), 0, again=fails, reason="")
        if isinstance(decision, Perform):
            self._perform(decision.operation, claimed, fails)

    def _perform(self, operation: str, claimed: Machine | None, fails: bool) -> None:
        kept = self.record
        if kept is not None and operation == DESTROY:
            assignment = kept.assignment
        else:
            assert claimed
            assignment = Assignment(claim=claimed, primary_region="fra")
        for step in OPERATIONS[operation].steps:
            trigger = ENTERS.get((operation, step.name))
            if trigger:
                kept = entered(kept, assignment, trigger, 0.0) if kept else taken_on(assignment, trigger)
        assert kept
        if fails:
            self.record = failed(kept, "broken", EVENT)
            if operation in (START, RESTART):
                self.record = gave_up(self.record, 0, again=True)
            return
        if operation in (START, RESTART):
            self.observed = msgspec.structs.replace(UP, instance_id=assignment.claim.instance_id)
        if operation in (STOP, UPDATE, RECYCLE) and self.observed:
            self.observed = msgspec.structs.replace(DOWN, instance_id=assignment.claim.instance_id)
        if operation == DESTROY:
            self.record = self.observed = None
            return
        if operation == RECYCLE:
            self.record = judged(recycled(kept, EVENT), 0, again=True, reason="", retry_at_s=0.0)
            return
        self.record = succeeded(kept, operation, self.observed, EVENT)

    def settle(self, claimed: Machine | None) -> Decision:
        for _ in range(6):
            decision = decide(self.view(claimed))
            if not isinstance(decision, Perform | NoteExit):
                return decision
            self.carry_out(decision, claimed, fails=False)
            if self.record is None and claimed and claimed.desired is Desired.DESTROYED:
                claimed = None  # freed
        raise AssertionError("never at rest")


claims = st.one_of(
    st.none(),
    st.builds(
        claim,
        desired=st.sampled_from([Desired.STARTED, Desired.STOPPED, Desired.DESTROYED]),
        epoch=st.integers(2, 4),
        host=st.sampled_from(["h1", "h1", "h2"]),
        restart_nonce=st.integers(0, 2),
        instance_id=st.sampled_from(["01A", "01B"]),
    ),
)
turns = st.lists(st.tuples(claims, st.booleans(), st.booleans(), st.booleans()), max_size=12)


@settings(max_examples=200, deadline=None)
@given(turns=turns, last=claims)
def test_it_comes_to_rest_as_claimed_whatever_happened(
    turns: list[tuple[Machine | None, bool, bool, bool]], last: Machine | None
) -> None:
    body = Body()
    for claimed, fails, dies, sick in turns:
        if dies and body.observed:
            body.observed = msgspec.structs.replace(DOWN, instance_id=body.observed.instance_id)
        if sick and body.record and body.record.state is S.STARTED:
            body.record = sickened(body.record, "check up failed")
        body.carry_out(decide(body.view(claimed)), claimed, fails)
    if last is not None:  # etcd never goes back to an older epoch; a host that sees one ignores it
        newest = max((claimed.epoch for claimed, *_ in turns if claimed is not None), default=1)
        last = msgspec.structs.replace(last, epoch=max(last.epoch, newest))
    rest = body.settle(last)
    assert isinstance(rest, Nothing)
    if last is None or last.host != "h1" or last.desired is Desired.DESTROYED:
        assert body.record is None
    elif body.record and last.epoch == body.record.assignment.claim.epoch:
        runs = body.observed is not None and body.observed.running
        assert runs == (last.desired is Desired.STARTED and not body.record.ended)
        if runs and body.observed:
            assert body.observed.instance_id == last.instance_id


def test_a_start_forgets_old_checks_and_a_status_says_all() -> None:
    begun = entered(
        record(S.STOPPED, detail="old"), record(S.STOPPED).assignment, ENTERS[(START, "source")], 0.0
    )
    started = succeeded(begun, START, UP, EVENT)
    status = status_of(started)
    assert (status.state, status.pid, status.epoch, status.detail) == (S.STARTED, 7, 2, "")
    assert [c.status for c in status.checks] == ["warning"]
    ended = exited(started, ExitStatus(code=3, at_s=9.0), 1, again=True, reason="exited with code 3")
    assert (ended.restarts, ended.recent_exits, ended.checks, ended.pid) == (1, 2, (), 0)
    assert ended.events[-1].status == "restarting"


def test_history_is_bounded() -> None:
    kept = record(S.STARTED)
    for number in range(MAX_EVENTS + 5):
        kept = exited(kept, ExitStatus(code=number), 0, again=False, reason="")
        kept = msgspec.structs.replace(kept, state=S.STARTED)
    assert [e.exit.code for e in kept.events if e.exit] == list(range(5, MAX_EVENTS + 5))
