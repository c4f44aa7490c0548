"""The scheduler by table: each reason once, and what is preferred. Its laws: test_scheduler_laws.py."""

from __future__ import annotations

import msgspec
import pytest

from flyd.model import Desired, Guest, Host, Mount, Reservations, Resources, Volume
from flyd.placement.index import Snapshot
from flyd.placement.scheduler import (
    ADDRESSES_PER_HOST,
    Placement,
    Refusal,
    Request,
    address,
    free_address,
    schedule,
)
from tests.support.placing import make_host, make_machine

AMS, IAD, SIN = make_host("ams-1"), make_host("iad-1"), make_host("sin-1")
EVERYBODY = ("ams-1", "iad-1", "sin-1")
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


def only(host: Host, *volumes: Volume, promised: Resources | None = None) -> Snapshot:
    held = {"x": promised} if promised else {}
    return Snapshot(
        hosts=(host,),
        alive=(host.name,),
        volumes=volumes,
        reservations={host.name: Reservations(host=host.name, machines=held)},
    )


def everywhere(*volumes: Volume, alive: tuple[str, ...] = EVERYBODY) -> Snapshot:
    return Snapshot(hosts=(AMS, IAD, SIN), alive=alive, volumes=volumes)


@pytest.mark.parametrize(
    ("request_", "snapshot", "reason"),
    [
        (msgspec.structs.replace(NEW, region="ams"), only(IAD), "wrong region iad (ams wanted)"),
        (msgspec.structs.replace(NEW, host="ams-2"), only(AMS), "not the host that was asked for (ams-2)"),
        (NEW, only(make_host("ams-1", cordoned=True)), "cordoned"),
        (
            msgspec.structs.replace(NEW, labels={"disk": "nvme"}),
            only(AMS),
            "its label disk is not set (nvme wanted)",
        ),
        (
            msgspec.structs.replace(NEW, labels={"disk": "nvme"}),
            only(msgspec.structs.replace(AMS, labels={"disk": "hdd"})),
            "its label disk is hdd (nvme wanted)",
        ),
        (
            msgspec.structs.replace(NEW, guest=Guest(memory_mb=512)),
            only(AMS, promised=Resources(memory_mb=1920)),
            "needs 512 MB memory, 128 MB free of 2048",
        ),
        (msgspec.structs.replace(NEW, guest=Guest(cpus=4)), only(AMS), "needs 4 CPUs, it has 2"),
        (
            msgspec.structs.replace(NEW, guest=Guest(cpus=2, cpu_kind="performance")),
            only(AMS, promised=Resources(cpus=1)),
            "needs 2 dedicated CPUs, 1 free of 2",
        ),
        (
            msgspec.structs.replace(NEW, mounts=(Mount(path="/d", name="data", size_gb=11),)),
            only(AMS),
            "needs 11 GB disk, 10 GB free of 10",
        ),
        (
            msgspec.structs.replace(NEW, mounts=(Mount(path="/d", volume="vol_1"),)),
            only(IAD, volume(AMS)),
            "volume vol_1 lives on ams-1",
        ),
        (
            msgspec.structs.replace(NEW, mounts=(Mount(path="/d", volume="vol_1"),)),
            only(AMS, volume(AMS, attached="m0")),
            "volume vol_1 is attached to machine m0",
        ),
        (
            msgspec.structs.replace(NEW, mounts=(Mount(path="/d", volume="vol_9"),)),
            only(AMS),
            "volume vol_9 does not exist in app chat",
        ),
        (
            msgspec.structs.replace(NEW, mounts=(Mount(path="/d", name="data"),)),
            only(IAD, volume(AMS)),
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
    outcome = schedule(NEW, everywhere(alive=("sin-1",)))
    assert isinstance(outcome, Placement)
    assert outcome.host == SIN


def test_a_refusal_names_every_host() -> None:
    outcome = schedule(msgspec.structs.replace(NEW, region="fra"), everywhere())
    assert isinstance(outcome, Refusal)
    assert sorted(outcome.reasons) == ["ams-1", "iad-1", "sin-1"]


def test_a_free_volume_is_taken_before_a_new_one_is_made() -> None:
    request = msgspec.structs.replace(NEW, mounts=(Mount(path="/d", name="data"),))
    outcome = schedule(request, everywhere(volume(SIN)))
    assert isinstance(outcome, Placement)
    assert (outcome.host.name, outcome.mounts[0].volume) == ("sin-1", "vol_1")


def test_a_free_volume_of_another_region_is_no_obstacle() -> None:
    request = msgspec.structs.replace(NEW, region="ams", mounts=(Mount(path="/d", name="data"),))
    outcome = schedule(request, everywhere(volume(SIN)))
    assert isinstance(outcome, Placement)
    assert (outcome.host.name, outcome.mounts[0].volume) == ("ams-1", "")


def test_machines_that_are_going_away_do_not_count_for_spread() -> None:
    going = msgspec.structs.replace(make_machine("m0", AMS), desired=Desired.DESTROYED)
    snapshot = everywhere()
    snapshot.put_machine(going)
    outcome = schedule(NEW, snapshot)
    assert isinstance(outcome, Placement)
    assert outcome.host.name == "ams-1"


def test_addresses_stay_in_the_subnet_and_are_unique_until_all_are_taken() -> None:
    assert address("127.11", 0) == "127.11.0.2"
    assert address("127.11", ADDRESSES_PER_HOST - 1) == "127.11.249.251"
    taken = {str(n): n for n in range(ADDRESSES_PER_HOST)}
    assert free_address("m", taken) is None
    del taken["77"]
    assert free_address("m", taken) == 77


def test_a_cordoned_host_full_of_the_group_hides_no_empty_one() -> None:
    cordoned, empty = make_host("ams-1", cordoned=True), make_host("ams-2")
    snapshot = Snapshot(hosts=(cordoned, empty), alive=("ams-1", "ams-2"))
    snapshot.put_machine(make_machine("m0", cordoned))
    outcome = schedule(NEW, snapshot)
    assert isinstance(outcome, Placement)
    assert outcome.host == empty
