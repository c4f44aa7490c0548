"""Carries out drains: one look at each, its acts, and the record of how far it is.

Part of the elected repairer (repairs.py), under its guard. Decides nothing: drain.py does. An act is
noted in the drain's record before it happens, and repeating it changes nothing, so a repairer that
dies between any two writes is carried on by the next one. How long a step has been waited for is
counted here and begins again with a new leader: late, never early.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
import structlog

from flyd.deploy.releases import DeployRun, RunState
from flyd.errors import Conflict, InvariantBroken, NotFound, Unavailable, Unplaceable
from flyd.machines import commands, leases
from flyd.machines.leases import MachineLease
from flyd.model import App, Desired, Machine, MachineStatus, encode
from flyd.model.cluster import Drain, DrainLine, DrainState
from flyd.placement import drain as decisions
from flyd.placement.drain import (
    Act,
    Halt,
    KeepOut,
    Outlook,
    Place,
    Retire,
    Scene,
    Shift,
    Step,
    TakeBack,
    TakeOut,
)
from flyd.placement.moves import move
from flyd.placement.placer import Placer
from flyd.ports import KV, Clock, Delete, Entropy, Put, Unchanged
from flyd.store import keys
from flyd.store.mirror import Mirror, Versioned

log = structlog.get_logger(__name__)

LOOK_EVERY_S = 0.25
LOOK_AT_LEAST_S = 1.0  # waits end by time, too
RETRY_S = 1.0
MAX_LINES = 200
CAUGHT_UP_WITHIN_S = 5.0
NO_LEASE = ""  # the nonce of who holds none: refused while somebody else does


class Drains:
    """All drains of the cluster, by the repairer that leads."""

    def __init__(self, kv: KV, mirror: Mirror, placer: Placer, *, clock: Clock, entropy: Entropy) -> None:
        self._kv = kv
        self._mirror = mirror
        self._placer = placer
        self._clock = clock
        self._entropy = entropy
        self._since: dict[tuple[str, str], tuple[str, float]] = {}  # (drain, machine) -> phase, since when

    async def keep(self, guard: Unchanged) -> None:
        """Carry all drains on, until cancelled."""
        self._since.clear()
        while True:
            version = self._mirror.version
            found = self._mirror.list(keys.DRAINS, Drain)
            going_on = {held.value.id for held in found}
            self._since = {at: seen for at, seen in self._since.items() if at[0] in going_on}
            try:
                for held in found:
                    await self._look(held, guard)
            except (Unavailable, Conflict) as error:
                log.warning("drains.look_failed", error=error.message)
                await asyncio.sleep(RETRY_S)
            await asyncio.sleep(LOOK_EVERY_S)
            at_work = any(held.value.state is not DrainState.DRAINED for held in found)
            await wait_change(self._mirror, version, LOOK_AT_LEAST_S if at_work else None)

    async def _look(self, held: Versioned[Drain], guard: Unchanged) -> None:
        """One look at one drain."""
        scene = self._scene(held.value)
        view = decisions.outlook(scene)
        lost = self._alive(held.value.host).mod_revision == 0
        steps = tuple(s for s in view.steps if not lost or isinstance(s.act, TakeBack))
        if not view.steps and held.value.state is DrainState.CANCELLED:
            await self._write(held.key, held.mod_revision, None, guard)
            return
        begun = scene.drain
        for step in steps:
            begun = decisions.noted(begun, step.act) if step.act else begun
        revision = held.mod_revision
        if begun != held.value:
            revision = await self._write(held.key, revision, begun, guard)
        doing: list[str] = []
        said: list[str] = []
        for step in steps:
            said_now, doing_now = await self._carry_out(step, begun, guard)
            said += [said_now] if said_now else []
            doing += [doing_now] if doing_now else []
        if lost and view.steps:
            doing.append(f"host {begun.host} is lost: its machines are moved when its grace has passed")
        ended = self._reported(begun, view, doing, said)
        if ended != begun:
            revision = await self._write(held.key, revision, ended, guard)
        if revision != held.mod_revision or any(step.act for step in steps):
            await wait_caught_up(self._kv, self._mirror)

    def _alive(self, host: str) -> Unchanged:
        """The host's sign of life, as a compare; revision 0: it gives none."""
        found = self._mirror.get(keys.alive(host), bytes)
        return Unchanged(keys.alive(host), found.mod_revision if found is not None else 0)

    def _scene(self, drain: Drain) -> Scene:
        claims = self._mirror.list(keys.MACHINES, Machine)
        machines = {item.value.id: item.value for item in claims}
        statuses = {item.value.id: item.value for item in self._mirror.list(keys.STATUS, MachineStatus)}
        runs = self._mirror.list(keys.RUNS, DeployRun)
        drain = decisions.settled(drain, machines)
        held = {item.value.machine: item.value for item in self._mirror.list(leases.LEASES, MachineLease)}
        return Scene(
            drain=drain,
            machines=machines,
            statuses=statuses,
            apps={item.value.name: item.value for item in self._mirror.list(keys.APPS, App)},
            deploying=tuple(sorted({r.value.app for r in runs if r.value.state is RunState.RUNNING})),
            waited_s={
                item.value.id: self._waited_s(drain, item, machines, held=item.value.id in held)
                for item in claims
                if item.value.host == drain.host
            },
            leases=held,
        )

    def _waited_s(
        self, drain: Drain, claim: Versioned[Machine], machines: dict[str, Machine], *, held: bool
    ) -> float:
        machine_id, now_s = claim.value.id, self._clock.monotonic_s()
        status = self._mirror.get(keys.status(claim.value.app, machine_id), bytes)
        known = f"{claim.mod_revision}/{status.mod_revision if status is not None else 0}"
        phase = decisions.phase_of(machine_id, drain, machines, known, held=held)
        before = self._since.get((drain.id, machine_id))
        if before is None or before[0] != phase:
            self._since[drain.id, machine_id] = before = (phase, now_s)
        return now_s - before[1]

    def _reported(self, drain: Drain, view: Outlook, doing: Sequence[str], said: Sequence[str]) -> Drain:
        """The record with what was done, what is being done and what stays."""
        state = drain.state
        if state is not DrainState.CANCELLED:
            state = DrainState.DRAINING if view.steps else DrainState.DRAINED
        lines = [*said]
        if state is DrainState.DRAINED and drain.state is DrainState.DRAINING:
            stays = f"; {len(view.left)} machines stay" if view.left else ""
            lines.append(f"nothing is left to move off {drain.host}{stays}")
        at_s = self._clock.wall_s()
        told = (*drain.lines, *(DrainLine(at_s=at_s, text=text) for text in lines))
        return msgspec.structs.replace(
            drain, state=state, doing=tuple(doing), left=view.left, lines=told[-MAX_LINES:]
        )

    async def _carry_out(self, step: Step, drain: Drain, guard: Unchanged) -> tuple[str, str]:
        """The line to tell when the step's act is done, and what is being done or waited for."""
        if step.act is None:
            return "", step.doing
        try:
            await self._act(step.act, drain, guard)
        except Unplaceable as error:
            return "", error.message
        except NotFound:
            return "", ""  # somebody else has destroyed it
        return step.line, step.doing

    async def _act(self, act: Act, drain: Drain, guard: Unchanged) -> None:
        """Have the act's effect, or find it there."""
        kv, guards = self._kv, (guard,)
        match act:
            case Place(orders=orders):
                await self._place(act, guards)
                log.info("drains.placed", host=drain.host, machine=orders[0].machine_id)
            case KeepOut(machine=machine):
                await commands.set_cordoned(kv, machine.app, machine.id, True, guards=guards)
            case TakeOut(machine=machine):
                await commands.set_cordoned(kv, machine.app, machine.id, True, nonce=NO_LEASE, guards=guards)
            case Retire(machine=machine):
                gone = Desired.DESTROYED
                await commands.set_desired(kv, machine.app, machine.id, gone, nonce=NO_LEASE, guards=guards)
            case TakeBack(old=old, machine=new):
                if old is not None:
                    await commands.set_cordoned(kv, old.app, old.id, False, guards=guards)
                if new is not None:
                    await commands.set_desired(kv, new.app, new.id, Desired.DESTROYED, guards=guards)
            case Shift(move=wanted):
                why = f"host {drain.host} is being drained"
                unleased = await leases.guard(kv, wanted.machine.app, wanted.machine.id, NO_LEASE)
                guards = (guard, unleased, self._alive(drain.host))
                await move(kv, wanted, why, clock=self._clock, entropy=self._entropy, guards=guards)
            case Halt(machine=machine):
                await commands.set_desired(kv, machine.app, machine.id, Desired.STOPPED, guards=guards)

    async def _place(self, act: Place, guards: tuple[Unchanged, ...]) -> None:
        refused: Unplaceable | None = None
        for order in act.orders:
            try:
                await self._placer.place(order, guards=guards)
                return
            except Unplaceable as error:
                refused = error
        if refused is None:
            raise InvariantBroken(f"nowhere to place a replacement of machine {act.old.id}")
        raise refused

    async def _write(self, key: str, revision: int, drain: Drain | None, guard: Unchanged) -> int:
        """Write (or, None, remove) the record if it is still as it was read; the new revision."""
        effect = Delete(key) if drain is None else Put(key, encode(drain))
        result = await self._kv.txn((guard, Unchanged(key, revision)), (effect,))
        if not result.succeeded:
            raise Conflict(f"{key} was changed, or another repairer leads now")
        return result.revision


async def wait_change(mirror: Mirror, version: int, timeout_s: float | None) -> None:
    """Return when the mirror is no longer at `version`, or after that long."""
    try:
        async with asyncio.timeout(timeout_s):
            await mirror.wait_change(version)
    except TimeoutError:
        return


async def wait_caught_up(kv: KV, mirror: Mirror) -> None:
    """Return once the mirror shows all that etcd has by now, so that nothing is decided twice."""
    revision = (await kv.list(keys.DRAINS)).revision
    try:
        async with asyncio.timeout(CAUGHT_UP_WITHIN_S):
            while mirror.revision < revision:
                await mirror.wait_change(mirror.version)
    except TimeoutError:
        return
