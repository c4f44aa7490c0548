"""What a deploy does next: one small step at a time, or the way back. Pure.

`next_step` looks at the run, the release and the world and answers with one move. Each
step has one judging function, in the table `JUDGES`; a judge looks at what is, not at what
it did before, so a step repeated after a crash finds its own effect and goes on.

Forward, any failure is an `Undo`; on the way back nothing fails any more: what can not be
put back is said in the run's lines and the walk goes on, so that every run ends. All waits
have a deadline, counted by the deployer that waits (`waited_s`).
Called by deployer.py, which alone acts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from flyd.deploy import health, plan
from flyd.deploy.appconfig import machine_config, release_machine_config
from flyd.deploy.plan import Step, StepName
from flyd.deploy.releases import DeployRun, Phase, Release, RunState, Slot
from flyd.machines.summary import how_it_ended, last_known
from flyd.model import Desired, Machine, MachineConfig, MachineState, MachineStatus, Value
from flyd.placement.scheduler import Order

DRAIN_S = 2.0
"""How long edges have to follow before a machine taken out of routing is stopped."""

GONE_MARGIN_S = 30.0
"""Past a machine's own stop timeout, until a host that has not stopped it is not waited for."""

HOST_LOST_WAIT_S = 30.0
"""How long a lost host that a step needs has to come back (an upgrade of flyd takes less)."""

RESTORE_HOST_WAIT_S = 300.0
"""The same on the way back, where giving up leaves the app without the machine it had."""

RESTORE_WAIT_S = 60.0
"""How long a machine that was brought back has to become healthy."""


class World(Value, frozen=True, kw_only=True):
    """All that a step is judged by. `waited_s`: since this step became the current one."""

    machines: dict[str, Machine] = {}  # the app's claims, by id
    statuses: dict[str, MachineStatus] = {}
    alive: tuple[str, ...] = ()  # hosts that hold their lease
    waited_s: float = 0.0


class Plan(Value, frozen=True, kw_only=True):
    """Write down the slots and begin."""

    slots: tuple[Slot, ...]


class Place(Value, frozen=True, kw_only=True):
    """Place this machine; then the step is done. No room: try again until the step is `patience_s` old."""

    order: Order
    patience_s: float = 0.0


class Cordon(Value, frozen=True, kw_only=True):
    """Take the machine out of routing, or put it back in; then the step is done."""

    machine_id: str
    cordoned: bool


class Destroy(Value, frozen=True, kw_only=True):
    """Want the machine gone; then the step is done."""

    machine_id: str


class Wait(Value, frozen=True, kw_only=True):
    """Not yet; look again when the world changes, and after `look_again_s` at the latest."""

    look_again_s: float


class Advance(Value, frozen=True, kw_only=True):
    """The step is done; `note` is worth a line."""

    note: str = ""


class Undo(Value, frozen=True, kw_only=True):
    """The deploy has failed: walk back. The last lines of `machine_id` belong to the error.

    `reasons`: each host's, where it failed because none could take a machine.
    """

    error: str
    machine_id: str = ""
    reasons: dict[str, str] = {}


class Finish(Value, frozen=True, kw_only=True):
    """The run has ended."""

    state: RunState


Move = Plan | Place | Cordon | Destroy | Wait | Advance | Undo | Finish


class Scene(Value, frozen=True, kw_only=True):
    """What a judge is given."""

    run: DeployRun
    release: Release
    slot: Slot  # for the release command: the primary region, no old machine
    world: World


def next_step(run: DeployRun, release: Release, world: World) -> Move:
    """The one next move of an open run."""
    if run.phase is Phase.PLANNING:
        return Plan(slots=plan.slots(release, run.regions, tuple(world.machines.values())))
    step = plan.current_step(run, release)
    if step is None:
        return Finish(state=RunState.COMPLETE if run.phase is Phase.ROLLING else RunState.FAILED)
    return _judge(step, run, release, world)


def patience_s(place: Place, lost: Sequence[str]) -> float:
    """How old the step may get before a refusal is final; `lost`: hosts that would have room."""
    return max(place.patience_s, HOST_LOST_WAIT_S) if lost else place.patience_s


def _judge(step: Step, run: DeployRun, release: Release, world: World) -> Move:
    slot = step.slot or Slot(region=run.regions[0], group="release_command")
    return JUDGES[step.name](Scene(run=run, release=release, slot=slot, world=world))


# --------------------------------------------------------------------------- the release command


def _place_command(scene: Scene) -> Move:
    config = release_machine_config(scene.release.config, scene.release.image)
    # Kept after its end: its exit code and its lines are read before the run removes it.
    config = msgspec.structs.replace(config, auto_destroy=False)
    return Place(order=_order(scene, config, plan.command_machine_id(scene.run)))


