"""What a host does next about one machine: claim, own record and sight, compared.

Owns the host's `Record` of a machine, its pure changes, and `decide`. Invariants:

- A machine that nobody claims and this host does not remember is reported, never killed; one that
  another host claims is a stale copy and goes, remembered or not.
- Nothing that mounts a volume is done before etcd has been heard since flyd's start (fencing.py).
- Only the newest claim counts; a claim older than the record changes nothing.
- A machine that ended for good rests until somebody asks (a stop, or a greater
  restart_nonce) or its schedule does, although its claim still says `started`.
- The same view gives the same decision, and no decision asks for a change that
  states.TRANSITIONS does not have.

Pure. Called by host.py, which carries the decision out through operations.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from flyd.machines import checks
from flyd.machines.environment import Assignment
from flyd.machines.schedule import next_start_s, wait_s
from flyd.machines.states import Trigger, advance
from flyd.model import (
    MAX_EVENTS,
    CheckStatus,
    Desired,
    ExitStatus,
    Machine,
    MachineEvent,
    MachineState,
    MachineStatus,
    Observed,
    Value,
)

CREATE = "create"
START = "start"
STOP = "stop"
RESTART = "restart"
RECYCLE = "recycle"
UPDATE = "update"
DESTROY = "destroy"
MOUNTING = (CREATE, START, RESTART, RECYCLE, UPDATE)  # a machine that is recycled is started again


class Record(Value, frozen=True, kw_only=True):
    """What this host did with a machine; durable in its run log, published as MachineStatus."""

    assignment: Assignment
    state: MachineState
    mark: str = ""  # the last change that an operation made here: "<run>/<step>"
    prepared: bool = False  # CREATE has succeeded
    ended: bool = False  # ended for good: rests until somebody asks
    restart_nonce: int = 0
    pid: int = 0
    started_at_s: float = 0.0
    restarts: int = 0
    recent_exits: int = 0  # within the restart window, as of the last exit
    retry_at_s: float = 0.0  # for people: when the back-off ends, by the wall clock
    next_start_s: float = 0.0  # by its schedule, by the wall clock
    sick: str = ""  # why it is to be ended: a check with a restart_limit keeps failing
    detail: str = ""
    checks: tuple[CheckStatus, ...] = ()
    events: tuple[MachineEvent, ...] = ()


class View(Value, frozen=True, kw_only=True):
    """All that is known of one machine at one moment."""

    host: str
    now: float  # monotonic
    wall_s: float = 0.0
    claim: Machine | None = None
    record: Record | None = None
    observed: Observed | None = None
    not_before: float = 0.0  # back-off: no new attempt earlier than this
    learned: bool = True  # whether etcd was heard since flyd's start; else the claim is the last one known


class Nothing(Value, frozen=True, kw_only=True):
    """All is as it should be."""


class Wait(Value, frozen=True, kw_only=True):
    """Look again at this monotonic time."""

    until: float


class Unclaimed(Value, frozen=True, kw_only=True):
    """It is here and nobody knows why: say so, leave it."""


class NoteExit(Value, frozen=True, kw_only=True):
    """The process ended by itself; None: nobody saw how."""

    exit: ExitStatus | None


class Retire(Value, frozen=True, kw_only=True):
    """It has ended for good and is not to stay: want it destroyed."""


class Perform(Value, frozen=True, kw_only=True):
    """Carry out this operation."""

    operation: str


Decision = Nothing | Wait | Unclaimed | NoteExit | Retire | Perform


def decide(view: View) -> Decision:
    """The next thing to do about one machine, or nothing."""
    decision = _decide(view)
    mounts = view.claim is not None and bool(view.claim.config.mounts)
    if mounts and not view.learned and isinstance(decision, Perform) and decision.operation in MOUNTING:
        return Nothing()  # the first look at etcd looks at every machine again
    return decision


def _decide(view: View) -> Decision:
    claim, record = view.claim, view.record
    if claim is None or claim.host != view.host:
        if record is not None or (claim is not None and view.observed is not None):
            return _patiently(view, DESTROY)
        return Unclaimed() if view.observed is not None else Nothing()
    if record is None:
        return Perform(operation=DESTROY if claim.desired is Desired.DESTROYED else CREATE)
    taken = record.assignment.claim.epoch
    if claim.epoch < taken:
        return Nothing()
    if claim.epoch > taken or claim.desired is Desired.DESTROYED:
        return _patiently(view, DESTROY)
    if _to_replace(view, record, claim):
        return _patiently(view, UPDATE)
    if not record.prepared:
        return _patiently(view, CREATE)
    if record.ended and claim.config.auto_destroy and claim.desired is Desired.STARTED:
        return Retire()
    if claim.desired is Desired.STOPPED:
        return _want_stopped(view, record)
    return _want_started(view, record, claim)


def wish_of(found: tuple[Machine, int] | None) -> tuple[object, ...]:
    """What a claim asks of its host; a change of anything else (metadata, routing) asks for nothing."""
    if found is None:
        return ()
    claim = found[0]
    return claim.host, claim.epoch, claim.desired, claim.restart_nonce, claim.instance_id, claim.stop


def _to_replace(view: View, record: Record, claim: Machine) -> bool:
    """Whether another version of the configuration is here, or still runs after a failed update."""
    if record.prepared:
        return claim.instance_id != record.assignment.claim.instance_id
    return _running(view) and view.observed is not None and view.observed.instance_id != claim.instance_id


def _want_stopped(view: View, record: Record) -> Decision:
    at_rest = record.state in (MachineState.CREATED, MachineState.STOPPED)
    # One that ended for good is stopped all the same, so that a later wish to start it counts.
    if at_rest and not record.ended and not _running(view):
        return Nothing()
    return _patiently(view, STOP)


def _want_started(view: View, record: Record, claim: Machine) -> Decision:
    asked_again = claim.restart_nonce > record.restart_nonce
    if record.state is MachineState.STARTED:
        if not _running(view):
            return NoteExit(exit=view.observed.exit if view.observed else None)
        if asked_again:
            return Perform(operation=RESTART)
        return Perform(operation=RECYCLE) if record.sick else Nothing()
    if asked_again:
        return Perform(operation=START)
    if record.ended:
        return _by_schedule(view, claim.config.schedule, record.next_start_s) or Nothing()
    if record.state is MachineState.CREATED and claim.starts_at_s:
        return _by_schedule(view, claim.config.schedule, claim.starts_at_s) or Perform(operation=START)
    if record.state is MachineState.RESTARTING and view.now < view.not_before:
        return Wait(until=view.not_before)
    return _patiently(view, START)


def _by_schedule(view: View, schedule: str, start_s: float) -> Decision | None:
    """Start it, or wait until that is due; None without a schedule."""
    if not schedule:
        return None
    left_s = wait_s(schedule, start_s, view.wall_s)
    return Wait(until=view.now + left_s) if left_s else _patiently(view, START)


def _running(view: View) -> bool:
    return view.observed is not None and view.observed.running


def _patiently(view: View, operation: str) -> Decision:
    """The operation, unless the last attempt failed a moment ago."""
    failed = view.record is not None and view.record.state is MachineState.FAILED
    if failed and view.now < view.not_before:
        return Wait(until=view.not_before)
    return Perform(operation=operation)


# --------------------------------------------------------------------------- changes of a record


def taken_on(assignment: Assignment, trigger: Trigger) -> Record:
    """The record of a machine that this host has not known before."""
    return Record(
        assignment=assignment,
        state=advance(None, trigger),
        restart_nonce=assignment.claim.restart_nonce,
    )


def entered(record: Record, assignment: Assignment, trigger: Trigger, at_s: float) -> Record:
    """The record as a step with a `trigger` begins: a passing state, old results gone."""
    schedule, starts = assignment.claim.config.schedule, trigger is Trigger.START
    asked = trigger in (Trigger.START, Trigger.RESTART, Trigger.UPDATE)
    unprepared = trigger in (Trigger.DESTROY, Trigger.UPDATE)
    return msgspec.structs.replace(
        record,
        assignment=assignment,
        state=advance(record.state, trigger),
        restart_nonce=assignment.claim.restart_nonce if asked else record.restart_nonce,
        ended=False,
        prepared=record.prepared and not unprepared,
        retry_at_s=0.0,
        next_start_s=next_start_s(schedule, at_s) if starts else record.next_start_s,
        sick=record.sick if trigger is Trigger.RESTART else "",
        detail="",
        checks=(),
    )


def succeeded(record: Record, operation: str, observed: Observed | None, event: MachineEvent) -> Record:
    """The record after an operation that went well; `observed` is the process that START began."""
    state = advance(record.state, Trigger.SUCCEEDED)
    started = state is MachineState.STARTED
    return msgspec.structs.replace(
        record,
        state=state,
        prepared=record.prepared or operation in (CREATE, UPDATE),
        pid=observed.pid if observed and started else 0,
        started_at_s=observed.started_at_s if observed and started else record.started_at_s,
        checks=checks.unprobed(record.assignment.claim.config, event.at_s) if started else (),
        events=_with(record.events, msgspec.structs.replace(event, status=state.value)),
    )


def failed(record: Record, error: str, event: MachineEvent) -> Record:
    """The record after an operation that failed and was undone."""
    state = advance(record.state, Trigger.FAILED)
    event = msgspec.structs.replace(event, status=state.value, detail=error)
    return msgspec.structs.replace(
        record, state=state, pid=0, detail=error, events=_with(record.events, event)
    )


def exited(
    record: Record, exit: ExitStatus, earlier: int, again: bool, reason: str, retry_at_s: float = 0.0
) -> Record:
    """The record after the process ended by itself: to be restarted, or resting for `reason`."""
    state = advance(record.state, Trigger.RESTART if again else Trigger.EXITED)
    event = MachineEvent(type="exit", status=state.value, at_s=exit.at_s, exit=exit, detail=reason)
    return msgspec.structs.replace(
        record,
        state=state,
        ended=not again,
        pid=0,
        restarts=record.restarts + again,
        recent_exits=earlier + 1,
        retry_at_s=retry_at_s,
        detail=reason,
        checks=(),
        events=_with(record.events, event),
    )


def gave_up(record: Record, earlier: int, again: bool, retry_at_s: float = 0.0) -> Record:
    """The record after a failed start: counted like an exit, and resting unless it is tried again."""
    return msgspec.structs.replace(record, ended=not again, recent_exits=earlier + 1, retry_at_s=retry_at_s)


def sickened(record: Record, reason: str) -> Record:
    """The record of a machine that a failing check condemns."""
    return msgspec.structs.replace(record, sick=reason)


def recycled(record: Record, event: MachineEvent) -> Record:
    """The record after an unhealthy machine was ended: it waits for its restart policy's word."""
    event = msgspec.structs.replace(event, status=record.state.value, detail=record.sick)
    return msgspec.structs.replace(
        record, pid=0, detail=record.sick, checks=(), events=_with(record.events, event)
    )


