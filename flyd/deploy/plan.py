"""What a run walks: its slots, and the steps of each phase. Pure; read by rollout.py.

A slot is one place for a machine, in a region and process group: the app's regions for a group
with services, the primary region alone for a group without. Each machine of an earlier
release is either replaced in one slot or removed in one. A plan is a tuple of steps that
follows from the run alone, so that "how many are done" is all that a run has to remember.
"""

from __future__ import annotations

from enum import StrEnum

from flyd.deploy.appconfig import AppConfig, process_groups
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


class Step(Value, frozen=True, kw_only=True):
    """A step of a plan; `slot` is None for those of the release command."""

    name: StepName
    slot: Slot | None = None

    def words(self) -> str:
        """The step for people: where and what."""
        return f"{self.slot.key}: {self.name.value}" if self.slot else self.name.value


def slots(release: Release, regions: tuple[str, ...], machines: tuple[Machine, ...]) -> tuple[Slot, ...]:
    """The run's slots: those that the release wants, then those that it no longer has."""
    old = sorted(
        (m for m in machines if 0 < m.release < release.version and m.desired is not Desired.DESTROYED),
        key=lambda m: (m.created_at_s, m.id),
    )
    planned: list[Slot] = []
    for group in process_groups(release.config):
        wanted = release.config.groups[group]
        for region in regions if wanted.services else regions[:1]:
            replaced = next((m for m in old if (m.region, m.config.process_group) == (region, group)), None)
            if replaced is not None:
                old.remove(replaced)
            planned.append(
                Slot(
                    region=region,
                    group=group,
                    old=replaced,
                    old_first=replaced is not None and _shares_volume(release.config, group, replaced),
                )
            )
    for number, machine in enumerate(old, start=1):
        planned.append(
            Slot(
                region=machine.region,
                group=machine.config.process_group,
                number=number,
                old=machine,
                wanted=False,
            )
        )
    return tuple(planned)


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
    plan = [Step(name=name) for name in COMMAND] if release.config.deploy.release_command else []
    for slot in run.slots:
        new = BRING_NEW if slot.wanted else ()
        retire = RETIRE_OLD if slot.old else ()
        names = (*retire, *new) if slot.old_first else (*new, *retire)
        plan += [Step(name=name, slot=slot) for name in names]
    return tuple(plan)


def _backward(begun: tuple[Step, ...], run: DeployRun) -> tuple[Step, ...]:
    """Undo, newest first, every slot in which a step was begun; the command's machine last."""
    touched = [slot for slot in reversed(run.slots) if any(step.slot == slot for step in begun)]
    plan: list[Step] = []
    for slot in touched:
        retire = RETIRE_NEW if slot.wanted else ()
        bring = BRING_OLD if slot.old else ()
        names = (*retire, *bring) if slot.old_first else (*bring, *retire)
        plan += [Step(name=name, slot=slot) for name in names]
    if any(step.slot is None for step in begun):
        plan.append(Step(name=S.REMOVE_COMMAND))
    return tuple(plan)
