"""What a drain does next: each step by itself, and that no order of them costs a group a machine."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyd.machines.leases import MachineLease
from flyd.model import (
    App,
    AppKind,
    Desired,
    Machine,
    MachineConfig,
    MachineEvent,
    MachineState,
    MachineStatus,
    Mount,
    RestartPolicy,
)
from flyd.model.cluster import Drain, DrainState
from flyd.placement.drain import (
    AT_REST_FOR_S,
    HEALTHY_WITHIN_S,
    LEASE_WAIT_S,
    OUT_OF_ROUTING_S,
    Act,
    Halt,
    KeepOut,
    Place,
    Retire,
    Scene,
    Shift,
    TakeBack,
    TakeOut,
    noted,
    outlook,
    replacement_id,
    settled,
)
from tests.support.placing import make_host, make_machine

DRAIN = Drain(id="d1", host="ams-1", begun_at_s=0.0)
LONG_S = 60.0
VOLUME = MachineConfig(image="x", mounts=(Mount(path="/d", volume="v"),))
ONCE = MachineConfig(image="x", restart=RestartPolicy(policy="no"))


def on(host: str, machine_id: str, **more: object) -> Machine:
    return msgspec.structs.replace(make_machine(machine_id, make_host(host)), **more)


def says(machine: Machine, state: MachineState = MachineState.STARTED, last: str = "start") -> MachineStatus:
    return MachineStatus(
        id=machine.id,
        app=machine.app,
        host=machine.host,
        instance_id=machine.instance_id,
        epoch=1,
        state=state,
        events=(MachineEvent(type=last, status=state.value, at_s=1.0),),
    )


def scene(*machines: Machine, drain: Drain = DRAIN, **more: Any) -> Scene:
    base = Scene(
        drain=drain,
        machines={m.id: m for m in machines},
        statuses={m.id: says(m) for m in machines},
        waited_s={m.id: LONG_S for m in machines},
    )
    return msgspec.structs.replace(base, **more)


def held(machine_id: str) -> MachineLease:
    return MachineLease(machine=machine_id, nonce="n", owner="ann", ttl_s=60, lease=1, expires_at_s=3661.0)


def act_of(seen: Scene) -> Any:
    """What the only step does; None: it waits."""
    steps = outlook(seen).steps
    assert len(steps) == 1, steps
    return steps[0].act


M1 = on("ams-1", "m1")
NEW = on("iad-1", replacement_id(DRAIN, M1))
BEGUN = msgspec.structs.replace(DRAIN, replacing={"m1": NEW.id})
OUT = msgspec.structs.replace(BEGUN, taken_out=("m1",))


def test_one_step_after_the_other():
    place = act_of(scene(M1))
    assert isinstance(place, Place)
    assert [order.region for order in place.orders] == ["ams", None]
    assert noted(DRAIN, place) == BEGUN
    take_out = act_of(scene(M1, NEW, drain=BEGUN))
    assert take_out == TakeOut(machine=M1)
    assert noted(BEGUN, take_out) == OUT
    retire = act_of(scene(M1, NEW, drain=OUT))
    assert retire == Retire(machine=M1)
    going = on("ams-1", "m1", desired=Desired.DESTROYED)
    assert act_of(scene(going, NEW, drain=noted(OUT, retire))) is None
    assert outlook(scene(NEW, drain=settled(noted(OUT, retire), {NEW.id: NEW}))).steps == ()


def test_an_old_machine_stays_until_its_replacement_is_well():
    ill = {M1.id: says(M1), NEW.id: says(NEW, MachineState.STARTING)}
    assert act_of(scene(M1, NEW, drain=BEGUN, statuses=ill)) is None
    late = scene(M1, NEW, drain=BEGUN, statuses=ill, waited_s={"m1": HEALTHY_WITHIN_S})
    assert act_of(late) == TakeBack(old_id="m1", old=None, machine=NEW)


def test_edges_get_time_to_leave():
    assert act_of(scene(M1, NEW, drain=OUT, waited_s={"m1": OUT_OF_ROUTING_S - 0.1})) is None


def test_a_machine_that_a_user_keeps_out_of_routing_stays_out():
    kept_out = on("ams-1", "m1", cordoned=True)
    assert act_of(scene(kept_out, NEW, drain=BEGUN)) == KeepOut(machine=NEW)
    out_too = msgspec.structs.replace(NEW, cordoned=True)
    assert act_of(scene(kept_out, out_too, drain=BEGUN)) == TakeOut(machine=kept_out)


@pytest.mark.parametrize("machine", [on("ams-1", "m1", config=VOLUME), on("ams-1", "m1", config=ONCE)])
def test_what_can_not_move_is_named_and_only_stopped_by_force(machine: Machine):
    seen = outlook(scene(machine))
    assert (seen.steps, list(seen.left)) == ((), ["m1"])
    forced = msgspec.structs.replace(DRAIN, force=True)
    assert act_of(scene(machine, drain=forced)) == Halt(machine=machine)


def test_a_postgres_member_is_called_one():
    apps = {"chat": App(name="chat", kind=AppKind.POSTGRES)}
    assert "Postgres" in outlook(scene(on("ams-1", "m1", config=VOLUME), apps=apps)).left["m1"]


RESTING = on("ams-1", "m1", desired=Desired.STOPPED)


@pytest.mark.parametrize(
    ("machine", "status", "waited_s", "moves"),
    [
        (RESTING, says(RESTING, MachineState.STOPPED, "stop"), LONG_S, True),
        (RESTING, says(RESTING, MachineState.STOPPED, "stop"), AT_REST_FOR_S - 1, False),
        (RESTING, says(RESTING, MachineState.STOPPING, "start"), LONG_S, False),
        (RESTING, None, LONG_S, False),
        (M1, says(M1, MachineState.STOPPED, "exit"), LONG_S, True),
        (on("ams-1", "m1", config=ONCE), says(M1, MachineState.STOPPED, "exit"), LONG_S, True),
    ],
)
def test_a_machine_at_rest_is_given_away_once_that_is_sure(
    machine: Machine, status: MachineStatus | None, waited_s: float, moves: bool
):
    statuses = {} if status is None else {"m1": status}
    act = act_of(scene(machine, statuses=statuses, waited_s={"m1": waited_s}))
    assert isinstance(act, Shift) is moves
    if isinstance(act, Shift):
        assert act.move.at_rest


def test_groups_go_side_by_side_and_each_one_machine_at_a_time():
    worker = make_machine("w1", make_host("ams-1"), group="worker")
    steps = outlook(scene(M1, on("ams-1", "m2"), worker)).steps
    assert [s.act.old.id for s in steps if isinstance(s.act, Place)] == ["m1", "w1"]
    second = msgspec.structs.replace(DRAIN, replacing={"m2": "x"})
    assert [s.act.old.id for s in outlook(scene(M1, on("ams-1", "m2"), drain=second)).steps] == ["m2"]  # pyright: ignore


def test_an_app_that_is_being_deployed_is_left_alone():
    assert act_of(scene(M1, deploying=("chat",))) is None


def test_a_cancelled_drain_takes_back_and_puts_back():
    cancelled = msgspec.structs.replace(OUT, state=DrainState.CANCELLED)
    assert act_of(scene(M1, NEW, drain=cancelled)) == TakeBack(old_id="m1", old=M1, machine=NEW)
    last = act_of(scene(M1, drain=cancelled))
    assert last == TakeBack(old_id="m1", old=M1, machine=None)
    assert outlook(scene(M1, drain=noted(cancelled, last))).steps == ()


def test_a_replacement_is_taken_back_when_its_machine_went_another_way():
    elsewhere = on("sin-1", "m1")
    assert act_of(scene(elsewhere, NEW, drain=BEGUN)) == TakeBack(old_id="m1", old=None, machine=NEW)
    assert act_of(scene(NEW, drain=BEGUN)) == TakeBack(old_id="m1", old=None, machine=NEW), (
        "destroyed by hand"
    )


# --------------------------------------------------------------------------- the whole of it


class Cluster:
    """Acts have their effects, in any order and as often as they are asked for."""

    def __init__(self, machines: list[Machine]) -> None:
        self.machines = {m.id: m for m in machines}
        self.healthy = {m.id: m.desired is Desired.STARTED for m in machines}
        self.drain = DRAIN

    def scene(self) -> Scene:
        statuses = {
            m.id: says(m)
            if self.healthy[m.id]
            else says(m, MachineState.STOPPED if m.desired is Desired.STOPPED else MachineState.STARTING)
            for m in self.machines.values()
        }
        self.drain = settled(self.drain, self.machines)
        return scene(*self.machines.values(), drain=self.drain, statuses=statuses)

    def do(self, act: Act) -> None:
        self.drain = noted(self.drain, act)
        match act:
            case Place(old=old, orders=orders):
                new = on("iad-1", orders[0].machine_id, config=old.config)
                self.machines[new.id] = new
                self.healthy[new.id] = False
            case TakeOut(machine=machine) | KeepOut(machine=machine):
                self.change(machine, cordoned=True)
            case Retire(machine=machine):
                self.change(machine, desired=Desired.DESTROYED)
            case Shift(move=move):
                self.change(move.machine, host="iad-1")
            case Halt(machine=machine):
                self.change(machine, desired=Desired.STOPPED)
            case TakeBack(machine=machine):
                if machine is not None:
                    self.change(machine, desired=Desired.DESTROYED)

    def change(self, machine: Machine, **how: object) -> None:
        self.machines[machine.id] = msgspec.structs.replace(self.machines[machine.id], **how)

    def serving(self, group: str) -> int:
        return sum(
            m.desired is Desired.STARTED and not m.cordoned and self.healthy[m.id]
            for m in self.machines.values()
            if m.config.process_group == group
        )


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["app", "worker"]), st.booleans()), max_size=6), st.data())
def test_a_drain_ends_and_no_group_ever_serves_with_fewer(kinds: list[tuple[str, bool]], data: st.DataObject):
    machines = [
        msgspec.structs.replace(
            make_machine(f"m{n}", make_host("ams-1"), group=group),
            desired=Desired.STARTED if runs else Desired.STOPPED,
        )
        for n, (group, runs) in enumerate(kinds)
    ]
    cluster = Cluster(machines)
    least = {group: cluster.serving(group) for group in ("app", "worker")}
    for turn in range(200):
        fair = turn % 4 == 0  # whatever is drawn: everything happens in the end
        acts = [step.act for step in outlook(cluster.scene()).steps if step.act is not None]
        waits = [m for m in cluster.machines.values() if not cluster.healthy[m.id] and m.host == "iad-1"]
        going = [m for m in cluster.machines.values() if m.desired is Desired.DESTROYED]
        if acts and (fair or data.draw(st.booleans())):
            cluster.do(data.draw(st.sampled_from(acts)))
        for machine in waits:
            well = fair or data.draw(st.booleans())
            cluster.healthy[machine.id] = machine.desired is Desired.STARTED and well
        for machine in going:
            del cluster.machines[machine.id]
        assert all(cluster.serving(group) >= count for group, count in least.items())
        if not outlook(cluster.scene()).steps:
            break
    else:
        pytest.fail(f"not drained: {outlook(cluster.scene())}")
    assert all(machine.host != "ams-1" for machine in cluster.machines.values())
    assert len(cluster.machines) == len(machines)


def test_a_machine_that_somebody_holds_is_waited_for_the_others_first() -> None:
    one, two = on("ams-1", "m1"), on("ams-1", "m2")
    (step,) = outlook(scene(one, two, leases={"m1": held("m1")})).steps
    assert isinstance(step.act, Place)
    assert step.act.old == two
    seen = scene(one, leases={"m1": held("m1")})
    assert outlook(seen).left == {}
    assert [(s.act, s.doing) for s in outlook(seen).steps] == [
        (None, "chat: waiting: machine m1 is leased by ann")
    ]
    late = outlook(msgspec.structs.replace(seen, waited_s={"m1": LEASE_WAIT_S}))
    assert late.steps == ()
    assert late.left == {"m1": "chat: machine m1 is leased by ann until 01:01:01 UTC"}


@pytest.mark.parametrize("taken_out", [(), ("m1",)])
def test_a_replacement_waits_with_its_old_machine_for_the_lease(taken_out: tuple[str, ...]) -> None:
    old, new = on("ams-1", "m1"), on("iad-1", "n1")
    begun = msgspec.structs.replace(DRAIN, replacing={"m1": "n1"}, taken_out=taken_out)
    assert act_of(scene(old, new, drain=begun)) is not None
    seen = scene(old, new, drain=begun, leases={"m1": held("m1")}, waited_s={"m1": LEASE_WAIT_S})
    assert act_of(seen) is None
    assert outlook(seen).left == {}
