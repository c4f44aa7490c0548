"""A deploy that fails while machines have been moved and room is scarce leaves as many as there were."""

from __future__ import annotations

import msgspec
import pytest

from flyd.deploy.plan import StepName
from flyd.deploy.releases import RunState
from flyd.model import Desired
from tests.support.rollouts import STATEFUL, PureWorld, ended_well, make_config


def deployed(world: PureWorld, **groups: object) -> PureWorld:
    assert ended_well(world.deploy(make_config(**groups), 1))  # type: ignore[arg-type]
    world.history.clear()
    return world


def move(world: PureWorld, source: str, target: str) -> None:
    """As repairs do it with the machines of a lost host."""
    for machine in [m for m in world.machines.values() if m.region == source and not m.config.mounts]:
        world.machines[machine.id] = msgspec.structs.replace(machine, region=target, host=f"{target}-1")


def groups(world: PureWorld) -> list[str]:
    return sorted(name for names in world.running().values() for name in names)


@pytest.mark.parametrize("twice", [False, True])
def test_a_moved_machine_is_replaced_in_the_region_that_lacks_one_and_first(twice: bool) -> None:
    world = deployed(PureWorld())
    world.twice = twice
    move(world, "iad", "ams")
    world.room = {"ams": 2}  # so that nothing new fits there before one has gone
    assert ended_well(world.deploy(make_config(), 2))
    assert world.running() == {"ams": ["app@2"], "iad": ["app@2"]}
    assert world.history[:3] == ["place iad app@2", "cordon ams app@1", "destroy ams app@1"]


@pytest.mark.parametrize("twice", [False, True])
def test_an_old_machine_whose_region_has_no_room_any_more_comes_back_in_another(twice: bool) -> None:
    world = deployed(PureWorld())
    world.twice = twice
    world.behaviour = lambda m: "sick" if (m.release, m.region) == (2, "iad") else "ok"
    world.before[StepName.AWAIT_NEW_GONE] = lambda: setattr(world, "full", ("ams",))
    run = world.deploy(make_config(), 2)
    assert run.state is RunState.FAILED
    assert world.running() == {"iad": ["app@1", "app@1"]}
    assert world.history[-2:] == ["place iad app@1", "destroy ams app@2"]


@pytest.mark.parametrize("twice", [False, True])
def test_where_only_new_machines_hold_the_room_they_go_first_and_all_comes_back(twice: bool) -> None:
    world = deployed(PureWorld())
    world.twice = twice
    world.behaviour = lambda m: "sick" if (m.release, m.region) == (2, "iad") else "ok"

    def others_came() -> None:
        world.room = {"ams": 1, "iad": 1}

    world.before[StepName.AWAIT_NEW_GONE] = others_came
    run = world.deploy(make_config(), 2)
    assert run.state is RunState.FAILED
    assert world.running() == {"ams": ["app@1"], "iad": ["app@1"]}
    assert world.history[-2:] == ["destroy ams app@2", "place ams app@1"]  # it served until then


@pytest.mark.parametrize("twice", [False, True])
def test_a_machine_with_a_volume_is_brought_back_on_its_own_host_once_that_has_room(twice: bool) -> None:
    world = deployed(PureWorld(), app=STATEFUL)
    world.twice = twice
    volumes = {m.region: m.config.mounts[0].volume for m in world.machines.values()}
    world.behaviour = lambda m: "sick" if (m.release, m.region) == (2, "ams") else "ok"
    world.before[StepName.AWAIT_NEW_GONE] = lambda: setattr(world, "full", ("ams",))
    world.before[StepName.AWAIT_OLD] = lambda: setattr(world, "full", ())
    run = world.deploy(make_config(app=STATEFUL), 2)
    assert (run.state, groups(world)) == (RunState.FAILED, ["app@1", "app@1"])
    assert {m.region: m.config.mounts[0].volume for m in world.machines.values()} == volumes


@pytest.mark.parametrize("twice", [False, True])
def test_a_machine_that_was_stopped_or_out_of_routing_comes_back_as_it_was(twice: bool) -> None:
    world = deployed(PureWorld())
    world.twice = twice
    (old,) = [m for m in world.of_release(1) if m.region == "ams"]
    world.machines[old.id] = msgspec.structs.replace(old, desired=Desired.STOPPED, cordoned=True)
    world.behaviour = lambda m: "sick" if (m.release, m.region) == (2, "iad") else "ok"
    assert world.deploy(make_config(), 2).state is RunState.FAILED
    (back,) = [m for m in world.machines.values() if m.region == "ams"]
    assert (back.release, back.desired, back.cordoned) == (1, Desired.STOPPED, True)
    assert back.id != old.id


def test_where_no_room_comes_the_run_ends_all_the_same() -> None:
    world = deployed(PureWorld())
    world.behaviour = lambda m: "sick" if (m.release, m.region) == (2, "iad") else "ok"
    world.before[StepName.AWAIT_NEW_GONE] = lambda: setattr(world, "full", ("ams", "iad"))
    run = world.deploy(make_config(), 2)
    assert (run.state, world.running()) == (RunState.FAILED, {"iad": ["app@1"]})
