"""Waiting, without a deploy, until new machines are well: for `fly scale count`. Called by the API.

`read_world` is the app as a mirror has it, for the deployer too. What well is, health.py decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from flyd.deploy.health import SMOKE_S, Readiness, Verdict, judge
from flyd.deploy.moves import World
from flyd.machines.leases import LEASES, MachineLease
from flyd.model import Machine, MachineStatus
from flyd.ports import Clock
from flyd.store import keys
from flyd.store.mirror import Mirror


async def watch_readiness(
    mirror: Mirror, app: str, machine_ids: Sequence[str], timeout_s: float, clock: Clock
) -> AsyncIterator[tuple[Readiness, ...]]:
    """All of them, at once and again whenever one has changed, until none waits any more or time is over."""
    began_s = clock.monotonic_s()
    known: dict[str, None] = {}  # this flyd may hear of them a moment later than the one that made them
    told: tuple[Readiness, ...] | None = None
    while True:
        version = mirror.version
        waited_s = clock.monotonic_s() - began_s
        world = read_world(mirror, app, waited_s)
        known.update(dict.fromkeys(m for m in machine_ids if m in world.machines))
        seen = tuple(judge(m, world) if m in known else _unheard(m) for m in machine_ids)
        if seen != told:
            told = seen
            yield seen
        if waited_s >= timeout_s or not any(one.verdict is Verdict.WAITING for one in seen):
            return
        try:
            async with asyncio.timeout(min(timeout_s - waited_s, SMOKE_S)):
                await mirror.wait_change(version)
        except TimeoutError:
            continue  # verdicts depend on time, too


def read_world(mirror: Mirror, app: str, waited_s: float) -> World:
    """One app as the mirror has it."""
    machines = mirror.list(f"{keys.MACHINES}{app}/", Machine)
    statuses = mirror.list(f"{keys.STATUS}{app}/", MachineStatus)
    return World(
        machines={item.value.id: item.value for item in machines},
        statuses={item.value.id: item.value for item in statuses},
        leases={item.value.machine: item.value for item in mirror.list(f"{LEASES}{app}/", MachineLease)},
        alive=tuple(keys.last_part(item.key) for item in mirror.list(keys.ALIVE, bytes)),
        waited_s=waited_s,
    )


def _unheard(machine_id: str) -> Readiness:
    return Readiness(machine_id=machine_id, verdict=Verdict.WAITING, said="this flyd has not heard of it yet")
