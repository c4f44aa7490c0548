"""What becomes of lost hosts' machines: the rules, one by one, and their laws."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
from flyd.placement.loss import (
    AT_ONCE_S,
    MOVES_PER_LOOK,
    Sight,
    Silence,
    ended_for_good,
    plan,
    regions_for,
    track,
)
from tests.support.placing import make_host, make_machine

GRACE_S = 60.0
CONFIG = MachineConfig(image="host:")


def on(host: str, machine_id: str = "m1", **more: object) -> Machine:
    return msgspec.structs.replace(make_machine(machine_id, make_host(host)), **more)


def sight(*machines: Machine, alive: tuple[str, ...] = ("iad-1", "sin-1"), **more: object) -> Sight:
    base = Sight(grace_s=GRACE_S, alive=alive, silent_s={"ams-1": GRACE_S}, machines=machines)
    return msgspec.structs.replace(base, **more)


def status(state: MachineState, last: str) -> MachineStatus:
    events = (MachineEvent(type=last, status=state.value, at_s=1.0),)
    return MachineStatus(
        id="m1", app="chat", host="ams-1", instance_id="i", epoch=1, state=state, events=events
    )


# --------------------------------------------------------------------------- how long it was silent


def test_a_host_is_silent_from_when_its_sign_was_missed_until_it_joins_again():
    hosts = {"a": 5, "b": 6}
    first = track({}, hosts, ("b",), 10.0)
    assert first == {"a": Silence(since_s=10.0, joined_revision=5)}
    assert track(first, hosts, ("b",), 20.0) == first
    assert track(first, {**hosts, "a": 9}, ("b",), 20.0)["a"].since_s == 20.0, "it was back, unseen"
    assert track(first, hosts, ("a", "b"), 20.0) == {}
    assert track(first, {"b": 6}, ("b",), 20.0) == {}, "removed"


# --------------------------------------------------------------------------- the rules


def test_grace_a_host_keeps_its_machines_until_it_ends():
    before = plan(sight(on("ams-1"), silent_s={"ams-1": GRACE_S - 0.5}))
    assert (before.moves, before.next_s) == ((), 0.5)
    after = plan(sight(on("ams-1")))
    assert [move.machine.id for move in after.moves] == ["m1"]
    assert after.next_s is None


STAYS = {
    "volume": (
        on("ams-1", config=MachineConfig(image="x", mounts=(Mount(path="/d", volume="v"),))),
        "volume",
    ),
    "runs once": (
        on("ams-1", config=MachineConfig(image="x", restart=RestartPolicy(policy="no"))),
        "runs once",
    ),
}


@pytest.mark.parametrize("case", sorted(STAYS))
def test_what_stays_is_reported(case: str):
    machine, word = STAYS[case]
    found = plan(sight(machine))
    assert found.moves == ()
    assert word in found.left["ams-1"]["m1"]
    assert plan(sight(machine, silent_s={"ams-1": 1.0})).left == {}, "not before its grace is over"


def test_a_postgres_member_stays_and_is_called_one():
    machine, _ = STAYS["volume"]
    apps = {"chat": App(name="chat", kind=AppKind.POSTGRES)}
    assert "Postgres" in plan(sight(machine, apps=apps)).left["ams-1"]["m1"]


def test_what_is_to_be_destroyed_is_neither_moved_nor_reported():
    found = plan(sight(on("ams-1", desired=Desired.DESTROYED)))
    assert (found.moves, found.left) == ((), {})


@pytest.mark.parametrize(
    ("desired", "state", "last", "at_rest"),
    [
        (Desired.STARTED, MachineState.STARTED, "start", False),
        (Desired.STARTED, MachineState.STOPPED, "exit", True),
        (Desired.STARTED, MachineState.STOPPED, "stop", False),  # asked to start since
        (Desired.STARTED, MachineState.FAILED, "start", False),
        (Desired.STOPPED, MachineState.STARTED, "start", True),
    ],
)
def test_what_rests_goes_on_resting(desired: Desired, state: MachineState, last: str, at_rest: bool):
    found = plan(sight(on("ams-1", desired=desired), statuses={"m1": status(state, last)}))
    assert found.moves[0].at_rest is at_rest


def test_a_machine_that_said_nothing_yet_has_not_ended():
    assert not ended_for_good(None)


@pytest.mark.parametrize(
    ("named", "tried"),
    [
        ((), ("ams", None)),
        (("ams",), ("ams",)),
        (("iad", "ams", "sin"), ("ams", "iad", "sin")),
        (("iad", "sin"), ("ams", "iad", "sin")),
    ],
)
def test_the_regions_of_a_move(named: tuple[str, ...], tried: tuple[str | None, ...]):
    assert regions_for(on("ams-1"), App(name="chat", regions=named)) == tried


def test_most_hosts_lost_at_once_is_the_network():
    lost = {"ams-1": GRACE_S, "iad-1": GRACE_S + 1}
    held = plan(sight(on("ams-1"), alive=("sin-1",), silent_s=lost))
    assert held.moves == ()
    assert "2 of 3 hosts are lost (ams-1, iad-1)" in held.held
    assert plan(sight(on("ams-1"), alive=("sin-1", "x-1"), silent_s=lost)).moves, "half of them is not most"


def test_a_host_lost_just_now_counts_also_before_its_own_grace():
    lost = {"ams-1": GRACE_S, "iad-1": 1.0}
    assert plan(sight(on("ams-1"), alive=("sin-1",), silent_s=lost)).held


def test_a_host_emptied_long_ago_does_not_count():
    lost = {"ams-1": GRACE_S, "iad-1": GRACE_S + AT_ONCE_S}
    assert plan(sight(on("ams-1"), alive=("sin-1",), silent_s=lost)).moves
    still_full = sight(on("ams-1"), on("iad-1", "m2"), alive=("sin-1",), silent_s=lost)
    assert plan(still_full).held


def test_no_storm_and_one_without_room_does_not_hold_up_the_others():
    machines = tuple(on("ams-1", f"m{n:02}") for n in range(3 * MOVES_PER_LOOK))
    first = plan(sight(*machines))
    assert len(first.moves) == MOVES_PER_LOOK
    waiting = {move.machine.id for move in first.moves}
    second = plan(sight(*machines), waiting)
    assert len(second.moves) == MOVES_PER_LOOK
    assert not waiting & {move.machine.id for move in second.moves}


# --------------------------------------------------------------------------- laws

HOSTS = ("a-1", "b-1", "c-1", "d-1")


@st.composite
def sights(draw: st.DrawFn) -> Sight:
    lost = draw(st.lists(st.sampled_from(HOSTS), unique=True))
    machines = tuple(
        on(
            draw(st.sampled_from(HOSTS)),
            f"m{n}",
            desired=draw(st.sampled_from(Desired)),
            config=draw(st.sampled_from([CONFIG, STAYS["volume"][0].config, STAYS["runs once"][0].config])),
        )
        for n in range(draw(st.integers(0, 20)))
    )
    return Sight(
        grace_s=GRACE_S,
        alive=tuple(h for h in HOSTS if h not in lost),
        silent_s={h: draw(st.floats(0, 1000)) for h in lost},
        machines=machines,
    )


@given(sights())
def test_only_machines_without_volumes_on_hosts_past_their_grace_move(seen: Sight):
    for move in plan(seen).moves:
        assert seen.silent_s[move.machine.host] >= GRACE_S
        assert not move.machine.config.mounts
        assert move.machine.desired is not Desired.DESTROYED


@given(sights())
def test_nothing_moves_while_more_hosts_wait_for_it_than_live(seen: Sight):
    movable = [m for m in seen.machines if m.config == CONFIG and m.desired is not Desired.DESTROYED]
    if len({m.host for m in movable if m.host in seen.silent_s}) > len(seen.alive):
        assert plan(seen).moves == ()


@given(sights(), st.randoms())
def test_the_order_of_machines_does_not_matter(seen: Sight, chance: object):
    machines = list(seen.machines)
    chance.shuffle(machines)  # type: ignore[attr-defined]
    assert plan(msgspec.structs.replace(seen, machines=tuple(machines))) == plan(seen)
