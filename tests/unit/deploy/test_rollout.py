"""Roll-outs walked in a pure world: what is done, in which order, and what a failure leaves."""

from __future__ import annotations

import msgspec
import pytest

from flyd.deploy import rollout
from flyd.deploy.appconfig import AppConfig
from flyd.deploy.appconfig.expansion import RELEASE_COMMAND_GROUP
from flyd.deploy.plan import StepName
from flyd.deploy.releases import RunState
from flyd.model import Desired, Machine
from tests.support.rollouts import (
    STATEFUL,
    WEB,
    WORKER,
    Behaviour,
    PureWorld,
    ended_well,
    make_config,
    with_command,
)

BOTH = {"ams": ["app@1"], "iad": ["app@1"]}


def deployed(config: AppConfig, twice: bool = False) -> PureWorld:
    """A world in which release 1 runs."""
    world = PureWorld()
    world.twice = twice
    assert ended_well(world.deploy(config, 1))
    world.history.clear()
    return world


def new_in(region: str, behaviour: str) -> Behaviour:
    """Machines of release 2 in one region misbehave."""
    return lambda m: behaviour if (m.release, m.region) == (2, region) else "ok"


@pytest.mark.parametrize("twice", [False, True])
def test_each_machine_is_replaced_only_once_the_new_one_is_healthy(twice: bool) -> None:
    world = deployed(make_config(), twice)
    assert world.running() == BOTH
    assert ended_well(world.deploy(make_config(), 2))
    assert world.history == [
        "place ams app@2", "cordon ams app@1", "destroy ams app@1",
        "place iad app@2", "cordon iad app@1", "destroy iad app@1",
    ]  # fmt: skip
    assert world.running() == {"ams": ["app@2"], "iad": ["app@2"]}


@pytest.mark.parametrize("twice", [False, True])
def test_a_machine_with_a_volume_goes_before_its_successor_comes(twice: bool) -> None:
    world = deployed(make_config(app=STATEFUL), twice)
    volumes = {m.region: m.config.mounts[0].volume for m in world.machines.values()}
    assert ended_well(world.deploy(make_config(app=STATEFUL), 2))
    assert world.history[:3] == ["cordon ams app@1", "destroy ams app@1", "place ams app@2"]
    assert {m.region: m.config.mounts[0].volume for m in world.machines.values()} == volumes
    assert world.overlap


def test_groups_without_services_run_in_the_primary_region_only() -> None:
    world = PureWorld()
    assert ended_well(world.deploy(make_config(app=WEB, worker=WORKER), 1))
    assert world.running() == {"ams": ["app@1", "worker@1"], "iad": ["app@1"]}


def test_what_the_release_no_longer_wants_goes_last() -> None:
    world = deployed(make_config(app=WEB, worker=WORKER))
    assert ended_well(world.deploy(make_config(), 2, regions=("iad", "sin")))
    assert world.running() == {"iad": ["app@2"], "sin": ["app@2"]}
    assert sorted(h for h in world.history[-4:] if h.startswith("destroy")) == [
        "destroy ams app@1", "destroy ams worker@1",
    ]  # fmt: skip


def test_machines_that_no_deploy_made_are_left_alone() -> None:
    world = deployed(make_config())
    by_hand = msgspec.structs.replace(next(iter(world.machines.values())), id="by-hand", release=0)
    world.machines["by-hand"] = by_hand
    assert ended_well(world.deploy(make_config(), 2))
    assert world.machines["by-hand"] == by_hand


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        (
            "sick",
            "was not healthy in 60 s; last known: state started; "
            "check service-8080 critical: connection refused",
        ),
        ("loops", "keeps ending (3 restarts): exited with code 1"),
        ("exits", "ended instead of serving: exited with code 1"),
        ("broken", "could not be run, tried 3 times: no such file"),
        ("silent", "was not healthy in 60 s; last known: its host has said nothing of it yet"),
    ],
)
@pytest.mark.parametrize("region", ["ams", "iad"])
def test_a_failure_leaves_what_was_there(region: str, behaviour: str, words: str, twice: bool) -> None:
    world = deployed(make_config(), twice)
    world.behaviour = new_in(region, behaviour)
    run = world.deploy(make_config(), 2)
    assert (run.state, world.running()) == (RunState.FAILED, BOTH)
    assert words in run.error
    if region == "ams":  # nothing was touched but the new machine
        assert world.history == ["place ams app@2", "destroy ams app@2"]
    else:  # ams was done already: its old machine is made again before the new one goes
        assert world.history[-3:] == ["destroy iad app@2", "place ams app@1", "destroy ams app@2"]


@pytest.mark.parametrize("twice", [False, True])
def test_a_failure_with_volumes_puts_the_old_release_back_on_them(twice: bool) -> None:
    world = deployed(make_config(app=STATEFUL), twice)
    volumes = {m.region: m.config.mounts[0].volume for m in world.machines.values()}
    world.behaviour = new_in("iad", "sick")
    run = world.deploy(make_config(app=STATEFUL), 2)
    assert (run.state, world.running()) == (RunState.FAILED, BOTH)
    assert {m.region: m.config.mounts[0].volume for m in world.machines.values()} == volumes
    assert world.overlap


def test_no_room_is_a_failure_too() -> None:
    world = deployed(make_config())
    world.full = ("iad",)
    run = world.deploy(make_config(), 2)
    assert (run.state, world.running()) == (RunState.FAILED, BOTH)
    assert run.error == "no host can take it in iad"


