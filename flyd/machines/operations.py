"""The operations on a machine, as tables of steps, and the executor that walks them.

Owns CREATE, START, STOP, RESTART, RECYCLE, UPDATE and DESTROY: which steps, in which order, what each does
and undoes on the ports; and `Records`, this host's durable memory of its machines.
Invariants:

- What an operation works on (`Job`) is in its log's first event: a resumed run needs no etcd.
- Every effect comes before the event that logs it, and every effect is idempotent.
- A record changes once per step (`Record.mark`), however often the step is done again.
- A `failed` step is undone before the run ends. An undo that fails leaves the run open:
  the caller executes it again later.

Called by host.py, at most one run per machine at a time. What comes next in a run is
saga.next_action's word; when to run which operation is decide.py's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec

from flyd.errors import FlydError, InvariantBroken, NotFound, Refused
from flyd.machines import decide
from flyd.machines.decide import CREATE, DESTROY, RECYCLE, RESTART, START, STOP, UPDATE, Record
from flyd.machines.environment import Assignment, machine_spec, source_digest
from flyd.machines.free import free
from flyd.machines.halts import Halts
from flyd.machines.saga import (
    BEGIN,
    DONE,
    END,
    FAILED,
    UNDONE,
    Do,
    Finished,
    Operation,
    Step,
    Undo,
    next_action,
)
from flyd.machines.states import DEADLINES_S, MAX_STOP_TIMEOUT_S, Trigger
from flyd.model import ExitStatus, Host, MachineEvent, MachineSpec, Observed, RunEvent, Value, decode, encode
from flyd.model.image import image_id
from flyd.ports import KV, Clock, Driver, ImageStore, RunLog, SourceStore, VolumeStore

SOURCE = Step(name="source")
VOLUMES = Step(name="volumes", undoable=True)
KEPT_VOLUMES = Step(name="volumes")  # START: the machine holds them already, a failure leaves them
MAKE = Step(name="make", undoable=True)
REMAKE = Step(name="make")  # UPDATE: what a failure leaves is made anew by the next attempt
RUN = Step(name="run", undoable=True)
HALT = Step(name="halt")
REMOVE = Step(name="remove")
RELEASE = Step(name="release")
FREE = Step(name="free")

OPERATIONS: dict[str, Operation] = {
    CREATE: Operation(name=CREATE, steps=(SOURCE, VOLUMES, MAKE)),
    START: Operation(name=START, steps=(SOURCE, KEPT_VOLUMES, RUN)),
    STOP: Operation(name=STOP, steps=(HALT,)),
    RESTART: Operation(name=RESTART, steps=(HALT, SOURCE, KEPT_VOLUMES, RUN)),
    # An unhealthy machine is only ended here: its restart policy says what follows (host.py).
    RECYCLE: Operation(name=RECYCLE, steps=(HALT,)),
    # The old version runs on while the new one's image or source is fetched.
    UPDATE: Operation(name=UPDATE, steps=(SOURCE, HALT, KEPT_VOLUMES, REMAKE)),
    DESTROY: Operation(name=DESTROY, steps=(HALT, REMOVE, RELEASE, FREE)),
}

# The steps at whose beginning a machine's state changes.
ENTERS: dict[tuple[str, str], Trigger] = {
    (CREATE, SOURCE.name): Trigger.CREATE,
    (START, SOURCE.name): Trigger.START,
    (STOP, HALT.name): Trigger.STOP,
    (RESTART, HALT.name): Trigger.RESTART,
    (RESTART, SOURCE.name): Trigger.START,
    (RECYCLE, HALT.name): Trigger.RESTART,
    (UPDATE, SOURCE.name): Trigger.UPDATE,
    (DESTROY, HALT.name): Trigger.DESTROY,
}

EVENT_TYPES = {
    CREATE: "launch",
    START: "start",
    STOP: "stop",
    RESTART: "restart",
    RECYCLE: "unhealthy",
    UPDATE: "update",
    DESTROY: "destroy",
}

ENDING = (STOP, RECYCLE, DESTROY)  # operations after which nothing runs

RECORDS = "machines/"
CREATED_VOLUMES = "volumes/"
RUN_ID_BYTES = 8
SICK_STOP_S = 30.0  # the longest that a machine which a check condemned may take to end


class Job(Value, frozen=True, kw_only=True):
    """What a run is about; the data of its first event."""

    operation: str
    assignment: Assignment


class Records:
    """This host's durable memory of its machines: written through to the run log at once."""

    def __init__(self, run_log: RunLog, changed: Callable[[str], None]) -> None:
        self._run_log = run_log
        self._changed = changed
        stored = run_log.records(RECORDS)
        self._records = {key.removeprefix(RECORDS): decode(stored[key], Record) for key in sorted(stored)}

    def get(self, machine_id: str) -> Record | None:
        """The record of a machine, if this host has one."""
        return self._records.get(machine_id)

    def ids(self) -> list[str]:
        """All machines with a record."""
        return sorted(self._records)

    def put(self, machine_id: str, record: Record) -> None:
        """Set a record, durably, and say that it changed."""
        self._run_log.put_record(RECORDS + machine_id, encode(record))
        self._records[machine_id] = record
        self._changed(machine_id)

    def forget(self, machine_id: str) -> None:
        """Remove a record, durably, and say that it changed."""
        self._run_log.delete_record(RECORDS + machine_id)
        self._records.pop(machine_id, None)
        self._changed(machine_id)


