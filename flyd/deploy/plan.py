"""What a run walks: its slots, and the steps of each phase. Pure; read by rollout.py.

A slot is one place for a machine, in a region and process group; counts.py says how many there
are. Each machine of an earlier release is either replaced in one slot or removed in one; of too
many, the newest are removed. A plan is a tuple of steps that
follows from the run alone, so that "how many are done" is all that a run has to remember.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum

import msgspec

from flyd.deploy.appconfig import AppConfig, DeployPolicy, process_groups
from flyd.deploy.counts import wanted
from flyd.deploy.releases import DeployRun, Phase, Release, Slot
from flyd.model import Desired, Machine, Value
from flyd.placement.ids import derived_machine_id


class StepName(StrEnum):
    """One small thing, done or waited for; in the words that people read."""

    PLACE_COMMAND = "placing the machine of the release command"
    AWAIT_COMMAND = "running the release command"
    REMOVE_COMMAND = "removing the machine of the release command"
    PLACE_NEW = "placing the new machine"
    AWAIT_NEW = "waiting until the new machine is healthy"
    CORDON_OLD = "taking the old machine out of routing"
    DRAIN_OLD = "letting the old machine drain"
    DESTROY_OLD = "stopping the old machine"
    AWAIT_OLD_GONE = "waiting until the old machine is gone"
    DESTROY_NEW = "stopping the new machine"
    AWAIT_NEW_GONE = "waiting until the new machine is gone"
    RESTORE_OLD = "bringing the old machine back"
    AWAIT_OLD = "waiting until the old machine is healthy again"


S = StepName

COMMAND = (S.PLACE_COMMAND, S.AWAIT_COMMAND, S.REMOVE_COMMAND)
BRING_NEW = (S.PLACE_NEW, S.AWAIT_NEW)
RETIRE_OLD = (S.CORDON_OLD, S.DRAIN_OLD, S.DESTROY_OLD, S.AWAIT_OLD_GONE)
RETIRE_NEW = (S.DESTROY_NEW, S.AWAIT_NEW_GONE)
BRING_OLD = (S.RESTORE_OLD, S.AWAIT_OLD)

IMMEDIATE = "immediate"
UNWATCHED = (S.AWAIT_NEW, S.DRAIN_OLD)
"""What the strategy `immediate` leaves out: nobody looks whether the new machines work."""

MAX_AT_ONCE = 8
"""Machines of a group that are replaced together, whatever fly.toml says."""


class Step(Value, frozen=True, kw_only=True):
    """A step of a plan; `slot` is None for those of the release command.

    `again`: the way back has tried to bring the slot's old machine back, and tries what was left undone.
    """

    name: StepName
    slot: Slot | None = None
    again: bool = False

    def words(self) -> str:
        """The step for people: where and what."""
        words = f"{self.slot.key}: {self.name.value}" if self.slot else self.name.value
        return f"{words}, again" if self.again else words


def slots(run: DeployRun, release: Release, machines: Sequence[Machine]) -> tuple[Slot, ...]:
    """The run's slots: those that the release wants, then those that it no longer has.

    A machine that was moved off a lost host is replaced in the region that lacks one, before all
    others: only then its region may have room for its own.
    """
    config = release.config
    old = sorted(
        (m for m in machines if 0 < m.release < release.version and m.desired is not Desired.DESTROYED),
        key=lambda m: (m.created_at_s, m.id),
    )
    planned: list[Slot] = []
    for group in process_groups(config):
        serves = bool(config.groups[group].services)
        for region in run.regions:
            count = wanted(run.counts, group, region, everywhere=serves, primary=run.regions[0])
            for number in range(count):
                replaced = _taken(old, group, (region,))
                shared = replaced is not None and _shares_volume(config, group, replaced)
                slot = Slot(region=region, group=group, number=number, old=replaced, old_first=shared)
                planned.append(slot)
    moved: list[Slot] = []
    for slot in [slot for slot in planned if slot.old is None]:
        replaced = _taken(old, slot.group, run.regions, movable=True)
        if replaced is not None:
            planned.remove(slot)
            moved.append(msgspec.structs.replace(slot, old=replaced))
    planned = [*moved, *planned]
    for number, machine in enumerate(old, start=max(1, len(planned))):  # a key that no slot above has
        group = machine.config.process_group
        planned.append(Slot(region=machine.region, group=group, number=number, old=machine, wanted=False))
    return tuple(planned)


def _taken(
    old: list[Machine], group: str, regions: Sequence[str], *, movable: bool = False
) -> Machine | None:
    """The oldest machine of the group in one of the regions, taken off the list."""
    for machine in old:
        fits = machine.config.process_group == group and machine.region in regions
        if fits and not (movable and machine.config.mounts):
            old.remove(machine)
            return machine
    return None


def steps(run: DeployRun, release: Release) -> tuple[Step, ...]:
    """The plan of the run's phase; empty where there is none."""
    forward = _forward(run, release)
    if run.phase is Phase.ROLLING:
        return forward
    if run.phase is Phase.UNDOING:
        return _backward(forward[: run.reached], run)
    return ()


