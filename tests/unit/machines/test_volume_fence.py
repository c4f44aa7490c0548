"""A host that was away mounts no volume before it has heard from etcd whose it is now."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from flyd.machines import decide as decisions
from flyd.machines import fencing
from flyd.machines.assignments import doomed
from flyd.machines.decide import MOUNTING, Nothing, Perform, View, decide
from flyd.machines.environment import Assignment
from flyd.machines.fencing import STALE_STOP_S, why_abandoned
from flyd.model import Desired, ExitStatus, MachineState, StopConfig
from tests.support.host_world import World, machine, placed_with_volume


async def test_a_machine_with_a_volume_waits_for_etcd_and_one_without_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fencing, "FENCE_WAIT_S", 0.05)
    world = World()
    placed_with_volume(world)
    world.claim(replace(machine(), id="other"))
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
        await world.until(lambda: len(world.driver.starts) == 2)
    for machine_id in ("m1", "other"):
        world.driver.end(machine_id, ExitStatus(code=1))
    async with world.flyd(away=True):
        await world.until(lambda: world.driver.starts.count("other") == 2)
        await asyncio.sleep(0.05)
        assert world.driver.starts.count("m1") == 1
        world.kv.away = False
        await world.until(lambda: world.driver.starts.count("m1") == 2)


async def test_a_volume_that_went_elsewhere_meanwhile_is_never_mounted_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fencing, "FENCE_WAIT_S", 0.05)
    world = World()
    claim = placed_with_volume(world)
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
    world.driver.end("m1", ExitStatus(code=1))
    world.claim(replace(claim, host="h2", epoch=2))
    async with world.flyd(away=True):
        await asyncio.sleep(0.1)
        world.kv.away = False
        await world.until(lambda: not world.run_log.records("machines/"))
    assert world.driver.starts == ["m1"]


def test_what_counts_as_mounting() -> None:
    claim = placed_with_volume(World())
    asked = View(host="h1", now=1.0, claim=claim)
    assert decide(asked) == Perform(operation=decisions.CREATE)
    assert decide(replace(asked, learned=False)) == Nothing()
    assert decide(replace(asked, claim=machine(), learned=False)) == Perform(operation=decisions.CREATE)
    ending = replace(asked, claim=replace(claim, desired=Desired.DESTROYED), learned=False)
    assert decide(ending) == Perform(operation=decisions.DESTROY)
    assert decisions.DESTROY not in MOUNTING
    assert decisions.STOP not in MOUNTING


def test_what_was_begun_and_is_not_finished() -> None:
    claim = placed_with_volume(World())
    assert not why_abandoned(claim, stale=False, learned=True)
    assert not why_abandoned(machine(), stale=False, learned=False)
    assert "may be another host's" in why_abandoned(claim, stale=False, learned=False)
    assert "another host" in why_abandoned(machine(), stale=True, learned=True)


def test_an_old_copy_has_little_time_to_end_though_its_machine_came_back() -> None:
    """Its claim went elsewhere and back: what runs here has the volume that it had before."""
    claim = placed_with_volume(World())
    patient = replace(claim, config=replace(claim.config, stop=StopConfig(timeout_s=3600.0)))
    kept = Assignment(claim=patient, primary_region="fra", secrets={}, volumes=(), databases={})
    for now, stop_s in (
        (patient, 3600.0),
        (replace(patient, epoch=patient.epoch + 1), STALE_STOP_S),
        (replace(patient, host="h2"), STALE_STOP_S),
        (None, STALE_STOP_S),
    ):
        assert doomed(kept, now).claim.config.stop.timeout_s == stop_s
