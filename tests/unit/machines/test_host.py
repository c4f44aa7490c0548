"""The host loop's ordinary life: claims, exits, checks, etcd away (fakes: tests/support/host_world.py)."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from flyd.machines import fencing
from flyd.model import (
    App,
    AppKind,
    Check,
    Desired,
    ExitStatus,
    MachineConfig,
    MachineState,
    Observed,
    RestartPolicy,
    Secrets,
    Service,
    StopConfig,
    Volume,
    decode,
)
from flyd.store import keys
from tests.support.host_world import SOURCE, World, assert_freed, machine, placed_with_volume


@pytest.fixture
def world() -> World:
    return World()


# --------------------------------------------------------------------------- the ordinary life


async def test_a_claim_is_created_and_started_and_said(world: World) -> None:
    world.put(keys.app("web"), App(name="web", regions=("ams", "fra")))
    world.put(
        keys.secrets("web"), Secrets(app="web", values={"DATABASE_URL": "postgres://u@db.internal:5432/x"})
    )
    world.put(keys.app("db"), App(name="db", kind=AppKind.POSTGRES, endpoint_port=6001))
    world.claim(machine())
    async with world.flyd():
        status = await world.until_state(MachineState.STARTED)
        spec = world.driver.specs["m1"]
    assert (status.pid, status.host, status.instance_id) == (100, "h1", "01A")
    assert [event.type for event in status.events] == ["launch", "start"]
    assert spec.command == ("./serve", "--host", "127.10.0.2")
    assert spec.env["DATABASE_URL"] == "postgres://u@127.10.0.1:6001/x"
    assert spec.env["PRIMARY_REGION"] == "ams"
    assert spec.source_path == "/src/" + "ab" * 32


async def test_stop_start_restart_as_asked(world: World) -> None:
    world.claim(machine())
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
        world.claim(machine(desired=Desired.STOPPED))
        await world.until_state(MachineState.STOPPED)
        world.claim(machine())
        await world.until_state(MachineState.STARTED)
        world.claim(machine(restart_nonce=1))
        await world.until(lambda: (s := world.status()) is not None and s.pid == 102)
        status = await world.until_state(MachineState.STARTED)
        world.claim(machine(restart_nonce=1, cordoned=True))
        await asyncio.sleep(0.02)
    assert [event.type for event in status.events] == ["launch", "start", "stop", "start", "restart"]
    assert len(world.driver.starts) == 3
    assert status.restarts == 0


async def test_created_machines_that_shall_not_start_do_not(world: World) -> None:
    world.claim(machine(desired=Desired.STOPPED))
    async with world.flyd():
        await world.until_state(MachineState.CREATED)
    assert world.driver.starts == []


async def test_destroy_gives_everything_back(world: World) -> None:
    claim = placed_with_volume(world)
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
        assert world.driver.specs["m1"].mounts == (("/vol/v1", "/data"),)
        assert world.volumes.held["v1"] == ("m1", 3)
        world.claim(msgspec.structs.replace(claim, desired=Desired.DESTROYED))
        await world.until(lambda: world.etcd.get(keys.machine("web", "m1")) is None)
        await world.until(lambda: not world.run_log.open_runs())
    assert_freed(world)


async def test_a_claim_that_was_never_seen_here_is_freed(world: World) -> None:
    claim = placed_with_volume(world)
    world.claim(msgspec.structs.replace(claim, desired=Desired.DESTROYED))
    async with world.flyd():
        await world.until(lambda: world.etcd.get(keys.machine("web", "m1")) is None)
        await world.until(lambda: not world.run_log.open_runs())
    assert world.driver.starts == []


@pytest.mark.parametrize("gone", ["deleted", "elsewhere", "newer epoch here"])
async def test_a_machine_that_is_no_longer_ours_is_removed(world: World, gone: str) -> None:
    world.claim(machine())
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
        if gone == "deleted":
            world.delete(keys.machine("web", "m1"))
            await world.until(lambda: not world.driver.seen and world.state() is None)
        elif gone == "elsewhere":
            world.claim(machine(host="h2", epoch=2))
            await world.until(lambda: not world.driver.seen and not world.run_log.records("machines/"))
            assert world.etcd.get(keys.machine("web", "m1")) is not None
        else:
            world.claim(machine(epoch=2))
            await world.until(lambda: len(world.driver.starts) == 2)
            await world.until(lambda: (s := world.status()) is not None and s.epoch == 2)
    assert len(world.driver.starts) == (2 if gone == "newer epoch here" else 1)


@pytest.mark.parametrize("remembered", [True, False])
async def test_a_stale_copy_ends_before_anything_else_begins(world: World, remembered: bool) -> None:
    slow = MachineConfig(image=SOURCE, cmd=("x",), stop=StopConfig(timeout_s=3600.0))
    world.claim(machine(config=slow))
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
    if not remembered:
        for key in world.run_log.records("machines/"):
            world.run_log.delete_record(key)
    world.claim(machine(config=slow, host="h2", epoch=2))
    world.claim(machine(id="m0", instance_id="01B"))
    async with world.flyd(away=True):
        world.driver.end("m1", ExitStatus(code=1))
        await asyncio.sleep(0.05)
        assert world.driver.starts == ["m1"], "not started again before etcd was asked whose it is"
        world.kv.away = False
        await world.until(lambda: world.driver.starts == ["m1", "m0"])
        assert "m1" not in world.driver.seen, "gone before m0 began"


def test_a_stale_copy_gets_little_time_to_end() -> None:
    config = MachineConfig(image=SOURCE, stop=StopConfig(timeout_s=3600.0))
    assert fencing.ended_soon(machine(config=config)).config.stop.timeout_s == fencing.STALE_STOP_S


async def test_what_nobody_claims_is_left_alone(world: World) -> None:
    stray = Observed(machine_id="stray", instance_id="x", running=True, pid=7)
    world.driver.seen["stray"] = stray
    world.claim(machine())
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
        world.driver.ended.put_nowait("stray")
        await world.until(world.driver.ended.empty)
    assert world.driver.seen["stray"] == stray


# --------------------------------------------------------------------------- exits


async def test_a_crash_is_restarted_by_policy_and_counted(world: World) -> None:
    world.claim(machine())
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
        world.driver.end("m1", ExitStatus(code=1))
        await world.until(lambda: len(world.driver.starts) == 2)
        await world.until(lambda: (s := world.status()) is not None and s.pid == 101)
    status = world.status()
    assert status is not None
    assert [event.type for event in status.events] == ["launch", "start", "exit", "start"]
    assert status.events[2].exit == ExitStatus(code=1)
    assert status.restarts == 1


async def test_the_exit_code_of_a_one_shot_machine_stays_visible(world: World) -> None:
    world.claim(machine(config=MachineConfig(image="host:", cmd=("x",), restart=RestartPolicy(policy="no"))))
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
        world.driver.end("m1", ExitStatus(code=3))
        status = await world.until_state(MachineState.STOPPED)
        assert status.events[-1].exit == ExitStatus(code=3)
    async with world.flyd():  # a new flyd must not start it again
        world.claim(
            machine(config=MachineConfig(image="host:", restart=RestartPolicy(policy="no")), restart_nonce=1)
        )
        await world.until(lambda: len(world.driver.starts) == 2)


async def test_a_start_that_fails_is_tried_again_with_its_reason_shown(world: World) -> None:
    world.driver.refuse_start = 1
    world.claim(machine())
    async with world.flyd():
        status = await world.until_state(MachineState.FAILED)
        assert status.detail == "run: no such program"
        await world.until_state(MachineState.STARTED)


async def test_a_start_that_fails_rests_under_policy_no(world: World) -> None:
    world.driver.refuse_start = 1
    one_shot = MachineConfig(image="host:", cmd=("x",), restart=RestartPolicy(policy="no"))
    world.claim(machine(config=one_shot))
    async with world.flyd():
        await world.until_state(MachineState.FAILED)
        await asyncio.sleep(0.3)
        assert world.driver.starts == []


async def test_what_a_power_cut_took_from_the_driver_is_made_again(world: World) -> None:
    world.claim(machine())
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
    world.driver.seen.clear()
    world.driver.specs.clear()
    async with world.flyd():
        await world.until(lambda: len(world.driver.starts) == 2)
        await world.until(lambda: (s := world.status()) is not None and s.restarts == 1)


async def test_a_create_that_fails_is_undone_and_tried_again(world: World) -> None:
    world.sources.fails = 1
    world.claim(machine())
    async with world.flyd():
        status = await world.until_state(MachineState.FAILED)
        assert status.detail == "source: no host has it"
        await world.until_state(MachineState.STARTED)


async def test_a_machine_whose_volume_is_not_given_to_it_says_so(world: World) -> None:
    claim = placed_with_volume(world)
    volume = world.etcd.get(keys.volume("web", "v1"))
    assert volume is not None
    taken = msgspec.structs.replace(decode(volume.value, Volume), attached_machine="m2")
    world.put(keys.volume("web", "v1"), taken)
    world.claim(claim)
    async with world.flyd():
        status = await world.until_state(MachineState.FAILED)
    assert "volume v1 is not given to machine m1" in status.detail
    assert world.volumes.created == []


# --------------------------------------------------------------------------- checks


async def test_checks_decide_health_and_come_back(world: World) -> None:
    world.probe_ok = False
    check = Check(kind="tcp", port=80, interval_s=0.02, grace_period_s=60.0)
    config = MachineConfig(
        image="host:",
        cmd=("x",),
        services=(Service(internal_port=80, checks=(check,)),),
        checks={"own": check},
    )
    world.claim(machine(config=config))
    async with world.flyd():
        status = await world.until_state(MachineState.STARTED)
        assert [c.status for c in status.checks] == ["warning", "warning"]
        assert not status.routable()
        world.probe_ok = True
        await world.until(lambda: (s := world.status()) is not None and s.healthy())
        world.probe_ok = False
        await world.until(
            lambda: (s := world.status()) is not None and all(c.status == "critical" for c in s.checks)
        )
        world.probe_ok = True
        await world.until(lambda: (s := world.status()) is not None and s.healthy())
    revision = world.etcd.revision
    async with world.flyd():  # a new flyd goes on from what was known: never a moment of doubt
        probes = world.probes
        await world.until(lambda: world.probes > probes + 4)
        status = world.status()
        assert status is not None
        assert status.healthy()
    assert world.etcd.revision <= revision + 1


# --------------------------------------------------------------------------- etcd away, flyd gone


async def test_a_new_flyd_adopts_what_runs(world: World) -> None:
    world.claim(machine())
    async with world.flyd():
        before = await world.until_state(MachineState.STARTED)
    async with world.flyd():
        await asyncio.sleep(0.05)
        assert world.status() == before
    assert world.driver.starts == ["m1"]


async def test_without_etcd_restarts_go_on_and_are_told_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fencing, "FENCE_WAIT_S", 0.05)
    world.claim(machine())
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
        world.kv.away = True
        world.driver.end("m1", ExitStatus(code=1))
        await world.until(lambda: len(world.driver.starts) == 2)
        world.kv.away = False
        await world.until(lambda: (s := world.status()) is not None and s.restarts == 1)
    world.driver.end("m1", ExitStatus(code=1))
    async with world.flyd(away=True):  # not even a first look at etcd
        await world.until(lambda: len(world.driver.starts) == 3)
        world.kv.away = False
        await world.until(lambda: (s := world.status()) is not None and s.restarts == 2)