@dataclass(frozen=True)
class Tools:
    """The ports that operations work with."""

    host: Host
    kv: KV
    driver: Driver
    run_log: RunLog
    volumes: VolumeStore
    sources: SourceStore
    clock: Clock
    records: Records
    halts: Halts
    images: ImageStore | None = None  # None: this host's driver runs no containers


@dataclass(frozen=True)
class Task:
    """One run as its steps see it; `facts` holds what the done steps reported."""

    tools: Tools
    operation: str
    assignment: Assignment
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def machine_id(self) -> str:
        """The machine this run is about."""
        return self.assignment.claim.id

    def spec(self) -> MachineSpec:
        """What the driver is to run, from what the steps before found."""
        return machine_spec(
            self.assignment, self.tools.host, self.facts.get("source_path", ""), self.facts["volume_paths"]
        )


# --------------------------------------------------------------------------- the steps

Facts = dict[str, Any]


async def _source(task: Task) -> Facts:
    reference = task.assignment.claim.config.image
    if image := image_id(reference):
        if task.tools.images is None:
            raise Refused(
                f"host {task.tools.host.name} runs no container images, and {reference[:26]} is one",
                hint="All hosts of a cluster run one driver; deploy again once they do.",
            )
        await task.tools.images.ensure(image)
    digest = source_digest(reference)
    return {"source_path": await task.tools.sources.ensure(digest) if digest else ""}


async def _attach_volumes(task: Task) -> Facts:
    tools, claim = task.tools, task.assignment.claim
    granted = {grant.id for grant in task.assignment.volumes}
    for mount in claim.config.mounts:
        if mount.volume not in granted:
            raise Refused(
                f"volume {mount.volume or mount.name} is not given to machine {claim.id} on {claim.host}",
                hint="`fly volumes list` shows which host and machine hold it",
            )
    paths: dict[str, str] = {}
    for grant in task.assignment.volumes:
        # Made once: a volume that was here and is gone must be missed, not replaced by an empty one.
        made = CREATED_VOLUMES + grant.id
        if made not in tools.run_log.records(made):
            await tools.volumes.create(grant.id, grant.size_gb)
            tools.run_log.put_record(made, b"{}")
        paths[grant.id] = await tools.volumes.attach(grant.id, claim.id, grant.epoch)
    return {"volume_paths": paths}


async def _detach_volumes(task: Task) -> Facts:
    for grant in task.assignment.volumes:
        # A volume that never came to this host needs no giving back.
        with suppress(NotFound):
            await task.tools.volumes.detach(grant.id, task.machine_id, grant.epoch)
    return {}


async def _make(task: Task) -> Facts:
    await task.tools.driver.create(task.spec())
    return {}


async def _run(task: Task) -> Facts:
    driver, spec = task.tools.driver, task.spec()
    try:
        observed = await driver.start(spec)
    except NotFound:  # made, and lost: a power cut takes what the driver had not synced to the disk yet
        await driver.create(spec)
        observed = await driver.start(spec)
    return {"observed": msgspec.to_builtins(observed)}


async def _halt(task: Task) -> Facts:
    most_s = SICK_STOP_S if task.operation == RECYCLE else MAX_STOP_TIMEOUT_S
    exit = await task.tools.halts.halt(task.assignment.claim, most_s)
    return {"exit": msgspec.to_builtins(exit)} if exit is not None else {}


async def _remove(task: Task) -> Facts:
    await task.tools.driver.destroy(task.machine_id)
    return {}


async def _free(task: Task) -> Facts:
    await free(task.tools.kv, task.tools.host.name, task.assignment.claim)
    return {}


Act = Callable[[Task], Awaitable[Facts]]

DO: dict[str, Act] = {
    SOURCE.name: _source,
    VOLUMES.name: _attach_volumes,
    MAKE.name: _make,
    RUN.name: _run,
    HALT.name: _halt,
    REMOVE.name: _remove,
    RELEASE.name: _detach_volumes,
    FREE.name: _free,
}
UNDO: dict[str, Act] = {VOLUMES.name: _detach_volumes, MAKE.name: _remove, RUN.name: _halt}


# --------------------------------------------------------------------------- the executor


