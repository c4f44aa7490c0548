"""The scheduler by table (each reason once) and by law."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyd.model import Desired, Guest, Host, Machine, Mount, Reservations, Resources, Volume
from flyd.placement.scheduler import (
    ADDRESSES_PER_HOST,
    Placement,
    Refusal,
    Request,
    Snapshot,
    address,
    free_address,
    free_capacity,
    reserved,
    schedule,
)
from tests.support.placing import make_host, make_machine

AMS, IAD, SIN = make_host("ams-1"), make_host("iad-1"), make_host("sin-1")
ALL = Snapshot(hosts=(AMS, IAD, SIN), alive=("ams-1", "iad-1", "sin-1"))
NEW = Request(app="chat", machine_id="m1")
LOST = "lost: it no longer renews its lease"


def volume(host: Host, volume_id: str = "vol_1", attached: str = "") -> Volume:
    return Volume(
        id=volume_id,
        name="data",
        app="chat",
        region=host.region,
        host=host.name,
        size_gb=1,
        attached_machine=attached,
    )


def only(host: Host) -> Snapshot:
    return Snapshot(hosts=(host,), alive=(host.name,))


@pytest.mark.parametrize(
    ("request_", "snapshot", "reason"),
    [
        (msgspec.structs.replace(NEW, region="ams"), only(IAD), "wrong region iad (ams wanted)"),
        (msgspec.structs.replace(NEW, host="ams-2"), only(AMS), "not the host that was asked for (ams-2)"),
        (NEW, only(make_host("ams-1", cordoned=True)), "cordoned"),
        (
            msgspec.structs.replace(NEW, guest=Guest(memory_mb=512)),
            msgspec.structs.replace(
                only(AMS),
                reservations={"ams-1": Reservations(host="ams-1", machines={"x": Resources(memory_mb=1920)})},
            ),
            "needs 512 MB memory, 128 MB free of 2048",
        ),
        (msgspec.structs.replace(NEW, guest=Guest(cpus=4)), only(AMS), "needs 4 CPUs, it has 2"),
        (
            msgspec.structs.replace(NEW, guest=Guest(cpus=2, cpu_kind="performance")),
            msgspec.structs.replace(
                only(AMS),
                reservations={"ams-1": Reservations(host="ams-1", machines={"x": Resources(cpus=1)})},
            ),
            "needs 2 dedicated CPUs, 1 free of 2",
        ),
        (
            msgspec.structs.replace(NEW, mounts=(Mount(path="/d", name="data", size_gb=11),)),
            only(AMS),
            "needs 11 GB disk, 10 GB free of 10",
        ),
        (
            msgspec.structs.replace(NEW, mounts=(Mount(path="/d", volume="vol_1"),)),
            msgspec.structs.replace(only(IAD), volumes=(volume(AMS),)),
            "volume vol_1 lives on ams-1",
        ),
        (
            msgspec.structs.replace(NEW, mounts=(Mount(path="/d", volume="vol_1"),)),
            msgspec.structs.replace(only(AMS), volumes=(volume(AMS, attached="m0"),)),
            "volume vol_1 is attached to machine m0",
        ),
        (
            msgspec.structs.replace(NEW, mounts=(Mount(path="/d", volume="vol_9"),)),
            only(AMS),
            "volume vol_9 does not exist in app chat",
        ),
        (
            msgspec.structs.replace(NEW, mounts=(Mount(path="/d", name="data"),)),
            msgspec.structs.replace(only(IAD), volumes=(volume(AMS),)),
            "a free volume data exists and lives elsewhere (vol_1 on ams-1)",
        ),
    ],
)
def test_each_filter_says_why(request_: Request, snapshot: Snapshot, reason: str) -> None:
    (host,) = snapshot.hosts
    assert schedule(request_, snapshot) == Refusal(reasons={host.name: reason})


@pytest.mark.parametrize(
    ("request_", "host", "reason", "lost"),
    [
        (NEW, AMS, LOST, ("ams-1",)),
        (NEW, make_host("ams-1", cordoned=True), LOST, ()),
        (NEW, make_host("ams-1", memory_mb=100), LOST, ()),
        (msgspec.structs.replace(NEW, mounts=(Mount(path="/d", volume="vol_9"),)), AMS, LOST, ()),
        (msgspec.structs.replace(NEW, region="iad"), AMS, "wrong region ams (iad wanted)", ()),
        (msgspec.structs.replace(NEW, host="ams-2"), AMS, "not the host that was asked for (ams-2)", ()),
    ],
    ids=["would take it", "cordoned", "full", "no such volume", "region", "host"],
)
def test_a_lost_host_counts_as_one_to_wait_for_only_if_it_would_take_it(
    request_: Request, host: Host, reason: str, lost: tuple[str, ...]
) -> None:
    outcome = schedule(request_, Snapshot(hosts=(host,)))
    assert outcome == Refusal(reasons={host.name: reason}, lost=lost)


def test_a_living_host_is_taken_before_a_lost_one_is_waited_for() -> None:
    outcome = schedule(NEW, msgspec.structs.replace(ALL, alive=("sin-1",)))
    assert isinstance(outcome, Placement)
    assert outcome.host == SIN


def test_a_refusal_names_every_host() -> None:
    outcome = schedule(msgspec.structs.replace(NEW, region="fra"), ALL)
    assert isinstance(outcome, Refusal)
    assert sorted(outcome.reasons) == ["ams-1", "iad-1", "sin-1"]


def test_a_free_volume_is_taken_before_a_new_one_is_made() -> None:
    request = msgspec.structs.replace(NEW, mounts=(Mount(path="/d", name="data"),))
    outcome = schedule(request, msgspec.structs.replace(ALL, volumes=(volume(SIN),)))
    assert isinstance(outcome, Placement)
    assert (outcome.host.name, outcome.mounts[0].volume) == ("sin-1", "vol_1")


def test_a_free_volume_of_another_region_is_no_obstacle() -> None:
    request = msgspec.structs.replace(NEW, region="ams", mounts=(Mount(path="/d", name="data"),))
    outcome = schedule(request, msgspec.structs.replace(ALL, volumes=(volume(SIN),)))
    assert isinstance(outcome, Placement)
    assert (outcome.host.name, outcome.mounts[0].volume) == ("ams-1", "")


def test_machines_that_are_going_away_do_not_count_for_spread() -> None:
    going = msgspec.structs.replace(make_machine("m0", AMS), desired=Desired.DESTROYED)
    outcome = schedule(NEW, msgspec.structs.replace(ALL, machines=(going,)))
    assert isinstance(outcome, Placement)
    assert outcome.host.name == "ams-1"


def test_addresses_stay_in_the_subnet_and_are_unique_until_all_are_taken() -> None:
    assert address("127.11", 0) == "127.11.0.2"
    assert address("127.11", ADDRESSES_PER_HOST - 1) == "127.11.249.251"
    taken = {str(n): n for n in range(ADDRESSES_PER_HOST)}
    assert free_address("m", taken) is None
    del taken["77"]
    assert free_address("m", taken) == 77


# --------------------------------------------------------------------------- laws

GUESTS = st.builds(
    Guest,
    cpus=st.integers(1, 3),
    memory_mb=st.sampled_from((128, 256, 512, 1024)),
    cpu_kind=st.sampled_from(("shared", "performance")),
)


@st.composite
def clusters(draw: st.DrawFn) -> Snapshot:
    names = draw(
        st.lists(
            st.sampled_from([f"{r}-{n}" for r in ("ams", "iad", "sin") for n in (1, 2, 3)]),
            unique=True,
            min_size=1,
        )
    )
    hosts = tuple(
        make_host(
            name,
            memory_mb=draw(st.integers(0, 2048)),
            cpus=draw(st.integers(1, 4)),
            cordoned=draw(st.integers(0, 9)) == 0,
        )
        for name in names
    )
    lost = draw(st.lists(st.sampled_from(names), max_size=1))
    return Snapshot(hosts=hosts, alive=tuple(n for n in names if n not in lost))


def fill(snapshot: Snapshot, guests: list[Guest]) -> tuple[Snapshot, list[Placement]]:
    """Place one machine after the other, as the placer would commit them."""
    placements: list[Placement] = []
    for index, guest in enumerate(guests):
        request = Request(app="chat", machine_id=f"m{index}", guest=guest)
        outcome = schedule(request, snapshot)
        if isinstance(outcome, Refusal):
            continue
        placements.append(outcome)
        snapshot = with_machine(snapshot, make_machine(f"m{index}", outcome.host), guest, outcome)
    return snapshot, placements


def with_machine(snapshot: Snapshot, machine: Machine, guest: Guest, placement: Placement) -> Snapshot:
    held = snapshot.reservations.get(machine.host) or Reservations(host=machine.host)
    updated = Reservations(
        host=machine.host,
        machines={**held.machines, machine.id: reserved(guest)},
        addresses={**held.addresses, machine.id: placement.address_number},
    )
    return msgspec.structs.replace(
        snapshot,
        machines=(*snapshot.machines, machine),
        reservations={**snapshot.reservations, machine.host: updated},
    )


@settings(max_examples=100, deadline=None)
@given(clusters(), st.lists(GUESTS, max_size=20))
def test_law_capacity_is_never_exceeded_and_addresses_differ(snapshot: Snapshot, guests: list[Guest]) -> None:
    filled, placements = fill(snapshot, guests)
    for host in filled.hosts:
        held = filled.reservations.get(host.name)
        free = free_capacity(host, held)
        assert min(free.memory_mb, free.cpus) >= 0
        numbers = list(held.addresses.values()) if held else []
        assert len(numbers) == len(frozenset(numbers))
    assert all(p.host.name in snapshot.alive and not p.host.cordoned for p in placements)


@settings(max_examples=100, deadline=None)
@given(clusters(), st.lists(GUESTS, max_size=8), GUESTS)
def test_law_the_order_of_the_snapshot_does_not_matter(
    snapshot: Snapshot, guests: list[Guest], guest: Guest
) -> None:
    filled, _ = fill(snapshot, guests)
    request = Request(app="chat", machine_id="new", guest=guest)
    shuffled = msgspec.structs.replace(
        filled,
        hosts=tuple(reversed(filled.hosts)),
        alive=tuple(reversed(filled.alive)),
        machines=tuple(reversed(filled.machines)),
        reservations=dict(reversed(filled.reservations.items())),
    )
    assert schedule(request, filled) == schedule(request, filled) == schedule(request, shuffled)


@settings(max_examples=100, deadline=None)
@given(clusters(), st.lists(GUESTS, max_size=8), GUESTS)
def test_law_one_more_empty_host_never_hurts(snapshot: Snapshot, guests: list[Guest], guest: Guest) -> None:
    filled, _ = fill(snapshot, guests)
    request = Request(app="chat", machine_id="new", guest=guest)
    more = msgspec.structs.replace(
        filled, hosts=(*filled.hosts, make_host("new-1")), alive=(*filled.alive, "new-1")
    )
    if isinstance(schedule(request, filled), Placement):
        assert isinstance(schedule(request, more), Placement)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(0, 20))
def test_law_with_room_everywhere_hosts_differ_by_at_most_one(hosts: int, machines: int) -> None:
    names = tuple(f"ams-{n}" for n in range(hosts))
    snapshot = Snapshot(hosts=tuple(make_host(n, memory_mb=100_000) for n in names), alive=names)
    _, placements = fill(snapshot, [Guest()] * machines)
    counts = [sum(1 for p in placements if p.host.name == name) for name in names]
    assert len(placements) == machines
    assert max(counts) - min(counts) <= 1
    assert [p.host.name for p in placements[:hosts]] == sorted(names)[: min(hosts, machines)]
