"""Whether a machine that somebody waits for is well, never will be, or may still become so.

Pure; called by rollout.py for deploys, drain.py for drains, readiness.py for scaling. Invariants:
a machine with checks is healthy only once all of them have passed; one without checks only once it
has run SMOKE_S without ending, since having started says nothing. A machine that keeps ending has
failed, without waiting for the deadline.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from flyd.deploy.moves import World, find, hopeless
from flyd.machines.summary import how_it_ended, last_known
from flyd.model import Desired, MachineConfig, MachineState, MachineStatus, Value

SMOKE_S = 2.0
"""How long a machine without checks has to run before it counts as healthy."""

MAX_RESTARTS = 3
"""Restarts of a machine with checks that a deploy puts up with (it may wait for a database)."""

MAX_FAILED_ATTEMPTS = 3
"""Failed attempts of a host to create or start a machine, after which it is given up."""


class Verdict(StrEnum):
    """Whether to wait for a machine any longer."""

    WAITING = "waiting"
    HEALTHY = "healthy"
    FAILED = "failed"


class Readiness(Value, frozen=True, kw_only=True):
    """How far one machine is. `said`: what its host last said of it, or why it failed."""

    machine_id: str
    verdict: Verdict
    region: str = ""
    host: str = ""
    said: str = ""


def judge(machine_id: str, world: World) -> Readiness:
    """One machine after `waited_s`; a machine that is not there has failed."""
    machine, status = find(world, machine_id)
    if machine is None or machine.desired is Desired.DESTROYED:
        return Readiness(machine_id=machine_id, verdict=Verdict.FAILED, said="was destroyed by somebody else")
    seen = Readiness(
        machine_id=machine_id,
        verdict=Verdict.WAITING,
        region=machine.region,
        host=machine.host,
        said=last_known(status),
    )
    if is_healthy(machine.config, status, world.waited_s):
        return msgspec.structs.replace(seen, verdict=Verdict.HEALTHY)
    failed = hopeless(machine, status, world) or failure(machine.config, status)
    return msgspec.structs.replace(seen, verdict=Verdict.FAILED, said=failed) if failed else seen


def is_healthy(config: MachineConfig, status: MachineStatus | None, waited_s: float) -> bool:
    """Started, all checks passed; without checks: has run a moment and never ended."""
    if status is None or not status.healthy():
        return False
    expected = _check_count(config)
    if expected:
        return len(status.checks) >= expected
    return status.restarts == 0 and waited_s >= SMOKE_S


def failure(config: MachineConfig, status: MachineStatus | None) -> str:
    """Why the machine will not become healthy; empty while it may."""
    if status is None:
        return ""
    if status.state is MachineState.STOPPED:
        return f"ended instead of serving: {how_it_ended(status)}"
    allowed = MAX_RESTARTS if _check_count(config) else 1
    if status.restarts >= allowed:
        return f"keeps ending ({status.restarts} restarts): {how_it_ended(status)}"
    return gave_up(status)


def gave_up(status: MachineStatus | None) -> str:
    """Why the host can not run it at all; empty while it still tries."""
    if status is None:
        return ""
    if status.state in (MachineState.DESTROYING, MachineState.DESTROYED):
        return "was destroyed"
    attempts = [e for e in status.events if e.status == MachineState.FAILED.value]
    if status.state is MachineState.FAILED and len(attempts) >= MAX_FAILED_ATTEMPTS:
        return f"could not be run, tried {len(attempts)} times: {attempts[-1].detail or last_known(status)}"
    return ""


def exit_code(status: MachineStatus) -> int | None:
    """The exit code of the machine's last run; None if a signal ended it or nobody saw it."""
    exits = [event.exit for event in status.events if event.exit is not None]
    return exits[-1].code if exits else None


def _check_count(config: MachineConfig) -> int:
    return len(config.checks) + sum(len(service.checks) for service in config.services)
