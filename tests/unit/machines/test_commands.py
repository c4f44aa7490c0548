"""Commands: compare-and-set under competition and lost answers; waits that end with a reason."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from flyd.errors import Conflict, FlydError, NotFound, OutcomeUnknown, Unavailable
from flyd.machines import commands
from flyd.model import CheckStatus, Desired, Machine, MachineState, MachineStatus, Secrets, decode, encode
from flyd.ports import KV, Delete, Unchanged
from flyd.store import keys
from flyd.store.memory import MemoryKV
from flyd.store.mirror import Mirror
from tests.support.placing import make_host, make_machine

MACHINE = make_machine("m1", make_host("ams-1"))
STARTED = MachineStatus(
    id="m1", app="chat", host="ams-1", instance_id=MACHINE.instance_id, epoch=1, state=MachineState.STARTED
)


async def with_machine(kv: KV, machine: Machine = MACHINE) -> KV:
    await kv.put(keys.machine(machine.app, machine.id), encode(machine))
    return kv


async def stored(kv: KV) -> Machine:
    record = await kv.get(keys.machine("chat", "m1"))
    assert record is not None
    return decode(record.value, Machine)


class LostAnswers(MemoryKV):
    """Every other transaction is done, and its answer lost."""

    txns = 0

    async def _after(self, op: str) -> None:
        if op == "txn":
            self.txns += 1
            if self.txns % 2:
                raise OutcomeUnknown("the answer got lost")


async def test_commands_change_only_what_they_are_about() -> None:
    kv = await with_machine(MemoryKV())
    await asyncio.gather(
        commands.set_desired(kv, "chat", "m1", Desired.STOPPED),
        commands.set_cordoned(kv, "chat", "m1", True),
    )
    assert await stored(kv) == msgspec.structs.replace(MACHINE, desired=Desired.STOPPED, cordoned=True)
    await commands.restart(kv, "chat", "m1")
    assert await stored(kv) == msgspec.structs.replace(MACHINE, cordoned=True, restart_nonce=1)


async def test_a_lost_answer_restarts_once() -> None:
    kv = await with_machine(LostAnswers())
    await commands.restart(kv, "chat", "m1")
    assert (await stored(kv)).restart_nonce == 1


async def test_destroyed_is_final() -> None:
    kv = await with_machine(MemoryKV())
    await commands.set_desired(kv, "chat", "m1", Desired.DESTROYED)
    await commands.set_desired(kv, "chat", "m1", Desired.DESTROYED)
    with pytest.raises(Conflict, match="is being destroyed"):
        await commands.set_desired(kv, "chat", "m1", Desired.STARTED)
    with pytest.raises(NotFound, match="no machine 'm2'"):
        await commands.set_desired(kv, "chat", "m2", Desired.STARTED)


async def test_a_failed_guard_changes_nothing() -> None:
    kv = await with_machine(MemoryKV())
    guard = Unchanged(keys.leader("deployer"), 999)
    with pytest.raises(Conflict):
        await commands.set_desired(kv, "chat", "m1", Desired.DESTROYED, guards=(guard,))
    assert await stored(kv) == MACHINE


async def test_secrets_are_merged_by_all_who_set_them() -> None:
    kv = MemoryKV()
    await asyncio.gather(*(commands.set_secrets(kv, "chat", {f"S{n}": str(n)}) for n in range(5)))
    names = await commands.set_secrets(kv, "chat", {"S0": "new"})
    record = await kv.get(keys.secrets("chat"))
    assert record is not None
    assert names == ("S0", "S1", "S2", "S3", "S4")
    assert decode(record.value, Secrets).values["S0"] == "new"


async def waiting(
    kv: KV, wait: Callable[[Mirror], Awaitable[object]], meanwhile: Callable[[], Awaitable[object]]
) -> object:
    """What the wait gives when, while it waits, something happens."""
    mirror = Mirror(kv, (keys.MACHINES, keys.STATUS))
    async with asyncio.TaskGroup() as group:
        keep = group.create_task(mirror.keep())
        await mirror.wait_synced()
        waiter = group.create_task(_outcome(wait(mirror)))
        await asyncio.sleep(0)
        await meanwhile()
        outcome = await waiter
        keep.cancel()
    return outcome


async def _outcome(work: Awaitable[object]) -> object:
    try:
        return await work
    except FlydError as error:
        return error


async def test_waits_end_when_the_host_says_so() -> None:
    kv = await with_machine(MemoryKV())

    async def say_started() -> None:
        await kv.put(keys.status("chat", "m1"), encode(STARTED))

    async def vanish() -> None:
        await kv.txn((), (Delete(keys.machine("chat", "m1")),))

    assert (
        await waiting(kv, lambda m: commands.wait_state(m, MACHINE, MachineState.STARTED, 5), say_started)
        == STARTED
    )
    assert await waiting(kv, lambda m: commands.wait_healthy(m, MACHINE, 5), say_started) == STARTED
    assert await waiting(kv, lambda m: commands.wait_gone(m, MACHINE, 5), vanish) is None
    lost = await waiting(kv, lambda m: commands.wait_state(m, MACHINE, MachineState.STOPPED, 5), say_started)
    assert isinstance(lost, NotFound)


async def test_a_wait_past_its_deadline_says_what_was_last_known() -> None:
    kv = await with_machine(MemoryKV())
    check = CheckStatus(name="web", status="critical", output="connection refused")
    sick = msgspec.structs.replace(STARTED, checks=(check,), restarts=2)

    async def say_sick() -> None:
        await kv.put(keys.status("chat", "m1"), encode(sick))

    error = await waiting(kv, lambda m: commands.wait_healthy(m, MACHINE, 0.05), say_sick)
    assert isinstance(error, Unavailable)
    assert error.message == (
        "machine m1 of app chat on host ams-1 did not become healthy in 0.05 s; "
        "last known: state started; 2 restarts; check web critical: connection refused"
    )
