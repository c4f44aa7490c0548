"""Runs one world with one seed; knows the worlds by name.

A run's structlog lines go into its trace. Called by __main__.py (the replay command) and by
the tests; `replay_command` is what a failing test prints.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, MutableMapping
from functools import partial
from typing import Any, NoReturn

import structlog

from tests.simulation.loop import Finished, current, run_to_end
from tests.simulation.machines_world import MachinesWorld
from tests.simulation.postgres_members import MembersWorld
from tests.simulation.postgres_world import PostgresWorld
from tests.simulation.volumes_world import VolumesWorld

LIMIT_S = 600.0


async def _postgres(faults_s: float | None) -> str:
    return await (PostgresWorld(faults_s) if faults_s else PostgresWorld()).run()


async def _volumes(faults_s: float | None) -> object:
    return await (VolumesWorld(faults_s) if faults_s else VolumesWorld()).run()


async def _members(faults_s: float | None) -> str:
    return await MembersWorld(faults_s).run()


async def _machines(faults_s: float | None) -> object:
    return await (MachinesWorld(faults_s=faults_s) if faults_s else MachinesWorld()).run()


WORLDS: dict[str, Callable[[float | None], Coroutine[Any, Any, object]]] = {
    "machines": _machines,
    "postgres": _postgres,
    "members": _members,
    "volumes": _volumes,
}


def replay_command(world: str, seed: int, minutes: float | None = None) -> str:
    """What to type to see that run again."""
    length = f" --minutes {minutes:g}" if minutes else ""
    return f"python -m tests.simulation --world {world} --seed {seed}{length} --trace"


def _into_trace(_logger: object, level: str, event: MutableMapping[str, Any]) -> NoReturn:
    name = event.pop("event", "")
    fields = " ".join(f"{key}={event[key]}" for key in sorted(event))
    current().note(f"[{level}] {name} {fields}")
    raise structlog.DropEvent


def simulate(main: Callable[[], Coroutine[Any, Any, Any]], seed: int, limit_s: float = LIMIT_S) -> Finished:
    """Run a world's main function; its log lines become part of the trace."""
    before = structlog.get_config()
    structlog.configure(processors=[_into_trace], cache_logger_on_first_use=False)
    try:
        return run_to_end(seed, main, limit_s)
    finally:
        structlog.configure(**before)


def run_world(world: str, seed: int, faults_s: float | None = None) -> Finished:
    """One run of a world; `faults_s`: for how long things break, None: the world's own, short time."""
    return simulate(partial(WORLDS[world], faults_s), seed, LIMIT_S + (faults_s or 0.0))
