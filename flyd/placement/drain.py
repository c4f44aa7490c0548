"""Moving everything off a host: what to do next. Pure; repairs.py carries it out.

One machine of a group (app and process group) at a time, all groups side by side:

- A running machine is replaced as a deploy does it: a new one elsewhere with the same configuration
  and release, then, once that passes its checks, the old one leaves routing and is destroyed. So a
  group never has fewer healthy machines than before, and where there is no room nothing is stopped.
- A machine at rest keeps its id: its claim is given to another host.
- A machine with a volume, and so each Postgres member, stays; so does one that runs once (restart
  policy `no`) until it has ended. They are named in `left`. With `force` they are stopped where
  they are, so that the host can be switched off; no data is moved or destroyed.
- An app that is being deployed is left alone until its deploy has ended.
- A machine that somebody holds (`fly machine lease`) is waited for, the others of its group first; one
  not yet begun is named in `left` after LEASE_WAIT_S, and moved once its lease has ended after all.

What is under way is in the Drain record before it happens (`noted`), so a new leader goes on, and a
cancelled drain takes back the replacements that were not needed yet. While the host is lost
nothing is done here: loss.py decides what becomes of its machines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from flyd.deploy.health import is_healthy
from flyd.machines.leases import MachineLease, holder, words
from flyd.machines.summary import last_known
from flyd.model import App, Desired, Machine, MachineState, MachineStatus, Value
from flyd.model.cluster import Drain, DrainState
from flyd.placement.ids import derived_machine_id
from flyd.placement.loss import MoveOff, ended_for_good, regions_for, why_it_stays
from flyd.placement.scheduler import Order

OUT_OF_ROUTING_S = 2.0
"""How long edges get to follow, and requests to end, before a machine out of routing is stopped."""

HEALTHY_WITHIN_S = 300.0
"""A replacement that is not healthy by then is destroyed, and another one is tried."""

AT_REST_FOR_S = 10.0
"""How long a claim and what its host says of it have to stay the same: longer than a sign of life lasts.

