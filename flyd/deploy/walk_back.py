"""The way back of a deploy that has failed: each step's judge. Pure.

Nothing fails here any more: what can not be put back is said in the run's lines and the walk goes
on, so that every run ends. An old machine is brought back where it was; without volumes it may also
go to another of the app's regions, as it may when its host is lost (placement/loss.py). While it
waits for room its successor, if that is well, is kept: what serves goes last.
Called by rollout.py, which picks the judge.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from flyd.deploy import health, plan
from flyd.deploy.moves import (
    HOST_LOST_WAIT_S,
    Advance,
    Cordon,
    Move,
    Place,
    Scene,
    Wait,
    await_gone,
    destroy,
    old_machine,
)
from flyd.machines.summary import last_known
from flyd.model import Desired, Machine
from flyd.placement.scheduler import Order

LAST_TRY_S = 300.0
"""How long the last attempt waits for a host or for room: giving up leaves the app without its machine."""

RESTORE_WAIT_S = 60.0
"""How long a machine that was brought back has to become healthy."""

LATER = "it is tried again once all new machines are gone"


def all_back(scenes: Sequence[Scene]) -> bool:
    """Whether every old machine is there again, so that nothing is to be tried again."""
    return all(scene.slot.old is None or _back(scene) is not None for scene in scenes)


def remove_command(scene: Scene) -> Move:
    """Take the release command's machine away; forward, too."""
    return destroy(scene.world, plan.command_machine_id(scene.run))


def destroy_new(scene: Scene) -> Move:
    """Take the new machine away, unless it is all that serves in its slot for the moment."""
    new_id = plan.new_machine_id(scene.run, scene.slot)
    if not scene.again and not scene.slot.old_first and scene.slot.old is not None and _back(scene) is None:
        status = scene.world.statuses.get(new_id)
        if status is not None and status.healthy():
            return Advance(
                note=f"{scene.slot.key}: new machine {new_id} serves until there is room for the old one"
            )
    return destroy(scene.world, new_id)


def await_new_gone(scene: Scene) -> Move:
    """Wait for what it holds: its volume, or room."""
    machine = scene.world.machines.get(plan.new_machine_id(scene.run, scene.slot))
    if machine is None or machine.desired is not Desired.DESTROYED:
        return Advance()
    outcome = await_gone(scene.world, machine, _patience_s(scene) if scene.slot.old_first else 0.0)
    if isinstance(outcome, str):
        note = f"{scene.slot.key}: not waiting for new machine {machine.id} any longer: {outcome}"
        return Advance(note=note)
    return outcome or Advance(
        note="" if scene.again else f"{scene.slot.key}: new machine {machine.id} is gone"
    )


def restore_old(scene: Scene) -> Move:
    """Put the old machine back into routing, or, where it is gone, make it again as it was."""
    old = old_machine(scene)
    machine = scene.world.machines.get(old.id)
    if machine is not None and machine.desired is not Desired.DESTROYED:
        return Cordon(machine_id=old.id, cordoned=old.cordoned)
    if _back(scene) is not None:
        return Advance()
    given_up = f"{scene.slot.key}: old machine {old.id} can not be brought back"
    if not scene.again:
        given_up = f"{given_up} yet ({LATER})"
    if machine is not None and scene.slot.old_first:
        outcome = await_gone(scene.world, machine, _patience_s(scene))  # it still holds the volume
        if isinstance(outcome, str):
            return Advance(note=f"{given_up}: {outcome}")
        if outcome is not None:
            return outcome
    order = Order(
        app=old.app,
        config=old.config,
        region=old.region,
        name=old.name,
        release=old.release,
        desired=old.desired,
        cordoned=old.cordoned,
        machine_id=plan.restored_machine_id(scene.run, scene.slot),
    )
    orders = tuple(msgspec.structs.replace(order, region=region) for region in _regions(scene))
    return Place(orders=orders, patience_s=_patience_s(scene), given_up=given_up)


def await_old(scene: Scene) -> Move:
    """Wait until what was brought back serves."""
    old, back = old_machine(scene), _back(scene)
    if old.desired is not Desired.STARTED:
        return Advance(note=f"{scene.slot.key}: old machine {old.id} is as it was")
    if back is None:
        return Advance()  # it could not be placed; the lines say why
    which = f"{scene.slot.key}: machine {back.id} of release {old.release}"
    status = scene.world.statuses.get(back.id)
    if health.is_healthy(back.config, status, scene.world.waited_s):
        return Advance(note=f"{which} serves again")
    if scene.world.waited_s >= RESTORE_WAIT_S:
        return Advance(note=f"{which} is back, but not healthy: {last_known(status)}")
    return Wait(look_again_s=min(RESTORE_WAIT_S - scene.world.waited_s, health.SMOKE_S))


def _back(scene: Scene) -> Machine | None:
    """What stands for the old machine now: itself, or the one made again in its place."""
    ids = (plan.restored_machine_id(scene.run, scene.slot), old_machine(scene).id)
    found = (scene.world.machines.get(machine_id) for machine_id in ids)
    return next((m for m in found if m is not None and m.desired is not Desired.DESTROYED), None)


def _patience_s(scene: Scene) -> float:
    return LAST_TRY_S if scene.again else HOST_LOST_WAIT_S


def _regions(scene: Scene) -> tuple[str, ...]:
    """Where it may be, best first: as long as its own region's host may come back, only there."""
    old = old_machine(scene)
    if old.config.mounts or (not scene.again and scene.world.waited_s < HOST_LOST_WAIT_S):
        return (old.region,)
    return (old.region, *(region for region in scene.run.regions if region != old.region))
