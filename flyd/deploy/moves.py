"""What a step of a deploy is judged by, and what a judge may answer. Pure.

Owns the vocabulary that rollout.py (forward) and walk_back.py share: the world as it is seen, the
moves, and the judgements that both ways make alike. deployer.py carries the moves out.
"""

from __future__ import annotations

from collections.abc import Sequence

from flyd.deploy.releases import DeployRun, Release, RunState, Slot
from flyd.machines.leases import MachineLease
from flyd.machines.summary import last_known
from flyd.model import Desired, Machine, MachineConfig, MachineStatus, Value
from flyd.placement.scheduler import Order

GONE_MARGIN_S = 30.0
"""Past a machine's own stop timeout, until a host that has not stopped it is not waited for."""

HOST_LOST_WAIT_S = 30.0
"""How long a lost host that a step needs has to come back (an upgrade of flyd takes less)."""


class World(Value, frozen=True, kw_only=True):
    """All that a step is judged by. `waited_s`: since this step became the current one."""

    machines: dict[str, Machine] = {}  # the app's claims, by id
    statuses: dict[str, MachineStatus] = {}
    alive: tuple[str, ...] = ()  # hosts that hold their lease
    leases: dict[str, MachineLease] = {}  # machines that somebody holds (`fly machine lease`), by id
    waited_s: float = 0.0


class Plan(Value, frozen=True, kw_only=True):
    """Write down the slots and begin."""

    slots: tuple[Slot, ...]


class Place(Value, frozen=True, kw_only=True):
    """Place a machine, by the first of the orders for which there is room; then the step is done.

    The orders differ in their region only. No room: try again until the step is `patience_s` old;
    then, on the way back, `given_up` is a line of the run and the walk goes on.
    """

    orders: tuple[Order, ...]
    patience_s: float = 0.0
    given_up: str = ""

    def waits_s(self, lost: Sequence[str]) -> float:
        """How old the step may get before a refusal is final; `lost`: hosts that would have room."""
        return max(self.patience_s, HOST_LOST_WAIT_S) if lost else self.patience_s


class Cordon(Value, frozen=True, kw_only=True):
    """Take the machine out of routing, or put it back in; then the step is done.

    `asks`: not while somebody holds a lease on it.
    """

    machine_id: str
    cordoned: bool
    asks: bool = False


class Destroy(Value, frozen=True, kw_only=True):
    """Want the machine gone; then the step is done. `asks`: not while somebody holds a lease on it."""

    machine_id: str
    asks: bool = False


class Wait(Value, frozen=True, kw_only=True):
    """Not yet; look again when the world changes, and after `look_again_s` at the latest.

    `doing`: what is waited for, where the step's name does not say it.
    """

    look_again_s: float
    doing: str = ""


class Advance(Value, frozen=True, kw_only=True):
    """The step is done, and as many as `steps` with it; `note` is worth a line."""

    note: str = ""
    steps: int = 1


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
    again: bool = False  # the last attempt on the way back (plan.py)


def order_of(scene: Scene, config: MachineConfig, machine_id: str) -> Order:
    """A machine of the release in the scene's slot."""
    return Order(
        app=scene.run.app,
        config=config,
        region=scene.slot.region,
        machine_id=machine_id,
        release=scene.release.version,
    )


def old_machine(scene: Scene) -> Machine:
    """The slot's old machine, as it was when the run began."""
    assert scene.slot.old is not None, "a step about the old machine in a slot without one"
    return scene.slot.old


def find(world: World, machine_id: str) -> tuple[Machine | None, MachineStatus | None]:
    """A claim, and what its host said of this very instance."""
    machine, status = world.machines.get(machine_id), world.statuses.get(machine_id)
    if machine is None or status is None or status.instance_id != machine.instance_id:
        return machine, None
    return machine, status


def hopeless(machine: Machine, status: MachineStatus | None, world: World) -> str:
    """Why nothing is to be expected of a machine's host; empty while something is."""
    if machine.host not in world.alive and world.waited_s >= HOST_LOST_WAIT_S:
        return f"is on lost host {machine.host}; last known: {last_known(status)}"
    return ""


def destroy(world: World, machine_id: str, *, asks: bool = False) -> Move:
    """Want it gone, if it is not already."""
    machine = world.machines.get(machine_id)
    if machine is None or machine.desired is Desired.DESTROYED:
        return Advance()
    return Destroy(machine_id=machine_id, asks=asks)


def await_gone(world: World, machine: Machine, host_patience_s: float) -> Wait | str | None:
    """None: it is gone and what it held is free. A text: it is not, and waiting has no use."""
    if machine.id not in world.machines:
        return None
    machine = world.machines[machine.id]  # it may have been moved since it was read
    if machine.host not in world.alive:
        if world.waited_s < host_patience_s:
            return Wait(look_again_s=host_patience_s - world.waited_s)
        return f"its host {machine.host} is lost and will destroy it when it is back"
    limit_s = host_patience_s + machine.config.stop.timeout_s + GONE_MARGIN_S
    if world.waited_s >= limit_s:
        known = last_known(world.statuses.get(machine.id))
        return f"{machine.host} has not stopped it in {limit_s:g} s ({known})"
    return Wait(look_again_s=limit_s - world.waited_s)