def _await_command(scene: Scene) -> Move:
    machine_id = plan.command_machine_id(scene.run)
    machine, status = _find(scene.world, machine_id)
    if machine is None:
        return Undo(error="the machine of the release command was destroyed by somebody else")
    if status is not None and status.state is MachineState.STOPPED:
        code = health.exit_code(status)
        if code == 0:
            return Advance(note=f"release command done, on {machine.host}")
        return Undo(error=f"the release command failed: {how_it_ended(status)}", machine_id=machine_id)
    timeout_s = scene.release.config.deploy.release_command_timeout_s
    hopeless = _hopeless(machine, status, scene.world) or health.gave_up(status)
    if hopeless:
        return Undo(error=f"the release command did not run: {hopeless}", machine_id=machine_id)
    if scene.world.waited_s >= timeout_s:
        return Undo(error=f"the release command took more than {timeout_s:g} s", machine_id=machine_id)
    return Wait(look_again_s=timeout_s - scene.world.waited_s)


def _remove_command(scene: Scene) -> Move:
    return _destroy(scene.world, plan.command_machine_id(scene.run))


# --------------------------------------------------------------------------- forward


def _place_new(scene: Scene) -> Move:
    slot = scene.slot
    config = machine_config(scene.release.config, slot.group, scene.release.image)
    if slot.old is not None and slot.old_first:
        held = {mount.name: mount.volume for mount in slot.old.config.mounts}
        mounts = tuple(msgspec.structs.replace(m, volume=held.get(m.name, "")) for m in config.mounts)
        config = msgspec.structs.replace(config, mounts=mounts)
    order = _order(scene, config, plan.new_machine_id(scene.run, slot))
    return Place(order=order, patience_s=HOST_LOST_WAIT_S if slot.old_first else 0.0)


def _await_new(scene: Scene) -> Move:
    machine_id = plan.new_machine_id(scene.run, scene.slot)
    machine, status = _find(scene.world, machine_id)
    where = f"machine {machine_id} in {scene.slot.region}"
    if machine is None or machine.desired is Desired.DESTROYED:
        return Undo(error=f"{where} was destroyed by somebody else")
    waited_s, timeout_s = scene.world.waited_s, scene.release.config.deploy.wait_timeout_s
    if health.is_healthy(machine.config, status, waited_s):
        return Advance(note=f"{scene.slot.key}: machine {machine_id} is healthy on {machine.host}")
    hopeless = _hopeless(machine, status, scene.world) or health.failure(machine.config, status)
    if hopeless:
        return Undo(error=f"{where} on {machine.host} {hopeless}", machine_id=machine_id)
    if waited_s >= timeout_s:
        known = last_known(status)
        error = f"{where} on {machine.host} was not healthy in {timeout_s:g} s; last known: {known}"
        return Undo(error=error, machine_id=machine_id)
    return Wait(look_again_s=min(timeout_s - waited_s, health.SMOKE_S))


def _cordon_old(scene: Scene) -> Move:
    old = _old(scene)
    machine = scene.world.machines.get(old.id)
    if machine is None or machine.desired is Desired.DESTROYED:
        return Advance(note=f"{scene.slot.key}: old machine {old.id} was already destroyed")
    if scene.slot.old_first and old.host not in scene.world.alive:
        return Undo(error=f"machine {old.id} can not give up its volume: its host {old.host} is lost")
    return Cordon(machine_id=old.id, cordoned=True)


def _drain_old(scene: Scene) -> Move:
    machine = scene.world.machines.get(_old(scene).id)
    left_s = DRAIN_S - scene.world.waited_s
    if left_s <= 0 or machine is None or not machine.config.services:
        return Advance()
    return Wait(look_again_s=left_s)


def _destroy_old(scene: Scene) -> Move:
    return _destroy(scene.world, _old(scene).id)


def _await_old_gone(scene: Scene) -> Move:
    old = _old(scene)
    outcome = _await_gone(scene.world, old, HOST_LOST_WAIT_S if scene.slot.old_first else 0.0)
    if isinstance(outcome, str):
        if scene.slot.old_first:
            return Undo(error=f"the old machine {old.id} still holds its volume: {outcome}")
        return Advance(note=f"{scene.slot.key}: not waiting for old machine {old.id} any longer: {outcome}")
    return outcome or Advance(note=f"{scene.slot.key}: old machine {old.id} is gone")


# --------------------------------------------------------------------------- back


def _destroy_new(scene: Scene) -> Move:
    return _destroy(scene.world, plan.new_machine_id(scene.run, scene.slot))


def _await_new_gone(scene: Scene) -> Move:
    machine = scene.world.machines.get(plan.new_machine_id(scene.run, scene.slot))
    if machine is None:
        return Advance()
    outcome = _await_gone(scene.world, machine, RESTORE_HOST_WAIT_S if scene.slot.old_first else 0.0)
    if isinstance(outcome, str):
        return Advance(
            note=f"{scene.slot.key}: not waiting for new machine {machine.id} any longer: {outcome}"
        )
    return outcome or Advance(note=f"{scene.slot.key}: new machine {machine.id} is gone")