def begin(tools: Tools, run_id: str, job: Job) -> None:
    """Open a run: from here on it will be finished, whatever happens to flyd."""
    data = msgspec.to_builtins(job)
    tools.run_log.append(RunEvent(run_id=run_id, sequence=0, kind=BEGIN, data=data))


def job_of(run_log: RunLog, run_id: str) -> Job:
    """What a run is about."""
    return msgspec.convert(run_log.events(run_id)[0].data, Job)


def abandon(tools: Tools, run_id: str, reason: str) -> None:
    """Let a run that would leave a machine running fail at its next step: it is undone, not finished.

    For a run that an earlier flyd left open, of a machine that is no longer this host's.
    """
    job, events = job_of(tools.run_log, run_id), tools.run_log.events(run_id)
    if job.operation in ENDING:
        return
    match next_action(OPERATIONS[job.operation], events):
        case Do(step=step):
            _enter(Task(tools, job.operation, job.assignment), run_id, job.operation, step.name)
            failed = RunEvent(
                run_id=run_id, sequence=len(events), kind=FAILED, step=step.name, data={"error": reason}
            )
            tools.run_log.append(failed)
        case _:
            return


async def execute(tools: Tools, run_id: str) -> None:
    """Walk a run from where its log stands to its end.

    Raises what an undo raises (the run stays open) and InvariantBroken; the failure of a
    step is no exception here but the run's outcome, in the machine's record.
    """
    job = job_of(tools.run_log, run_id)
    operation = OPERATIONS.get(job.operation)
    if operation is None:
        raise InvariantBroken(f"run {run_id} is of the unknown operation {job.operation}")
    while True:
        events = tools.run_log.events(run_id)
        facts = {name: fact for e in events if e.kind == DONE for name, fact in e.data.items()}
        task = Task(tools, job.operation, job.assignment, facts)
        match next_action(operation, events):
            case Do(step=step):
                _enter(task, run_id, job.operation, step.name)
                kind, data = await _attempt(task, step.name)
            case Undo(step=step):
                await UNDO[step.name](task)
                kind, data = UNDONE, {}
            case Finished(ok=ok, error=error, ended=ended):
                if not ended:
                    _settle(task, run_id, job.operation, ok, error)
                    tools.run_log.append(
                        RunEvent(run_id=run_id, sequence=len(events), kind=END, data={"ok": ok})
                    )
                return
        tools.run_log.append(
            RunEvent(run_id=run_id, sequence=len(events), kind=kind, step=step.name, data=data)
        )


def _enter(task: Task, run_id: str, operation: str, step: str) -> None:
    """Show the passing state that a step stands for; once, although a step may be done again."""
    trigger = ENTERS.get((operation, step))
    record = task.tools.records.get(task.machine_id)
    mark = f"{run_id}/{step}"
    if trigger is None or (record is not None and record.mark == mark):
        return
    if record is None:
        changed = decide.taken_on(task.assignment, trigger)
    else:
        changed = decide.entered(record, task.assignment, trigger, task.tools.clock.wall_s())
    task.tools.records.put(task.machine_id, msgspec.structs.replace(changed, mark=mark))


async def _attempt(task: Task, step: str) -> tuple[str, Facts]:
    """Do a step within the deadline of the machine's state; HALT has one of its own."""
    record = task.tools.records.get(task.machine_id)
    bounded = record is not None and step != HALT.name
    deadline_s = DEADLINES_S[record.state][0] if record is not None and bounded else None
    try:
        async with asyncio.timeout(deadline_s):
            return DONE, await DO[step](task)
    except InvariantBroken:
        raise
    except FlydError as error:
        hint = f" ({error.hint})" if error.hint else ""
        return FAILED, {"error": f"{step}: {error.message}{hint}"}
    except TimeoutError:
        return FAILED, {"error": f"{step}: not done within {deadline_s or 0:g} s"}
    except OSError as error:
        return FAILED, {"error": f"{step}: {error}"}


def _settle(task: Task, run_id: str, operation: str, ok: bool, error: str) -> None:
    """Write an operation's outcome to the machine's record; once."""
    records, machine_id = task.tools.records, task.machine_id
    record = records.get(machine_id)
    mark = f"{run_id}/{END}"
    if record is None or record.mark == mark:
        return
    if ok and operation == DESTROY:
        records.forget(machine_id)
        return
    exit = msgspec.convert(task.facts["exit"], ExitStatus) if "exit" in task.facts else None
    event = MachineEvent(
        type=EVENT_TYPES[operation], status="", at_s=task.tools.clock.wall_s(), source="flyd", exit=exit
    )
    if ok and operation == RECYCLE:
        changed = decide.recycled(record, event)
    elif ok:
        seen = task.facts.get("observed")
        observed = msgspec.convert(seen, Observed) if seen is not None else None
        changed = decide.succeeded(record, operation, observed, event)
    else:
        changed = decide.failed(record, error, event)
    records.put(machine_id, msgspec.structs.replace(changed, mark=mark))
