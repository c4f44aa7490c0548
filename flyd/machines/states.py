"""The lifecycle of a machine as one table: (state, trigger) -> state.

Owns which change is legal, how long a state that should pass may last, and the diagram
in docs/machines.md (generated from the table, so it can not lie). After Fly's table, without
suspend (no driver here keeps a machine's memory). `None` is "not known on this host yet".

A missing key is a typed error: `Conflict` where somebody asked for it, `InvariantBroken`
where our own report does not fit. Called by operations.py and host.py. Decides nothing
about *when* to change: that is decide.py.
"""

from __future__ import annotations

from enum import StrEnum

from flyd.errors import Conflict, InvariantBroken
from flyd.model import MachineState as S


class Trigger(StrEnum):
    """What can happen to a machine. Requests first, then reports."""

    CREATE = "create"
    START = "start"
    STOP = "stop"
    RESTART = "restart"
    UPDATE = "update"
    DESTROY = "destroy"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    EXITED = "exited"  # the process ended and policy says that it stays so


REQUESTS = frozenset(
    {Trigger.CREATE, Trigger.START, Trigger.STOP, Trigger.RESTART, Trigger.UPDATE, Trigger.DESTROY}
)

TRANSITIONS: dict[tuple[S | None, Trigger], S] = {
    (None, Trigger.CREATE): S.CREATED,
    (None, Trigger.DESTROY): S.DESTROYING,
    (S.CREATED, Trigger.SUCCEEDED): S.CREATED,
    (S.CREATED, Trigger.FAILED): S.FAILED,
    (S.CREATED, Trigger.START): S.STARTING,
    (S.CREATED, Trigger.STOP): S.STOPPING,
    (S.CREATED, Trigger.UPDATE): S.REPLACING,
    (S.CREATED, Trigger.DESTROY): S.DESTROYING,
    (S.STARTING, Trigger.SUCCEEDED): S.STARTED,
    (S.STARTING, Trigger.FAILED): S.FAILED,
    (S.STARTED, Trigger.STOP): S.STOPPING,
    (S.STARTED, Trigger.RESTART): S.RESTARTING,
    (S.STARTED, Trigger.EXITED): S.STOPPED,
    (S.STARTED, Trigger.UPDATE): S.REPLACING,
    (S.STARTED, Trigger.DESTROY): S.DESTROYING,
    (S.RESTARTING, Trigger.START): S.STARTING,
    (S.RESTARTING, Trigger.FAILED): S.FAILED,
    (S.RESTARTING, Trigger.EXITED): S.STOPPED,
    (S.RESTARTING, Trigger.STOP): S.STOPPING,
    (S.RESTARTING, Trigger.UPDATE): S.REPLACING,
    (S.RESTARTING, Trigger.DESTROY): S.DESTROYING,
    (S.REPLACING, Trigger.SUCCEEDED): S.STOPPED,
    (S.REPLACING, Trigger.FAILED): S.FAILED,
    (S.STOPPING, Trigger.SUCCEEDED): S.STOPPED,
    (S.STOPPING, Trigger.FAILED): S.FAILED,
    (S.STOPPED, Trigger.START): S.STARTING,
    (S.STOPPED, Trigger.STOP): S.STOPPING,
    (S.STOPPED, Trigger.UPDATE): S.REPLACING,
    (S.STOPPED, Trigger.DESTROY): S.DESTROYING,
    (S.FAILED, Trigger.CREATE): S.CREATED,
    (S.FAILED, Trigger.START): S.STARTING,
    (S.FAILED, Trigger.STOP): S.STOPPING,
    (S.FAILED, Trigger.UPDATE): S.REPLACING,
    (S.FAILED, Trigger.DESTROY): S.DESTROYING,
    (S.DESTROYING, Trigger.SUCCEEDED): S.DESTROYED,
    (S.DESTROYING, Trigger.FAILED): S.FAILED,
}

MAX_STOP_TIMEOUT_S = 86_400.0
STOP_MARGIN_S = 30.0

# How long one step may take while the machine is in a passing state, and what is then reported.
# The step that stops a machine has the machine's own stop timeout and STOP_MARGIN_S instead
# (halts.py). RESTARTING also covers the back-off before a restart by policy, which has its own
# bound (restart.BACKOFF_MAX_S); CREATED is passing only while its CREATE runs.
DEADLINES_S: dict[S, tuple[float, Trigger]] = {
    S.CREATED: (300.0, Trigger.FAILED),  # fetching a source tree from another host
    S.STARTING: (60.0, Trigger.FAILED),
    S.STOPPING: (60.0, Trigger.FAILED),
    S.RESTARTING: (60.0, Trigger.FAILED),
    S.REPLACING: (300.0, Trigger.FAILED),  # as CREATED
    S.DESTROYING: (300.0, Trigger.FAILED),  # removing a large file system
}


def advance(state: S | None, trigger: Trigger) -> S:
    """The state after `trigger`; a typed error if the table has no such row."""
    after = TRANSITIONS.get((state, trigger))
    if after is not None:
        return after
    shown = state.value if state is not None else "unknown to this host"
    if trigger not in REQUESTS:
        raise InvariantBroken(f"machine is {shown}, which '{trigger.value}' can not follow")
    allowed = sorted(t.value for (s, t) in TRANSITIONS if s == state and t in REQUESTS)
    raise Conflict(
        f"can not {trigger.value} a machine that is {shown}",
        hint=f"possible now: {', '.join(allowed)}" if allowed else "nothing can be done with it any more",
    )


def diagram() -> str:
    """The table as a mermaid state diagram."""
    lines = ["stateDiagram-v2"]
    for (before, trigger), after in TRANSITIONS.items():
        lines.append(f"    {before.value if before else '[*]'} --> {after.value}: {trigger.value}")
    lines.append(f"    {S.DESTROYED.value} --> [*]")
    return "\n".join(lines) + "\n"
