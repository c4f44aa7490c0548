"""Several machines for a group and region: what a scale changes, and what deploys make of it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyd.deploy import counts, plan
from flyd.deploy.releases import DeployRun, Release
from flyd.model import App, Desired, Machine
from tests.support.placing import make_host, make_machine
from tests.support.rollouts import WEB, WORKER, PureWorld, ended_well, make_config

REGIONS = ("ams", "iad", "sin")
TWO_IN_AMS = {"app": {"ams": 2}}


def machine(number: int, region: str = "ams", **fields: object) -> Machine:
    made = make_machine(f"m{number}", make_host(f"{region}-1"))
    return msgspec.structs.replace(made, **{"release": 1, "created_at_s": float(number), **fields})


# --------------------------------------------------------------------------- what is wanted


@pytest.mark.parametrize(
    ("said", "region", "everywhere", "number"),
    [
        ({}, "ams", True, 1),
        ({}, "iad", True, 1),
        ({}, "ams", False, 1),
        ({}, "iad", False, 0),
        ({"app": {"iad": 3}}, "iad", False, 3),
        ({"app": {"iad": 3}}, "ams", True, 1),
        ({"app": {"ams": 0}}, "ams", True, 0),
        ({"worker": {"ams": 5}}, "ams", True, 1),
    ],
)
def test_what_nobody_has_said_is_one_each(
    said: counts.Counts, region: str, everywhere: bool, number: int
) -> None:
    assert counts.wanted(said, "app", region, everywhere=everywhere, primary="ams") == number


@given(
    st.integers(0, 30),
    st.lists(st.sampled_from(("a", "b", "c", "d")), min_size=1, unique=True),
    st.dictionaries(st.sampled_from(("a", "b", "c", "d")), st.integers(0, 5)),
)
def test_a_total_is_spread_even_within_one_and_stays_where_machines_are(
    total: int, regions: list[str], have: dict[str, int]
) -> None:
    each = counts.spread(total, regions, have)
    assert (sum(each.values()), list(each)) == (total, regions)
    assert max(each.values()) - min(each.values()) <= 1
    more = [have.get(r, 0) for r in regions if each[r] == max(each.values())]
    less = [have.get(r, 0) for r in regions if each[r] < max(each.values())]
    assert not less or min(more) >= max(less)


def test_the_newest_go_first_and_before_them_what_is_out_of_routing() -> None:
    machines = [machine(3), machine(1), machine(2, cordoned=True), machine(4)]
    for want, kept in ((5, "m1 m3 m4 m2"), (4, "m1 m3 m4 m2"), (3, "m1 m3 m4"), (1, "m1"), (0, "")):
        (change,) = counts.changes(machines, "app", {"ams": want})
        assert " ".join(m.id for m in change.keep) == kept
        assert (change.add, len(change.keep) + len(change.remove)) == (max(0, want - 4), 4)


def test_machines_of_others_are_not_counted() -> None:
    strangers = [
        machine(1, "iad"),
        machine(2, desired=Desired.DESTROYED),
        machine(3, release=0),
        msgspec.structs.replace(make_machine("m4", make_host("ams-1"), group="worker"), release=1),
    ]
    (change,) = counts.changes(strangers, "app", {"ams": 1})
    assert (change.keep, change.remove, change.add) == ((), (), 1)


def test_a_new_region_is_new_for_the_scaled_group_alone() -> None:
    app = App(name="chat", regions=("ams",), counts={"worker": {"ams": 2}})
    scaled = counts.recorded(app, "worker", {"ams": 1, "fra": 3}, served=["app"])
    assert scaled.regions == ("ams", "fra")
    assert scaled.counts == {"worker": {"ams": 1, "fra": 3}, "app": {"fra": 0}}
    assert counts.recorded(scaled, "app", {"fra": 2}, served=["app"]).counts["app"] == {"fra": 2}
    assert counts.recorded(app, "app", {"fra": 0}, served=["app"]).regions == ("ams",)


# --------------------------------------------------------------------------- what deploys make of it


def test_a_deploy_replaces_as_many_as_there_are_to_be() -> None:
    world = PureWorld()
    assert ended_well(world.deploy(make_config(), 1, counts=TWO_IN_AMS))
    assert world.running() == {"ams": ["app@1", "app@1"], "iad": ["app@1"]}
    world.history.clear()
    assert ended_well(world.deploy(make_config(), 2, counts=TWO_IN_AMS))
    assert world.running() == {"ams": ["app@2", "app@2"], "iad": ["app@2"]}
    assert world.history[:6] == ["place ams app@2", "cordon ams app@1", "destroy ams app@1"] * 2


def test_a_deploy_removes_the_newest_of_too_many_and_adds_what_is_missing() -> None:
    world = PureWorld()
    assert ended_well(world.deploy(make_config(), 1, counts={"app": {"ams": 3}}))
    assert ended_well(world.deploy(make_config(), 2, counts={"app": {"ams": 1, "iad": 2}}))
    assert world.running() == {"ams": ["app@2"], "iad": ["app@2", "app@2"]}
    config = make_config(app=WEB, worker=WORKER)
    assert ended_well(world.deploy(config, 3, counts={"app": {"iad": 0}, "worker": {"ams": 0, "iad": 2}}))
    assert world.running() == {"ams": ["app@3"], "iad": ["worker@3", "worker@3"]}


def test_a_failed_deploy_leaves_as_many_as_there_were() -> None:
    said = {"app": {"ams": 3}}
    world = PureWorld()
    assert ended_well(world.deploy(make_config(), 1, counts=said))
    before = world.running()
    world.behaviour = lambda m: "sick" if (m.release, m.region) == (2, "iad") else "ok"
    run = world.deploy(make_config(), 2, counts=said)
    assert "was not healthy" in run.error
    assert world.running() == before


@given(
    st.dictionaries(st.sampled_from(REGIONS), st.integers(0, 3)),
    st.lists(st.sampled_from(REGIONS), max_size=8),
    st.lists(st.sampled_from(REGIONS), min_size=1, unique=True),
)
def test_every_machine_has_one_slot_and_every_slot_a_key(
    said: dict[str, int], there: list[str], regions: list[str]
) -> None:
    machines = tuple(machine(number, region) for number, region in enumerate(there))
    run = DeployRun(id="r", app="chat", version=2, regions=tuple(regions), counts={"app": said})
    slots = plan.slots(run, Release(version=2, app="chat", image="i", config=make_config()), machines)
    assert len({slot.key for slot in slots}) == len(slots)
    assert sorted(slot.old.id for slot in slots if slot.old) == sorted(m.id for m in machines)
    for region in REGIONS:
        there_wanted = [slot for slot in slots if slot.region == region and slot.wanted]
        assert len(there_wanted) == (said.get(region, 1) if region in regions else 0)
        newest = sorted((s.old.created_at_s for s in slots if s.region == region and s.old), reverse=True)
        gone = [s.old.created_at_s for s in slots if s.region == region and s.old and not s.wanted]
        assert sorted(gone, reverse=True) == newest[: len(gone)]