A host may be behind with what it says: it may have started, a moment ago, what is to be stopped again.
"""

LEASE_WAIT_S = 300.0
"""How long a drain waits for a lease before it says that the machine stays."""

AT_REST = (MachineState.CREATED, MachineState.STOPPED, MachineState.FAILED)


class Place(Value, frozen=True, kw_only=True):
    """Place a replacement, in the first of the regions that has room."""

    old: Machine
    orders: tuple[Order, ...]


class TakeOut(Value, frozen=True, kw_only=True):
    """Take the old machine out of routing."""

    machine: Machine


class KeepOut(Value, frozen=True, kw_only=True):
    """Keep the replacement out of routing, because a user has done so with the old machine."""

    machine: Machine


class Retire(Value, frozen=True, kw_only=True):
    """Destroy the old machine: its replacement is well."""

    machine: Machine


class TakeBack(Value, frozen=True, kw_only=True):
    """Destroy a replacement that is not needed, and put `old` (None: it never left) back into routing."""

    old_id: str
    old: Machine | None
    machine: Machine | None  # None: it is gone or going already, or never was


class Shift(Value, frozen=True, kw_only=True):
    """Give a machine at rest to another host."""

    move: MoveOff


class Halt(Value, frozen=True, kw_only=True):
    """Stop a machine where it is."""

    machine: Machine


Act = Place | TakeOut | KeepOut | Retire | TakeBack | Shift | Halt


class Step(Value, frozen=True, kw_only=True):
    """What one group does now: an act, or (None) a wait. `line`: told once it is done."""

    doing: str
    act: Act | None = None
    line: str = ""


class Outlook(Value, frozen=True, kw_only=True):
    """What a drain does now, and what stays; no steps: it is at its end."""

    steps: tuple[Step, ...] = ()
    left: dict[str, str] = {}


class Scene(Value, frozen=True, kw_only=True):
    """All that is decided on. `waited_s`: by machine on the host, since its step became the current one."""

    drain: Drain
    machines: dict[str, Machine]  # all of the cluster, by id
    statuses: dict[str, MachineStatus] = {}
    apps: dict[str, App] = {}
    deploying: tuple[str, ...] = ()  # apps with an open run
    waited_s: dict[str, float] = {}
    leases: dict[str, MachineLease] = {}  # by machine


def outlook(scene: Scene) -> Outlook:
    """The next step of each group, and what stays on the host."""
    drain = scene.drain
    taking_back = tuple(_unneeded(scene))
    if drain.state is DrainState.CANCELLED:
        return Outlook(steps=taking_back)
    left: dict[str, str] = {}
    groups: dict[tuple[str, str], list[Machine]] = {}
    steps: list[Step] = list(taking_back)
    for machine in sorted(scene.machines.values(), key=lambda m: (m.app, m.config.process_group, m.id)):
        if machine.host != drain.host:
            continue
        if reason := _stays(machine, scene):
            left[machine.id] = f"{machine.app}: {reason}"
            if drain.force and machine.desired is Desired.STARTED:
                steps.append(
                    Step(
                        doing=f"{machine.app}: stopping machine {machine.id} where it is",
                        act=Halt(machine=machine),
                        line=f"{machine.app}: machine {machine.id} is stopped, as forced: {reason}",
                    )
                )
        else:
            groups.setdefault((machine.app, machine.config.process_group), []).append(machine)
    for (app, _), machines in sorted(groups.items()):
        if app in scene.deploying:
            steps.append(Step(doing=f"{app}: waits for the end of its deploy"))
        else:
            # What was begun goes on first; then by id, so that a new leader chooses alike.
            first = min(machines, key=lambda m: (not _begun(m, drain), m.id in scene.leases, m.id))
            steps.append(_next(first, scene))
    return Outlook(steps=tuple(steps), left=left)


def noted(drain: Drain, act: Act) -> Drain:
    """The record as it has to be written before the act."""
    match act:
        case Place(old=old, orders=orders):
            return msgspec.structs.replace(drain, replacing={**drain.replacing, old.id: orders[0].machine_id})
        case TakeOut(machine=machine):
            return msgspec.structs.replace(drain, taken_out=(*drain.taken_out, machine.id))
        case Retire(machine=machine):
            return msgspec.structs.replace(drain, retired=(*drain.retired, machine.id))
        case TakeBack(old_id=old_id, machine=None):
            return _without(drain, (old_id,))
        case _:
            return drain


def settled(drain: Drain, machines: Mapping[str, Machine]) -> Drain:
    """The record without the replacements that are complete, or that were taken back."""
    over = [
        old
        for old, new in sorted(drain.replacing.items())
        if (old not in machines and old in drain.retired) or (new not in machines and old not in machines)
    ]
    return _without(drain, over) if over else drain


def _without(drain: Drain, over: Sequence[str]) -> Drain:
    return msgspec.structs.replace(
        drain,
        replacing={old: new for old, new in drain.replacing.items() if old not in over},
        taken_out=tuple(m for m in drain.taken_out if m not in over),
        retired=tuple(m for m in drain.retired if m not in over),
    )


def replacement_id(drain: Drain, old: Machine) -> str:
    """The id of a machine's replacement, the same however often it is asked for."""
    return derived_machine_id(old.app, "drain", drain.id, old.id)


def phase_of(
    machine_id: str, drain: Drain, machines: Mapping[str, Machine], known: str, *, held: bool = False
) -> str:
    """What a machine on the host waits for; waits are timed from its last change.

    `known` names the claim and what its host says: one at rest waits for them to stay the same.
    `held`: somebody has a lease on it.
    """
    if held:
        return "leased"
    if machine_id not in drain.replacing:
        return known
    if machine_id in drain.retired:
        return "gone"
    if machine_id in drain.taken_out:
        return "routing"
    return "healthy" if drain.replacing[machine_id] in machines else "placed"


def _begun(machine: Machine, drain: Drain) -> bool:
    return machine.desired is Desired.DESTROYED or machine.id in drain.replacing


def _stays(machine: Machine, scene: Scene) -> str:
    if machine.desired is Desired.DESTROYED:
        return ""
    if reason := why_it_stays(machine, scene.apps.get(machine.app)):
        return reason
    once = machine.config.restart.policy == "no" and machine.desired is Desired.STARTED
    if once and not ended_for_good(scene.statuses.get(machine.id)):
        return "runs once (restart policy 'no'), until it has ended"
    held = scene.leases.get(machine.id)
    if held and not _begun(machine, scene.drain) and scene.waited_s.get(machine.id, 0.0) >= LEASE_WAIT_S:
        return words(held)
    return ""


