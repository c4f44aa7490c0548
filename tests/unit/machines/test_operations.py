"""Operations step by step, and what a destroyed machine gives back."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from flyd.errors import Conflict, InvariantBroken, Refused
from flyd.machines.environment import Assignment, VolumeGrant
from flyd.machines.free import free
from flyd.machines.operations import DO, ENTERS, OPERATIONS, UNDO, Job, Tools, begin, execute
from flyd.machines.states import DEADLINES_S
from flyd.model import (
    Desired,
    MachineSpec,
    MachineState,
    MachineStatus,
    Reservations,
    Resources,
    RunEvent,
    Volume,
    decode,
)
from flyd.store import keys
from tests.support.host_world import World, assert_freed, machine, placed_with_volume


@pytest.fixture
def world() -> World:
    return World()


def assignment(world: World) -> Assignment:
    grant = VolumeGrant(id="v1", epoch=3, size_gb=1, path="/data")
    return Assignment(claim=placed_with_volume(world), primary_region="fra", volumes=(grant,))


async def run(tools: Tools, run_id: str, operation: str, given: Assignment) -> None:
    begin(tools, run_id, Job(operation=operation, assignment=given))
    await execute(tools, run_id)


def kinds(tools: Tools, run_id: str) -> list[str]:
    return [f"{e.kind} {e.step}".strip() for e in tools.run_log.events(run_id)]


def test_the_tables_fit_together() -> None:
    for operation in OPERATIONS.values():
        assert (operation.name, operation.steps[0].name) in ENTERS
        for step in operation.steps:
            assert step.name in DO
            assert not step.undoable or step.name in UNDO
    names = {(o.name, s.name) for o in OPERATIONS.values() for s in o.steps}
    assert set(ENTERS) <= names


async def test_a_failed_step_is_undone_with_all_before_it(world: World) -> None:
    async def refuse(spec: MachineSpec) -> None:
        raise Refused("disk full", hint="make room")

    world.driver.create = refuse
    tools = world.tools()
    await run(tools, "r1", "create", assignment(world))
    assert kinds(tools, "r1") == [
        "begin", "done source", "done volumes", "failed make", "undone make", "undone volumes", "end",
    ]  # fmt: skip
    record = tools.records.get("m1")
    assert record is not None
    assert (record.state, record.detail, record.prepared) == (
        MachineState.FAILED,
        "make: disk full (make room)",
        False,
    )
    assert world.volumes.held["v1"] == ("", 3)


async def test_an_undo_that_fails_leaves_the_run_open(world: World) -> None:
    async def refuse(spec: MachineSpec) -> None:
        raise Refused("disk full")

    async def busy(machine_id: str) -> None:
        raise OSError("device busy")

    world.driver.create = refuse
    destroy, world.driver.destroy = world.driver.destroy, busy
    tools = world.tools()
    with pytest.raises(OSError, match="busy"):
        await run(tools, "r1", "create", assignment(world))
    assert tools.run_log.open_runs() == ("r1",)
    world.driver.destroy = destroy
    await execute(tools, "r1")
    assert tools.run_log.open_runs() == ()


async def test_a_step_that_hangs_fails_at_its_deadline(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(digest: str) -> str:
        await asyncio.Event().wait()
        return ""

    world.sources.ensure = hang
    monkeypatch.setitem(DEADLINES_S, MachineState.CREATED, (0.01, DEADLINES_S[MachineState.CREATED][1]))
    tools = world.tools()
    await run(tools, "r1", "create", assignment(world))
    record = tools.records.get("m1")
    assert record is not None
    assert record.detail == "source: not done within 0.01 s"


async def test_an_ended_run_changes_nothing_when_executed_again(world: World) -> None:
    tools = world.tools()
    given = assignment(world)
    await run(tools, "r1", "create", given)
    await run(tools, "r2", "start", given)
    events, record = tools.run_log.events("r2"), tools.records.get("m1")
    await execute(tools, "r2")
    assert (tools.run_log.events("r2"), tools.records.get("m1")) == (events, record)


async def test_a_volume_that_was_made_here_is_never_made_again(world: World) -> None:
    tools = world.tools()
    given = assignment(world)
    await run(tools, "r1", "create", given)
    del world.volumes.held["v1"]
    with pytest.raises(KeyError):  # the fake's way to say that it is gone
        await run(tools, "r2", "start", given)
    assert world.volumes.created == ["v1"]


async def test_an_unknown_operation_is_our_own_bug(world: World) -> None:
    tools = world.tools()
    begin(tools, "r1", Job(operation="dance", assignment=assignment(world)))
    with pytest.raises(InvariantBroken, match="dance"):
        await execute(tools, "r1")


# --------------------------------------------------------------------------- free


def status_here(world: World, host: str = "h1") -> None:
    status = MachineStatus(
        id="m1", app="web", host=host, instance_id="01A", epoch=1, state=MachineState.DESTROYING
    )
    world.put(keys.status("web", "m1"), status)


async def test_free_is_done_once_and_again(world: World) -> None:
    ours = msgspec.structs.replace(placed_with_volume(world), desired=Desired.DESTROYED)
    world.claim(ours)
    status_here(world)
    world.volumes.held["v1"] = ("", 3)
    await free(world.kv, "h1", ours)
    assert_freed(world)
    revision = world.etcd.revision
    await free(world.kv, "h1", ours)
    assert_freed(world)
    assert world.etcd.revision <= revision + 1


async def test_free_keeps_what_is_another_hosts_by_now(world: World) -> None:
    ours = placed_with_volume(world)
    world.claim(msgspec.structs.replace(ours, host="h2", epoch=2))
    status_here(world, host="h2")
    await free(world.kv, "h1", ours)
    assert world.etcd.get(keys.machine("web", "m1")) is not None
    assert world.status() is not None
    volume = world.etcd.get(keys.volume("web", "v1"))
    assert volume is not None
    assert decode(volume.value, Volume).attached_machine == "m1"
    reserved = world.etcd.get(keys.reservations("h1"))
    assert reserved is not None
    assert list(decode(reserved.value, Reservations).machines) == ["other"]


async def test_free_keeps_everything_of_a_machine_that_is_wanted_here_again(world: World) -> None:
    ours = placed_with_volume(world)
    revision = world.etcd.revision
    await free(world.kv, "h1", msgspec.structs.replace(ours, desired=Desired.DESTROYED))
    assert world.etcd.revision == revision


async def test_free_tries_again_when_placement_writes_between(world: World) -> None:
    ours = msgspec.structs.replace(placed_with_volume(world), desired=Desired.DESTROYED)
    world.claim(ours)
    world.volumes.held["v1"] = ("", 3)
    writes = 3

    async def placed_meanwhile(op: str) -> None:
        nonlocal writes
        if op == "txn" and writes:
            writes -= 1
            stored = world.etcd.get(keys.reservations("h1"))
            assert stored is not None
            world.put(keys.reservations("h1"), decode(stored.value, Reservations))

    world.kv._before = placed_meanwhile  # pyright: ignore[reportPrivateUsage] - the fake's place for faults
    await free(world.kv, "h1", ours)
    assert_freed(world)
    writes = 1_000
    world.put(keys.reservations("h1"), Reservations(host="h1", machines={"m1": Resources()}))
    with pytest.raises(Conflict, match="reservations of host h1"):
        await free(world.kv, "h1", ours)


async def test_a_status_published_meanwhile_does_not_outlive_its_claim(world: World) -> None:
    ours = machine(desired=Desired.DESTROYED)
    world.claim(ours)
    once = [True]

    async def published_meanwhile(op: str) -> None:
        if op == "txn" and once:
            once.clear()
            status_here(world)

    world.kv._before = published_meanwhile  # pyright: ignore[reportPrivateUsage] - the fake's place for faults
    await free(world.kv, "h1", ours)
    assert world.etcd.get(keys.machine("web", "m1")) is None
    assert world.status() is None


def test_begin_is_durable_before_anything_happens(world: World) -> None:
    tools = world.tools()
    begin(tools, "r1", Job(operation="create", assignment=assignment(world)))
    (event,) = tools.run_log.events("r1")
    assert isinstance(event, RunEvent)
    assert tools.run_log.open_runs() == ("r1",)
    assert world.driver.specs == {}
