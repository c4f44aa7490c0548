"""The elected deployer: walks every open run, one move at a time.

Runs inside a leadership scope (store/leader.py) and ends with it. Invariants: each write
carries the leader's guard and the run's revision in its compares, so the move of a deposed
deployer, or one decided on an old view, changes nothing; a move's effect comes before the
record that it is done, and repeating an effect finds it (machine ids follow from the run),
so a deployer that dies between any two writes is carried on by the next one.

Decides nothing: rollout.py does. Several apps are walked side by side, each by its own task.
How long a step has been waited for is counted here, on the monotonic clock, and begins
again with a new deployer: a deadline may then be late, never early.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import structlog

from flyd.deploy import moves, plan, rollout
from flyd.deploy.ports import given_back
from flyd.deploy.readiness import read_world
from flyd.deploy.releases import MAX_LINES, DeployRun, Phase, Release, ReleaseStatus, RunLine, RunState
from flyd.errors import Conflict, FlydError, InvariantBroken, NotFound, Unavailable, Unplaceable
from flyd.machines import commands
from flyd.model import App, Desired, Machine, decode, encode
from flyd.placement.placer import Placer
from flyd.ports import KV, Clock, Delete, Put, Unchanged
from flyd.store import keys
from flyd.store.mirror import Mirror, Versioned

LAST_LINES = 20
"""Lines of a failed machine that are kept in the run's error."""

LAST_LINES_TIMEOUT_S = 5.0
"""How long a machine's host has to give them."""

RETRY_MIN_S = 0.2
RETRY_MAX_S = 5.0

PLACE_AGAIN_S = 1.0
"""Between two attempts to place a machine for which there is no room yet."""

SHORTEST_LOOK_S = 0.01
"""Between two looks at an unchanged world, so that a rounded deadline does not spin."""

NO_LEASE = ""
"""The nonce of who holds no lease: refused while somebody else does."""

LastLines = Callable[[Machine, int], Awaitable[Sequence[str]]]
"""The last lines that a machine printed; raises Unavailable where its host is away."""

log = structlog.get_logger(__name__)