def judged(record: Record, earlier: int, again: bool, reason: str, retry_at_s: float) -> Record:
    """The record after the restart policy's word on an unhealthy machine."""
    return msgspec.structs.replace(
        record,
        state=record.state if again else advance(record.state, Trigger.EXITED),
        ended=not again,
        restarts=record.restarts + again,
        recent_exits=earlier + 1,
        retry_at_s=retry_at_s,
        detail=reason,
    )


def checked(record: Record, status: CheckStatus) -> Record:
    """The record with a check's new status."""
    kept = tuple(status if c.name == status.name else c for c in record.checks)
    return msgspec.structs.replace(record, checks=kept)


def status_of(record: Record) -> MachineStatus:
    """The record as it is published."""
    claim = record.assignment.claim
    return MachineStatus(
        id=claim.id,
        app=claim.app,
        host=claim.host,
        instance_id=claim.instance_id,
        epoch=claim.epoch,
        state=record.state,
        pid=record.pid,
        started_at_s=record.started_at_s,
        checks=record.checks,
        restarts=record.restarts,
        detail=record.detail,
        events=record.events,
        recent_exits=record.recent_exits,
        retry_at_s=record.retry_at_s,
        next_start_s=record.next_start_s,
    )


def _with(events: Sequence[MachineEvent], event: MachineEvent) -> tuple[MachineEvent, ...]:
    return (*events, event)[-MAX_EVENTS:]