def _unneeded(scene: Scene) -> Iterator[Step]:
    """Replacements of machines that need none any more: the drain was cancelled, or somebody was faster."""
    drain = scene.drain
    for old_id, new_id in sorted(drain.replacing.items()):
        old, new = scene.machines.get(old_id), scene.machines.get(new_id)
        if old_id in drain.retired:
            continue
        still_here = old is not None and old.host == drain.host and old.desired is Desired.STARTED
        if still_here and drain.state is not DrainState.CANCELLED:
            continue
        if new is not None and new.desired is Desired.DESTROYED:
            new = None  # its host ends it, also if that takes until the host is back
        yield Step(
            doing=f"taking back machine {new_id}",
            act=TakeBack(
                old_id=old_id, old=old if still_here and old_id in drain.taken_out else None, machine=new
            ),
            line=f"machine {new_id} is taken back: machine {old_id} needs no replacement" if new else "",
        )


def _next(machine: Machine, scene: Scene) -> Step:
    drain, status = scene.drain, scene.statuses.get(machine.id)
    name = f"{machine.app}: machine {machine.id}"
    if machine.desired is Desired.DESTROYED:
        return Step(doing=f"{name} is being stopped")
    if held := scene.leases.get(machine.id):
        return Step(doing=f"{machine.app}: waiting: {holder(held)}")
    resting = machine.desired is Desired.STOPPED
    if machine.id not in drain.replacing and (resting or ended_for_good(status)):
        if status is None or status.state not in AT_REST:
            return Step(doing=f"{name}: its host has to say that it is at rest")
        if scene.waited_s.get(machine.id, 0.0) < AT_REST_FOR_S:
            return Step(doing=f"{name} has come to rest a moment ago")
        regions = regions_for(machine, scene.apps.get(machine.app))
        return Step(
            doing=f"{name} is at rest and is given to another host",
            act=Shift(move=MoveOff(machine=machine, regions=regions, at_rest=True)),
            line=f"{name} (at rest) was given to another host",
        )
    new = scene.machines.get(drain.replacing.get(machine.id, ""))
    if new is None:
        return _place(machine, scene)
    return _replace(machine, new, scene)


def _place(machine: Machine, scene: Scene) -> Step:
    new_id = replacement_id(scene.drain, machine)
    orders = tuple(
        Order(
            app=machine.app,
            config=machine.config,
            region=region,
            machine_id=new_id,
            release=machine.release,
        )
        for region in regions_for(machine, scene.apps.get(machine.app))
    )
    return Step(
        doing=f"{machine.app}: placing machine {new_id} in the place of {machine.id}",
        act=Place(old=machine, orders=orders),
        line=f"{machine.app}: machine {new_id} is placed; it will replace {machine.id}",
    )


def _replace(old: Machine, new: Machine, scene: Scene) -> Step:
    """The steps between the placing of a replacement and the end of the old machine."""
    drain, status = scene.drain, scene.statuses.get(new.id)
    waited_s = scene.waited_s.get(old.id, 0.0)
    what = f"{old.app}: machine {new.id}"
    if new.desired is Desired.DESTROYED:
        return Step(doing=f"{what} was destroyed; waits until it is gone, to place it again")
    if old.cordoned and old.id not in drain.taken_out and not new.cordoned:
        return Step(doing=f"{what} is kept out of routing, as {old.id} was", act=KeepOut(machine=new))
    if old.id not in drain.taken_out:
        if not is_healthy(new.config, status, waited_s):
            if waited_s >= HEALTHY_WITHIN_S:
                said = last_known(status)
                return Step(
                    doing=f"{what} is given up",
                    act=TakeBack(old_id=old.id, old=None, machine=new),
                    line=f"{what} was not healthy within {HEALTHY_WITHIN_S:g} s and is given up: {said}",
                )
            return Step(doing=f"{what} has to pass its checks before {old.id} is stopped")
        return Step(
            doing=f"{old.app}: taking machine {old.id} out of routing",
            act=TakeOut(machine=old),
            line=f"{what} is healthy; {old.id} leaves routing",
        )
    if waited_s < OUT_OF_ROUTING_S:
        return Step(doing=f"{old.app}: edges leave machine {old.id}")
    return Step(
        doing=f"{old.app}: stopping machine {old.id}",
        act=Retire(machine=old),
        line=f"{old.app}: machine {old.id} is being stopped; {new.id} is in its place",
    )