class Deployer:
    """One flyd's deployer. The mirror must hold ALIVE, MACHINES, STATUS, LEASES, RELEASES and RUNS."""

    def __init__(
        self, kv: KV, mirror: Mirror, placer: Placer, *, clock: Clock, last_lines: LastLines
    ) -> None:
        self._kv = kv
        self._mirror = mirror
        self._clock = clock
        self._placer = placer
        self._last_lines = last_lines
        self._since: dict[str, tuple[tuple[Phase, int], float]] = {}  # run -> its step, when first seen

    async def keep_deploying(self, guard: Unchanged) -> None:
        """Walk all runs, until leadership ends (cancels) this."""
        self._since.clear()
        walks: dict[str, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                version = self._mirror.version
                for run in self._mirror.list(keys.RUNS, DeployRun):
                    walked = run.key in walks and not walks[run.key].done()
                    if run.value.state is RunState.RUNNING and not walked:
                        walks[run.key] = group.create_task(self._walk(run.key, guard), name=run.key)
                await self._mirror.wait_change(version)

    async def _walk(self, run_key: str, guard: Unchanged) -> None:
        """One run to its end."""
        retry_s = RETRY_MIN_S
        while True:
            version = self._mirror.version
            run = self._mirror.get(run_key, DeployRun)
            if run is None or run.value.state is not RunState.RUNNING:
                self._since.pop(run_key, None)
                return
            try:
                look_again_s = await self._move(run, guard)
                retry_s = RETRY_MIN_S
            except (Unavailable, Conflict) as error:
                if retry_s == RETRY_MIN_S:
                    log.warning("deploy.step_failed", app=run.value.app, run=run.value.id, error=str(error))
                await asyncio.sleep(retry_s)
                retry_s = min(retry_s * 2, RETRY_MAX_S)
                continue
            await self._wait_change(version, look_again_s)

    async def _wait_change(self, version: int, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._mirror.wait_change(version)
        except TimeoutError:
            return  # a deadline may have passed: look again

    async def _move(self, held: Versioned[DeployRun], guard: Unchanged) -> float:
        """Decide and do one move; how long the view may stay the same before the next look."""
        run = held.value
        guards = (guard, Unchanged(held.key, held.mod_revision))
        found = self._mirror.get(keys.release(run.app, run.version), Release)
        if found is None:
            lost = msgspec.structs.replace(run, error=f"release {run.version} is gone from etcd")
            await self._record(_ended(lost, RunState.FAILED), None, guards)
            return RETRY_MAX_S
        release = found.value
        world = self._world(held.key, run)
        move = rollout.next_step(run, release, world)
        match move:
            case moves.Wait():
                if move.doing and move.doing != run.doing:
                    told = self._with_lines(run, move.doing)
                    await self._record(told, release, guards, doing=move.doing)
                return max(move.look_again_s, SHORTEST_LOOK_S)
            case moves.Finish():
                status = _RELEASE_STATUS[move.state]
                release = msgspec.structs.replace(release, status=status)
                ended = self._with_lines(_ended(run, move.state), _verdict(run, move.state))
                claims, freed = await self._ports_given_back(run, release)
                if move.state is RunState.FAILED:
                    compares, puts = await self._regions_given_back(run)
                    claims, freed = [*claims, *compares], [*freed, *puts]
                effect = Put(keys.release(run.app, run.version), encode(release))
                await self._record(ended, release, (*guards, *claims), effect, *freed)
            case moves.Plan():
                count = sum(1 for slot in move.slots if slot.wanted)
                planned = msgspec.structs.replace(run, phase=Phase.ROLLING, slots=move.slots, done=0)
                line = f"release {run.version}: {count} machines in {', '.join(run.regions)}"
                await self._record(self._with_lines(planned, line), release, guards)
            case _:
                outcome = await self._act(run, move, world.waited_s, guards)
                if isinstance(outcome, moves.Wait):
                    return outcome.look_again_s
                if isinstance(outcome, moves.Undo):
                    changed = await self._undoing(run, outcome)
                else:
                    done = run.done + (move.steps if isinstance(move, moves.Advance) else 1)
                    changed = self._with_lines(msgspec.structs.replace(run, done=done), outcome)
                await self._record(changed, release, guards)
        return RETRY_MAX_S

    async def _act(
        self, run: DeployRun, move: moves.Move, waited_s: float, guards: tuple[Unchanged, ...]
    ) -> str | moves.Undo | moves.Wait:
        """Have the move's effect, or find it there; a line worth keeping, or what to do instead."""
        kv = self._kv
        try:
            match move:
                case moves.Place():
                    machine = await self._place(move, guards)
                    return (
                        f"{machine.region}: placed machine {machine.id} ({machine.config.process_group}, "
                        f"release {machine.release}) on {machine.host}"
                    )
                case moves.Cordon(machine_id=machine_id, cordoned=cordoned):
                    nonce = NO_LEASE if move.asks else None
                    await commands.set_cordoned(kv, run.app, machine_id, cordoned, nonce=nonce, guards=guards)
                case moves.Destroy(machine_id=machine_id):
                    nonce, gone = NO_LEASE if move.asks else None, Desired.DESTROYED
                    await commands.set_desired(kv, run.app, machine_id, gone, nonce=nonce, guards=guards)
                case moves.Advance():
                    return move.note
                case moves.Undo():
                    return move
                case _:
                    raise InvariantBroken(f"run {run.id} of app {run.app}: no effect for {move!r}")
        except Unplaceable as error:
            if isinstance(move, moves.Place) and waited_s < move.waits_s(error.lost):
                return moves.Wait(look_again_s=PLACE_AGAIN_S)
            if isinstance(move, moves.Place) and run.phase is Phase.UNDOING:
                return f"{move.given_up}: {error.message}"
            return moves.Undo(error=error.message, reasons=error.reasons)
        except NotFound:
            return ""  # somebody else has destroyed it and it is free already
        return ""

    async def _place(self, wanted: moves.Place, guards: tuple[Unchanged, ...]) -> Machine:
        """By the first order that finds room; Unplaceable as the first one says."""
        refused: Unplaceable | None = None
        for order in wanted.orders:
            try:
                return await self._placer.place(order, guards=guards)
            except Unplaceable as error:
                refused = refused or error
        if refused is None:
            raise InvariantBroken(f"nowhere to place {wanted!r}")
        raise refused

    async def _ports_given_back(
        self, run: DeployRun, release: Release
    ) -> tuple[list[Unchanged], list[Delete]]:
        """What the end of a run does to the app's claims of edge ports."""
        in_force: Release | None = release
        if release.status is not ReleaseStatus.COMPLETE:
            before = self._mirror.get(keys.release(run.app, run.previous_version), Release)
            in_force = before.value if before is not None else None
        claims = (await self._kv.list(keys.PORTS)).items
        return given_back(run.app, in_force.config if in_force else None, claims)

    async def _regions_given_back(self, run: DeployRun) -> tuple[list[Unchanged], list[Put]]:
        """What makes the app's regions those from before the run, unless somebody has changed them since."""
        record = await self._kv.get(keys.app(run.app))
        if record is None or run.previous_regions is None:
            return [], []
        app = decode(record.value, App)
        if app.regions != run.regions:
            return [], []
        before = msgspec.structs.replace(app, regions=run.previous_regions)
        return [Unchanged(record.key, record.mod_revision)], [Put(record.key, encode(before))]

    async def _undoing(self, run: DeployRun, undo: moves.Undo) -> DeployRun:
        """The run turned round, its error complete with what the failed machine last printed."""
        error = undo.error
        machine = self._mirror.get(keys.machine(run.app, undo.machine_id), Machine)
        if machine is not None:
            error += await self._lines_of(machine.value)
        turned = msgspec.structs.replace(
            run, phase=Phase.UNDOING, done=0, reached=run.done + 1, error=error, reasons=undo.reasons
        )
        return self._with_lines(turned, f"failed: {error}", "walking back")

    async def _lines_of(self, machine: Machine) -> str:
        try:
            async with asyncio.timeout(LAST_LINES_TIMEOUT_S):
                lines = await self._last_lines(machine, LAST_LINES)
        except (FlydError, TimeoutError) as error:
            return f"\n(its last lines could not be read from {machine.host}: {error or 'no answer'})"
        if not lines:
            return "\n(it printed nothing)"
        return "\n" + "\n".join(f"  {machine.id}> {line}" for line in lines)

    def _world(self, run_key: str, run: DeployRun) -> moves.World:
        """The app as the mirror has it, and how long the run's step has been the current one."""
        now_s = self._clock.monotonic_s()
        step = (run.phase, run.done)
        seen, since_s = self._since.get(run_key, (None, now_s))
        if seen != step:
            since_s = now_s
            self._since[run_key] = (step, now_s)
        return read_world(self._mirror, run.app, now_s - since_s)

    def _with_lines(self, run: DeployRun, *texts: str) -> DeployRun:
        now_s = self._clock.wall_s()
        lines = (*run.lines, *(RunLine(at_s=now_s, text=text) for text in texts if text))
        return msgspec.structs.replace(run, lines=lines[-MAX_LINES:])

    async def _record(
        self,
        run: DeployRun,
        release: Release | None,
        guards: tuple[Unchanged, ...],
        *effects: Put | Delete,
        doing: str = "",
    ) -> None:
        """Write the run if it is still as it was read, and wait until the mirror shows it."""
        step = plan.current_step(run, release) if release is not None else None
        doing = doing or (step.words() if step is not None else run.phase.value)
        run = msgspec.structs.replace(run, doing=doing, updated_at_s=self._clock.wall_s())
        key = keys.run(run.app, run.id)
        result = await self._kv.txn(guards, (Put(key, encode(run)), *effects))
        if not result.succeeded:
            raise Conflict(f"run {run.id} of app {run.app} was changed, or another deployer leads now")
        while self._mirror.revision < result.revision:
            await self._mirror.wait_change(self._mirror.version)


_RELEASE_STATUS = {RunState.COMPLETE: ReleaseStatus.COMPLETE, RunState.FAILED: ReleaseStatus.FAILED}


def _ended(run: DeployRun, state: RunState) -> DeployRun:
    return msgspec.structs.replace(run, state=state, phase=Phase.ENDED, done=0)


def _verdict(run: DeployRun, state: RunState) -> str:
    if state is RunState.COMPLETE:
        return f"release {run.version} is complete"
    if run.previous_version:
        return f"release {run.version} failed and was undone; release {run.previous_version} is what runs"
    return f"release {run.version} failed and was undone; nothing of it is left running"
