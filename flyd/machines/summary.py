"""A machine's status in one line, for errors and progress. Pure."""

from __future__ import annotations

from flyd.machines import restart
from flyd.model import MachineStatus


def last_known(status: MachineStatus | None) -> str:
    """What a machine's host last said: state, why, restarts, failing checks."""
    if status is None:
        return "its host has said nothing of it yet"
    parts = [f"state {status.state.value}"]
    if status.detail:
        parts.append(status.detail)
    if status.restarts:
        parts.append(f"{status.restarts} restarts")
    failing = (c for c in status.checks if c.status != "passing")
    parts += [f"check {c.name} {c.status}: {c.output or 'no output'}" for c in failing]
    return "; ".join(parts)


def how_it_ended(status: MachineStatus) -> str:
    """The last end of the machine's process; where none is known, what is known instead."""
    exits = [event.exit for event in status.events if event.exit is not None]
    return restart.describe(exits[-1]) if exits else last_known(status)
