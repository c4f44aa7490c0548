"""What a machine's claim says on its new host: whether, and when, it starts there."""

from __future__ import annotations

import msgspec
import pytest

from flyd.model import (
    Desired,
    Machine,
    MachineConfig,
    MachineEvent,
    MachineState,
    MachineStatus,
    RestartPolicy,
    encode,
)
from flyd.placement.loss import MoveOff, Sight, plan
from flyd.placement.moves import move
from flyd.ports import Put
from flyd.store import keys
from flyd.store.memory import MemoryKV
from tests.support.placing import CountedEntropy, FixedClock, join, make_host, make_machine

NEXT_S = 4e9
ONCE = RestartPolicy(policy="no")
RUNS, RESTS, NONE = MachineState.STARTED, MachineState.STOPPED, None
UNTIL_THEN = (Desired.STARTED, NEXT_S)
AT_ONCE = (Desired.STARTED, 0.0)
CASES = [
    ("rests", "daily", RestartPolicy(), RESTS, UNTIL_THEN),
    ("rests, once each time", "daily", ONCE, RESTS, UNTIL_THEN),
    ("its run was lost", "daily", RestartPolicy(), RUNS, AT_ONCE),
    ("its run was lost, once each time", "daily", ONCE, RUNS, UNTIL_THEN),
    ("never began", "daily", ONCE, NONE, AT_ONCE),
    ("rests, no schedule", "", RestartPolicy(), RESTS, (Desired.STOPPED, 0.0)),
    ("runs, no schedule", "", RestartPolicy(), RUNS, AT_ONCE),
]


def said(machine: Machine, state: MachineState) -> MachineStatus:
    last = "exit" if state is RESTS else "start"
    return MachineStatus(
        id=machine.id,
        app=machine.app,
        host=machine.host,
        instance_id=machine.instance_id,
        epoch=machine.epoch,
        state=state,
        events=(MachineEvent(type=last, status=state.value, at_s=1.0),),
        next_start_s=NEXT_S if machine.config.schedule else 0.0,
    )


@pytest.mark.parametrize(
    ("schedule", "policy", "state", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
async def test_a_lost_hosts_machine_starts_elsewhere_when_it_should(
    schedule: str, policy: RestartPolicy, state: MachineState | None, expected: tuple[Desired, float]
) -> None:
    kv = MemoryKV()
    lost = make_host("ams-1")
    await join(kv, lost, make_host("iad-1"))
    config = MachineConfig(image="host:", schedule=schedule, restart=policy)
    machine = msgspec.structs.replace(make_machine("m1", lost), config=config)
    await kv.put(keys.machine(machine.app, "m1"), encode(machine))
    statuses = {"m1": said(machine, state)} if state is not None else {}
    for status in statuses.values():
        kv.server.txn((), (Put(keys.status(machine.app, "m1"), encode(status)),))
    sight = Sight(
        grace_s=1.0,
        alive=("iad-1", "sin-1"),
        silent_s={"ams-1": 9.0},
        machines=(machine,),
        statuses=statuses,
    )
    (wanted,) = plan(sight).moves
    moved = await elsewhere(kv, wanted)
    assert (moved.desired, moved.starts_at_s) == expected


async def elsewhere(kv: MemoryKV, wanted: MoveOff) -> Machine:
    """Its claim after the move, off a host that is not alive any more."""
    await kv.txn(
        (), (Put(keys.host("ams-1"), encode(msgspec.structs.replace(make_host("ams-1"), cordoned=True))),)
    )
    moved = await move(kv, wanted, "lost", clock=FixedClock(), entropy=CountedEntropy(), guards=())
    assert moved is not None
    assert moved.host == "iad-1"
    return moved