@pytest.mark.parametrize("behaviour", ["sick", "exits", "broken"])
def test_a_first_deploy_that_fails_leaves_nothing(behaviour: str) -> None:
    world = PureWorld(lambda m: behaviour if m.region == "iad" else "ok")
    run = world.deploy(with_command(make_config()), 1)
    assert (run.state, world.machines) == (RunState.FAILED, {})


def test_the_release_command_comes_first_in_the_primary_region() -> None:
    world = deployed(make_config())
    assert ended_well(world.deploy(with_command(make_config()), 2))
    assert world.history[:3] == [
        f"place ams {RELEASE_COMMAND_GROUP}@2", f"destroy ams {RELEASE_COMMAND_GROUP}@2", "place ams app@2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("exits", "the release command failed: exited with code 1"),
        ("broken", "the release command did not run: could not be run, tried 3 times: no such file"),
        ("silent", "the release command took more than 300 s"),
    ],
)
def test_a_failed_release_command_touches_nothing(behaviour: str, words: str) -> None:
    world = deployed(make_config())
    world.behaviour = lambda m: behaviour if m.config.process_group == RELEASE_COMMAND_GROUP else "ok"
    run = world.deploy(with_command(make_config()), 2)
    assert (run.state, world.running()) == (RunState.FAILED, BOTH)
    assert words in run.error
    assert not any("app@" in line for line in world.history)


def test_the_release_command_is_a_machine_of_its_own_kind() -> None:
    config = with_command(make_config())
    seen: list[Machine] = []

    def watch(machine: Machine) -> str:
        if machine.config.process_group == RELEASE_COMMAND_GROUP:
            seen.append(machine)
        return "ok"

    PureWorld(watch).deploy(config, 1)
    command = seen[0].config
    assert command.env["RELEASE_COMMAND"] == "1"
    assert (command.restart.policy, command.services, command.auto_destroy) == ("no", (), False)


def test_an_old_machine_on_a_lost_host_is_not_waited_for() -> None:
    world = deployed(make_config())
    world.alive = ("ams-1", "sin-1")
    old = next(m for m in world.machines.values() if m.region == "iad")
    run = world.deploy(make_config(), 2, regions=("ams", "sin"))
    assert ended_well(run)
    assert world.machines[old.id].desired is Desired.DESTROYED
    assert world.running() == {"ams": ["app@2"], "sin": ["app@2"]}


def test_a_volume_on_a_lost_host_stops_the_deploy_before_it_harms() -> None:
    world = deployed(make_config(app=STATEFUL))
    world.alive = ("ams-1",)
    run = world.deploy(make_config(app=STATEFUL), 2)
    assert (run.state, world.running()) == (RunState.FAILED, BOTH)
    assert "can not give up its volume: its host iad-1 is lost" in run.error


def test_a_host_that_is_away_for_a_moment_keeps_a_volume_waiting_not_the_deploy_failing() -> None:
    world = deployed(make_config(app=STATEFUL))
    everyone = world.alive

    def away() -> None:
        world.alive, world.comes_back = ("iad-1",), [everyone]

    world.before[StepName.AWAIT_OLD_GONE] = away
    assert ended_well(world.deploy(make_config(app=STATEFUL), 2))
    assert world.running() == {"ams": ["app@2"], "iad": ["app@2"]}


def test_a_host_that_is_away_for_longer_gets_its_old_machine_back_when_it_returns() -> None:
    world = deployed(make_config(app=STATEFUL))
    everyone = world.alive

    def away() -> None:
        world.alive, world.comes_back = ("iad-1",), [("iad-1",), everyone]

    world.before[StepName.AWAIT_OLD_GONE] = away
    run = world.deploy(make_config(app=STATEFUL), 2)
    assert (run.state, world.running()) == (RunState.FAILED, BOTH)
    assert "still holds its volume: its host ams-1 is lost" in run.error
    assert world.overlap


def test_a_new_machine_whose_host_stays_lost_fails_the_deploy_early() -> None:
    world = deployed(make_config())
    world.behaviour = new_in("iad", "silent")
    world.alive = ("ams-1",)
    run = world.deploy(make_config(), 2)
    assert run.state is RunState.FAILED
    assert "is on lost host iad-1" in run.error


@pytest.mark.parametrize("at", [StepName.AWAIT_NEW, StepName.DRAIN_OLD])
def test_an_old_machine_that_somebody_destroys_meanwhile_is_not_missed(at: StepName) -> None:
    world = deployed(make_config())
    world.before[at] = lambda: [world.machines.pop(m.id) for m in world.of_release(1)]
    assert ended_well(world.deploy(make_config(), 2))
    assert world.running() == {"ams": ["app@2"], "iad": ["app@2"]}


def test_a_new_machine_that_somebody_destroys_fails_the_deploy() -> None:
    world = deployed(make_config())
    world.before[StepName.AWAIT_NEW] = lambda: [world.machines.pop(m.id) for m in world.of_release(2)]
    run = world.deploy(make_config(), 2)
    assert (run.state, world.running()) == (RunState.FAILED, BOTH)
    assert "was destroyed by somebody else" in run.error


def test_every_step_has_a_judge() -> None:
    assert sorted(rollout.JUDGES) == sorted(StepName)