def _restore_old(scene: Scene) -> Move:
    """Put the old machine back into routing, or, where it is gone, make it again as it was."""
    old = _old(scene)
    machine = scene.world.machines.get(old.id)
    if machine is not None and machine.desired is not Desired.DESTROYED:
        return Cordon(machine_id=old.id, cordoned=old.cordoned)
    if machine is not None and scene.slot.old_first:
        outcome = _await_gone(scene.world, machine, RESTORE_HOST_WAIT_S)  # it still holds the volume
        if isinstance(outcome, str):
            return Advance(note=f"{scene.slot.key}: old machine {old.id} can not be brought back: {outcome}")
        if outcome is not None:
            return outcome
    order = Order(
        app=old.app,
        config=old.config,
        region=old.region,
        name=old.name,
        release=old.release,
        machine_id=plan.restored_machine_id(scene.run, scene.slot),
    )
    return Place(order=order, patience_s=RESTORE_HOST_WAIT_S)


def _await_old(scene: Scene) -> Move:
    old = _old(scene)
    if old.desired is not Desired.STARTED:
        return Advance(note=f"{scene.slot.key}: old machine {old.id} is as it was")
    ids = (old.id, plan.restored_machine_id(scene.run, scene.slot))
    back = [m for i in ids if (m := scene.world.machines.get(i)) and m.desired is not Desired.DESTROYED]
    if not back:
        return Advance()  # it could not be placed; the lines say why
    status = scene.world.statuses.get(back[-1].id)
    if health.is_healthy(back[-1].config, status, scene.world.waited_s):
        return Advance(note=f"{scene.slot.key}: machine {back[-1].id} of release {old.release} serves again")
    if scene.world.waited_s >= RESTORE_WAIT_S:
        known = last_known(status)
        which = f"{scene.slot.key}: machine {back[-1].id} of release {old.release}"
        return Advance(note=f"{which} is back, but not healthy: {known}")
    return Wait(look_again_s=min(RESTORE_WAIT_S - scene.world.waited_s, health.SMOKE_S))


# --------------------------------------------------------------------------- shared


def _order(scene: Scene, config: MachineConfig, machine_id: str) -> Order:
    return Order(
        app=scene.run.app,
        config=config,
        region=scene.slot.region,
        machine_id=machine_id,
        release=scene.release.version,
    )


def _old(scene: Scene) -> Machine:
    assert scene.slot.old is not None, "a step about the old machine in a slot without one"
    return scene.slot.old


def _find(world: World, machine_id: str) -> tuple[Machine | None, MachineStatus | None]:
    """A claim, and what its host said of this very instance."""
    machine, status = world.machines.get(machine_id), world.statuses.get(machine_id)
    if machine is None or status is None or status.instance_id != machine.instance_id:
        return machine, None
    return machine, status


def _hopeless(machine: Machine, status: MachineStatus | None, world: World) -> str:
    if machine.host not in world.alive and world.waited_s >= HOST_LOST_WAIT_S:
        return f"is on lost host {machine.host}; last known: {last_known(status)}"
    return ""


def _destroy(world: World, machine_id: str) -> Move:
    machine = world.machines.get(machine_id)
    if machine is None or machine.desired is Desired.DESTROYED:
        return Advance()
    return Destroy(machine_id=machine_id)


def _await_gone(world: World, machine: Machine, host_patience_s: float) -> Wait | str | None:
    """None: it is gone and what it held is free. A text: it is not, and waiting has no use."""
    if machine.id not in world.machines:
        return None
    if machine.host not in world.alive:
        if world.waited_s < host_patience_s:
            return Wait(look_again_s=host_patience_s - world.waited_s)
        return f"its host {machine.host} is lost and will destroy it when it is back"
    limit_s = host_patience_s + machine.config.stop.timeout_s + GONE_MARGIN_S
    if world.waited_s >= limit_s:
        known = last_known(world.statuses.get(machine.id))
        return f"{machine.host} has not stopped it in {limit_s:g} s ({known})"
    return Wait(look_again_s=limit_s - world.waited_s)


S = StepName

JUDGES: dict[StepName, Callable[[Scene], Move]] = {
    S.PLACE_COMMAND: _place_command,
    S.AWAIT_COMMAND: _await_command,
    S.REMOVE_COMMAND: _remove_command,
    S.PLACE_NEW: _place_new,
    S.AWAIT_NEW: _await_new,
    S.CORDON_OLD: _cordon_old,
    S.DRAIN_OLD: _drain_old,
    S.DESTROY_OLD: _destroy_old,
    S.AWAIT_OLD_GONE: _await_old_gone,
    S.DESTROY_NEW: _destroy_new,
    S.AWAIT_NEW_GONE: _await_new_gone,
    S.RESTORE_OLD: _restore_old,
    S.AWAIT_OLD: _await_old,
}
