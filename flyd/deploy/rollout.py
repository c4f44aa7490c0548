"""What a deploy does next: one small step at a time, or the way back. Pure.

`next_step` looks at the run, the release and the world and answers with one move. Each
step has one judging function, in the table `JUDGES`; a judge looks at what is, not at what
it did before, so a step repeated after a crash finds its own effect and goes on.

Forward (here), any failure is an `Undo`; the way back is walk_back.py's. All waits have a
deadline, counted by the deployer that waits (`waited_s`).
Called by deployer.py, which alone acts.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from flyd.deploy import health, plan, walk_back
from flyd.deploy.appconfig import machine_config, release_machine_config
from flyd.deploy.moves import (
    HOST_LOST_WAIT_S,
    Advance,
    Cordon,
    Finish,
    Move,
    Place,
    Plan,
    Scene,
    Undo,
    Wait,
    World,
    await_gone,
    destroy,
    find,
    hopeless,
    old_machine,
    order_of,
)
from flyd.deploy.plan import Step, StepName
from flyd.deploy.releases import DeployRun, Phase, Release, RunState, Slot
from flyd.machines.leases import holder, words
from flyd.machines.summary import how_it_ended
from flyd.model import Desired, MachineState

DRAIN_S = 2.0
"""How long edges have to follow before a machine taken out of routing is stopped."""


def next_step(run: DeployRun, release: Release, world: World) -> Move:
    """The one next move of an open run."""
    if run.phase is Phase.PLANNING:
        return Plan(slots=plan.slots(run, release, tuple(world.machines.values())))
    step = plan.current_step(run, release)
    if step is None:
        return Finish(state=RunState.COMPLETE if run.phase is Phase.ROLLING else RunState.FAILED)
    left = plan.steps(run, release)[run.done :]
    if step.again and walk_back.all_back([_scene(s, run, release, world) for s in left]):
        return Advance(steps=len(left))
    return JUDGES[step.name](_scene(step, run, release, world))


def _scene(step: Step, run: DeployRun, release: Release, world: World) -> Scene:
    slot = step.slot or Slot(region=run.regions[0], group="release_command")
    return Scene(run=run, release=release, slot=slot, world=world, again=step.again)


# --------------------------------------------------------------------------- the release command


def _place_command(scene: Scene) -> Move:
    config = release_machine_config(scene.release.config, scene.release.image)
    # Kept after its end: its exit code and its lines are read before the run removes it.
    config = msgspec.structs.replace(config, auto_destroy=False)
    return Place(orders=(order_of(scene, config, plan.command_machine_id(scene.run)),))


def _await_command(scene: Scene) -> Move:
    machine_id = plan.command_machine_id(scene.run)
    machine, status = find(scene.world, machine_id)
    if machine is None:
        return Undo(error="the machine of the release command was destroyed by somebody else")
    if status is not None and status.state is MachineState.STOPPED:
        code = health.exit_code(status)
        if code == 0:
            return Advance(note=f"release command done, on {machine.host}")
        return Undo(error=f"the release command failed: {how_it_ended(status)}", machine_id=machine_id)
    timeout_s = scene.release.config.deploy.release_command_timeout_s
    no_hope = hopeless(machine, status, scene.world) or health.gave_up(status)
    if no_hope:
        return Undo(error=f"the release command did not run: {no_hope}", machine_id=machine_id)
    if scene.world.waited_s >= timeout_s:
        return Undo(error=f"the release command took more than {timeout_s:g} s", machine_id=machine_id)
    return Wait(look_again_s=timeout_s - scene.world.waited_s)


# --------------------------------------------------------------------------- forward


def _place_new(scene: Scene) -> Move:
    slot = scene.slot
    config = machine_config(scene.release.config, slot.group, scene.release.image)
    if slot.old is not None and slot.old_first:
        held = {mount.name: mount.volume for mount in slot.old.config.mounts}
        mounts = tuple(msgspec.structs.replace(m, volume=held.get(m.name, "")) for m in config.mounts)
        config = msgspec.structs.replace(config, mounts=mounts)
    order = order_of(scene, config, plan.new_machine_id(scene.run, slot))
    return Place(orders=(order,), patience_s=HOST_LOST_WAIT_S if slot.old_first else 0.0)


def _await_new(scene: Scene) -> Move:
    machine_id = plan.new_machine_id(scene.run, scene.slot)
    seen = health.judge(machine_id, scene.world)
    on = f" on {seen.host}" if seen.host else ""
    where = f"machine {machine_id} in {scene.slot.region}{on}"
    waited_s, timeout_s = scene.world.waited_s, scene.release.config.deploy.wait_timeout_s
    if seen.verdict is health.Verdict.HEALTHY:
        return Advance(note=f"{scene.slot.key}: machine {machine_id} is healthy{on}")
    if seen.verdict is health.Verdict.FAILED:
        return Undo(error=f"{where} {seen.said}", machine_id=machine_id if seen.host else "")
    if waited_s >= timeout_s:
        error = f"{where} was not healthy in {timeout_s:g} s; last known: {seen.said}"
        return Undo(error=error, machine_id=machine_id)
    return Wait(look_again_s=min(timeout_s - waited_s, health.SMOKE_S))


def _cordon_old(scene: Scene) -> Move:
    old = old_machine(scene)
    machine = scene.world.machines.get(old.id)
    if machine is None or machine.desired is Desired.DESTROYED:
        return Advance(note=f"{scene.slot.key}: old machine {old.id} was already destroyed")
    if scene.slot.old_first and old.host not in scene.world.alive:
        return Undo(error=f"machine {old.id} can not give up its volume: its host {old.host} is lost")
    return _leased(scene) or Cordon(machine_id=old.id, cordoned=True, asks=True)


def _drain_old(scene: Scene) -> Move:
    machine = scene.world.machines.get(old_machine(scene).id)
    left_s = DRAIN_S - scene.world.waited_s
    if left_s <= 0 or machine is None or not machine.config.services:
        return Advance()
    return Wait(look_again_s=left_s)


def _destroy_old(scene: Scene) -> Move:
    return _leased(scene) or destroy(scene.world, old_machine(scene).id, asks=True)


def _leased(scene: Scene) -> Move | None:
    """What to do while somebody holds the old machine; None: nobody does."""
    held = scene.world.leases.get(old_machine(scene).id)
    if held is None:
        return None
    waited_s, timeout_s = scene.world.waited_s, scene.release.config.deploy.wait_timeout_s
    if waited_s >= timeout_s:
        return Undo(error=f"{words(held)}; the deploy has waited {timeout_s:g} s for it")
    return Wait(look_again_s=timeout_s - waited_s, doing=f"{scene.slot.key}: waiting: {holder(held)}")


def _await_old_gone(scene: Scene) -> Move:
    old = old_machine(scene)
    outcome = await_gone(scene.world, old, HOST_LOST_WAIT_S if scene.slot.old_first else 0.0)
    if isinstance(outcome, str):
        if scene.slot.old_first:
            return Undo(error=f"the old machine {old.id} still holds its volume: {outcome}")
        return Advance(note=f"{scene.slot.key}: not waiting for old machine {old.id} any longer: {outcome}")
    return outcome or Advance(note=f"{scene.slot.key}: old machine {old.id} is gone")


S = StepName

JUDGES: dict[StepName, Callable[[Scene], Move]] = {
    S.PLACE_COMMAND: _place_command,
    S.AWAIT_COMMAND: _await_command,
    S.REMOVE_COMMAND: walk_back.remove_command,
    S.PLACE_NEW: _place_new,
    S.AWAIT_NEW: _await_new,
    S.CORDON_OLD: _cordon_old,
    S.DRAIN_OLD: _drain_old,
    S.DESTROY_OLD: _destroy_old,
    S.AWAIT_OLD_GONE: _await_old_gone,
    S.DESTROY_NEW: walk_back.destroy_new,
    S.AWAIT_NEW_GONE: walk_back.await_new_gone,
    S.RESTORE_OLD: walk_back.restore_old,
    S.AWAIT_OLD: walk_back.await_old,
}