def current_step(run: DeployRun, release: Release) -> Step | None:
    """The step that the run is at; None past the end of its phase's plan."""
    plan = steps(run, release)
    return plan[run.done] if run.done < len(plan) else None


def command_machine_id(run: DeployRun) -> str:
    """The machine that runs the release command."""
    return derived_machine_id(run.app, run.id, "release_command")


def new_machine_id(run: DeployRun, slot: Slot) -> str:
    """The new release's machine in a slot."""
    return derived_machine_id(run.app, run.id, slot.key, "new")


def restored_machine_id(run: DeployRun, slot: Slot) -> str:
    """The machine that stands for the old one, where a walk back had to make it again."""
    return derived_machine_id(run.app, run.id, slot.key, "restored")


def _shares_volume(config: AppConfig, group: str, old: Machine) -> bool:
    held = [mount.name for mount in old.config.mounts]
    return any(mount.name in held for mount in config.groups[group].mounts)


def _forward(run: DeployRun, release: Release) -> tuple[Step, ...]:
    policy = release.config.deploy
    plan = [Step(name=name) for name in COMMAND] if policy.release_command else []
    skipped = UNWATCHED if policy.strategy == IMMEDIATE else ()
    for batch in _batches(run.slots, policy):
        first = [slot for slot in batch if slot.old_first]
        stages = (
            (RETIRE_OLD, first),
            (BRING_NEW, [slot for slot in batch if slot.wanted]),
            (RETIRE_OLD, [slot for slot in batch if slot.old and not slot.old_first]),
        )
        plan += [
            Step(name=name, slot=slot)
            for names, slots in stages
            for name in names
            if name not in skipped
            for slot in slots
        ]
    return tuple(plan)


def _batches(slots: Sequence[Slot], policy: DeployPolicy) -> list[list[Slot]]:
    """The slots that go through each step together.

    Of each group the first alone, so that a release that does not work costs one machine, then as many
    as fly.toml's `max_unavailable` says; what the release no longer has, one by one. `immediate`: all.
    """
    if policy.strategy == IMMEDIATE:
        return [list(slots)]
    numbers = Counter(slot.group for slot in slots if slot.wanted)
    batches: list[list[Slot]] = []
    filling: dict[str, list[Slot] | None] = {}  # of each group that was begun; None: the first is alone
    for slot in slots:
        batch = filling.get(slot.group) if slot.wanted else None
        if batch is None or len(batch) >= at_once(numbers[slot.group], policy.max_unavailable):
            batches.append(batch := list[Slot]())
            if slot.wanted:
                filling[slot.group] = batch if slot.group in filling else None
        batch.append(slot)
    return batches


def at_once(number: int, max_unavailable: float) -> int:
    """How many of a group's machines are replaced together: below 1 that part of them, else that many."""
    wanted = math.ceil(number * max_unavailable) if max_unavailable < 1 else int(max_unavailable)
    return max(1, min(wanted, MAX_AT_ONCE))


def _backward(begun: tuple[Step, ...], run: DeployRun) -> tuple[Step, ...]:
    """Undo, newest first, every slot in which a step was begun; then the command's machine.

    What an old machine lacks (its host, or room) may be held by a new machine whose turn to go comes
    later. So where one was not brought back, all new ones go first, then it is tried again; those with
    volumes before the others, because they have one host alone.
    """
    touched = [slot for slot in reversed(run.slots) if any(step.slot == slot for step in begun)]
    plan: list[Step] = []
    for slot in touched:
        retire = RETIRE_NEW if slot.wanted else ()
        bring = BRING_OLD if slot.old else ()
        names = (*retire, *bring) if slot.old_first else (*bring, *retire)
        plan += [Step(name=name, slot=slot) for name in names]
    if any(step.slot is None for step in begun):
        plan.append(Step(name=S.REMOVE_COMMAND))
    old = sorted((slot for slot in touched if slot.old), key=lambda slot: not _has_volumes(slot))
    plan += [Step(name=S.DESTROY_NEW, slot=slot, again=True) for slot in old if slot.wanted]
    plan += [Step(name=name, slot=slot, again=True) for slot in old for name in BRING_OLD]
    return tuple(plan)


def _has_volumes(slot: Slot) -> bool:
    return slot.old is not None and bool(slot.old.config.mounts)
