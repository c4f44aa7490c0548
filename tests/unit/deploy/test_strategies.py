"""How many machines are replaced together: `max_unavailable` and the strategy `immediate`."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyd.deploy import plan
from flyd.deploy.appconfig import AppConfig, parse
from flyd.deploy.plan import MAX_AT_ONCE, StepName, at_once
from flyd.deploy.releases import DeployRun, Phase, Release, RunState, Slot
from tests.support.rollouts import STATEFUL, WEB, WORKER, PureWorld, ended_well, make_config

REGIONS = ("ams", "fra", "iad", "sin")
BEFORE = {region: ["app@1"] for region in REGIONS}


def policy(config: AppConfig, **more: object) -> AppConfig:
    return msgspec.structs.replace(config, deploy=msgspec.structs.replace(config.deploy, **more))


def deployed(config: AppConfig, twice: bool = False) -> PureWorld:
    world = PureWorld()
    world.twice = twice
    world.alive = tuple(f"{region}-1" for region in REGIONS)
    assert ended_well(world.deploy(config, 1, REGIONS))
    world.history.clear()
    return world


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("group", [WEB, STATEFUL])
def test_the_first_alone_then_as_many_as_may_be_unavailable(group: object, twice: bool) -> None:
    config = policy(make_config(app=group), max_unavailable=0.5)  # type: ignore[arg-type]
    world = deployed(config, twice)
    assert ended_well(world.deploy(config, 2, REGIONS))
    done = [line.split()[0] + line[-1] for line in world.history]
    alone, together = ["place2", "cordon1", "destroy1"], ["place2"] * 2 + ["cordon1"] * 2 + ["destroy1"] * 2
    if group is STATEFUL:
        alone = ["cordon1", "destroy1", "place2"]
        together = ["cordon1"] * 2 + ["destroy1"] * 2 + ["place2"] * 2
    assert done == [*alone, *together, *alone]
    assert world.running() == {region: ["app@2"] for region in REGIONS}
    assert world.overlap


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("group", [WEB, STATEFUL])
def test_a_batch_that_fails_is_undone_as_a_whole(group: object, twice: bool) -> None:
    config = policy(make_config(app=group), max_unavailable=4)  # type: ignore[arg-type]
    world = deployed(config, twice)
    world.behaviour = lambda m: "sick" if (m.release, m.region) == (2, "iad") else "ok"
    run = world.deploy(config, 2, REGIONS)
    assert (run.state, world.running()) == (RunState.FAILED, BEFORE)
    assert world.overlap


def test_immediate_replaces_all_together_and_looks_at_none() -> None:
    config = policy(make_config(app=WEB, worker=WORKER), strategy="immediate")
    world = deployed(config)
    world.behaviour = lambda m: "sick" if m.release == 2 else "ok"
    assert ended_well(world.deploy(config, 2, REGIONS))
    assert [line.split()[0] for line in world.history] == ["place"] * 5 + ["cordon"] * 5 + ["destroy"] * 5
    assert all(m.release == 2 for m in world.machines.values())


def test_immediate_without_room_is_undone_too() -> None:
    config = policy(make_config(), strategy="immediate")
    world = deployed(config)
    world.full = ("iad",)
    run = world.deploy(config, 2, REGIONS)
    assert (run.state, world.running()) == (RunState.FAILED, BEFORE)


def test_fly_toml_says_it() -> None:
    config = parse('[deploy]\nstrategy = "immediate"\nmax_unavailable = 0.5', "fly.toml")
    assert (config.deploy.strategy, config.deploy.max_unavailable, config.warnings) == ("immediate", 0.5, ())
    assert parse("", "fly.toml").deploy.max_unavailable == 1
    (warning,) = parse('[deploy]\nstrategy = "bluegreen"', "fly.toml").warnings
    assert "flyd does not know bluegreen yet" in warning.message


@given(number=st.integers(1, 100), part=st.floats(0.001, 200))
def test_at_once_is_at_least_one_and_no_more_than_asked(number: int, part: float) -> None:
    together = at_once(number, part)
    assert 1 <= together <= MAX_AT_ONCE
    if together > 1:
        assert together - 1 < (part * number if part < 1 else part)


@given(
    groups=st.lists(st.sampled_from(["app", "worker"]), min_size=1, max_size=12),
    part=st.floats(0.05, 12),
    gone=st.integers(0, 3),
)
def test_every_slot_is_walked_once_whatever_the_batches(groups: list[str], part: float, gone: int) -> None:
    slots = [Slot(region="ams", group=group, number=n) for n, group in enumerate(groups)]
    slots += [Slot(region="iad", group="app", number=100 + n, wanted=False) for n in range(gone)]
    config = policy(make_config(), max_unavailable=part)
    release = Release(version=1, app="chat", image="i", config=config)
    run = DeployRun(id="r", app="chat", version=1, regions=("ams",), phase=Phase.ROLLING, slots=tuple(slots))
    placed = [step.slot for step in plan.steps(run, release) if step.name is StepName.PLACE_NEW]
    assert sorted(s.key for s in placed if s) == sorted(s.key for s in slots if s.wanted)
