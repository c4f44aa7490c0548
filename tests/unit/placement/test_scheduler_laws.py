"""Laws of the scheduler, on drawn clusters: what holds whatever the hosts, machines and volumes are."""

from __future__ import annotations

from collections import Counter

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from flyd.model import Guest, Host, Machine, MachineConfig, Mount, Reservations, Resources, Volume
from flyd.placement.index import Snapshot, free_capacity
from flyd.placement.scheduler import Placement, Refusal, Request, fit, rank, reserved, schedule, spread_of
from tests.support.placing import make_host, make_machine

LAW = settings(max_examples=150, deadline=None)
REGIONS = ("ams", "iad", "sin")
NAMES = [f"{region}-{number}" for region in REGIONS for number in (1, 2, 3)]
EMPTY = Resources(cpus=64, memory_mb=1 << 20, disk_gb=1 << 10)

GUESTS = st.builds(
    Guest,
    cpus=st.integers(1, 3),
    memory_mb=st.sampled_from((128, 256, 512, 1024)),
    cpu_kind=st.sampled_from(("shared", "performance")),
)
NO_LABELS: dict[str, str] = {}
LABELS = st.dictionaries(st.sampled_from(("disk", "zone")), st.sampled_from(("a", "b")), max_size=2)
MOUNTS = st.sampled_from(
    (
        (),
        (),
        (Mount(path="/data", name="data", size_gb=2),),
        (Mount(path="/data", name="data"), Mount(path="/more", name="more", size_gb=3)),
        (Mount(path="/data", volume="vol_0"),),
    )
)
REQUESTS = st.builds(
    Request,
    app=st.sampled_from(("chat", "shop")),
    machine_id=st.just("new"),
    guest=GUESTS,
    region=st.sampled_from((None, None, None, *REGIONS)),
    host=st.sampled_from((None, None, None, None, None, None, *NAMES[:3])),
    mounts=MOUNTS,
    labels=st.one_of(st.just(NO_LABELS), LABELS),
    spread_group=st.sampled_from(("app", "worker")),
)


@st.composite
def hosts(draw: st.DrawFn) -> list[Host]:
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, min_size=1))
    return [
        msgspec.structs.replace(
            make_host(
                name,
                memory_mb=draw(st.integers(0, 2048)),
                cpus=draw(st.integers(1, 4)),
                cordoned=draw(st.integers(0, 9)) == 0,
            ),
            labels=draw(LABELS),
        )
        for name in names
    ]


@st.composite
def clusters(draw: st.DrawFn) -> Snapshot:
    """Hosts, some lost, with volumes and with machines that the scheduler itself has placed."""
    found = draw(hosts())
    lost = draw(st.lists(st.sampled_from([h.name for h in found]), max_size=1))
    volumes = [
        Volume(id=f"vol_{n}", name="data", app="chat", region=host.region, host=host.name, size_gb=1)
        for n, host in enumerate(draw(st.lists(st.sampled_from(found), max_size=2)))
    ]
    snapshot = Snapshot(hosts=found, volumes=volumes, alive=[h.name for h in found if h.name not in lost])
    place_all(snapshot, draw(st.lists(REQUESTS, max_size=12)))
    for host in draw(st.lists(st.sampled_from(found), max_size=2)):  # now that it has machines
        snapshot.put_host(msgspec.structs.replace(host, cordoned=draw(st.booleans())))
    return snapshot


def place_all(snapshot: Snapshot, requests: list[Request]) -> list[Placement]:
    """One after the other, each as the placer would commit it; what is refused is left out."""
    placements: list[Placement] = []
    for number, request in enumerate(requests):
        named = msgspec.structs.replace(request, machine_id=f"m{number}")
        outcome = schedule(named, snapshot)
        if isinstance(outcome, Placement):
            commit(snapshot, named, outcome)
            placements.append(outcome)
    return placements


def commit(snapshot: Snapshot, request: Request, placement: Placement) -> Machine:
    assert request.guest is not None
    host, machine_id = placement.host, request.machine_id
    held = snapshot.reservations.get(host.name) or Reservations(host=host.name)
    disks = {m.volume or f"{machine_id}-{m.path}": m.size_gb for m in placement.mounts}
    config = MachineConfig(image="host:", process_group=request.spread_group, guest=request.guest)
    machine = msgspec.structs.replace(make_machine(machine_id, host, app=request.app), config=config)
    snapshot.put_machine(machine)
    snapshot.put_reservations(
        Reservations(
            host=host.name,
            machines={**held.machines, machine_id: reserved(request.guest)},
            volumes_gb={**held.volumes_gb, **disks},
            addresses={**held.addresses, machine_id: placement.address_number},
        )
    )
    for mount in placement.mounts:
        volume_id = mount.volume or f"{machine_id}-{mount.path}"
        volume = Volume(
            id=volume_id,
            name=mount.name or "data",
            app=request.app,
            region=host.region,
            host=host.name,
            size_gb=mount.size_gb,
            attached_machine=machine_id,
        )
        snapshot.put_volume(volume)
    return machine


def rebuilt(snapshot: Snapshot, *more: Host) -> Snapshot:
    """The same cluster, read in the opposite order, and more living hosts."""
    return Snapshot(
        machines=reversed(list(snapshot.machines)),
        volumes=reversed(list(snapshot.volumes)),
        reservations=dict(reversed(list(snapshot.reservations.items()))),
        alive=[*reversed(list(snapshot.alive)), *(host.name for host in more)],
        hosts=[*reversed(list(snapshot.hosts)), *more],
    )


def plainly(request: Request, snapshot: Snapshot) -> Placement | None:
    """The rule without any index: of all hosts that pass the filters, the one of the lowest rank."""
    spread = spread_of(request, snapshot)
    tried = [(rank(request, spread, snapshot, h), fit(request, snapshot, h)) for h in snapshot.hosts]
    fitting = [(ranked, outcome) for ranked, outcome in tried if isinstance(outcome, Placement)]
    return min(fitting, key=lambda entry: entry[0])[1] if fitting else None


@LAW
@given(clusters(), REQUESTS)
def test_the_index_finds_what_looking_at_every_host_would(snapshot: Snapshot, request: Request) -> None:
    outcome = schedule(request, snapshot)
    expected = plainly(request, snapshot)
    assert (outcome if isinstance(outcome, Placement) else None) == expected


@LAW
@given(clusters())
def test_capacity_is_never_exceeded_and_addresses_differ(snapshot: Snapshot) -> None:
    for host in snapshot.hosts:
        held = snapshot.reservations.get(host.name)
        free = free_capacity(host, held)
        assert free == snapshot.free[host.name]
        assert min(free.memory_mb, free.cpus, free.disk_gb) >= 0
        numbers = list(held.addresses.values()) if held else []
        assert len(numbers) == len(frozenset(numbers))


@LAW
@given(clusters(), REQUESTS)
def test_what_was_asked_for_is_kept(snapshot: Snapshot, request: Request) -> None:
    """Region, host, labels and volumes; never a lost or cordoned host."""
    outcome = schedule(request, snapshot)
    if isinstance(outcome, Refusal):
        return
    host = outcome.host
    assert host.name in snapshot.alive
    assert not host.cordoned
    assert request.region in (None, host.region)
    assert request.host in (None, host.name)
    assert request.labels.items() <= host.labels.items()
    assert [m.path for m in outcome.mounts] == [m.path for m in request.mounts]
    for asked, mount in zip(request.mounts, outcome.mounts, strict=True):
        taken = snapshot.volume(request.app, mount.volume)
        if mount.volume:
            assert taken is not None
            assert (taken.host, taken.attached_machine) == (host.name, "")
            assert asked.volume in ("", mount.volume)
        else:  # a new one: then none of that name is free where it could be used
            free = [v for v in snapshot.volumes_of(request.app) if not v.attached_machine]
            used = [m.volume for m in outcome.mounts]
            usable = [v for v in free if v.name == asked.name and request.region in (None, v.region)]
            assert not [v for v in usable if v.id not in used]


@LAW
@given(clusters(), REQUESTS)
def test_the_same_input_gives_the_same_output(snapshot: Snapshot, request: Request) -> None:
    """Also if the records came in another order."""
    outcome = schedule(request, snapshot)
    assert schedule(request, snapshot) == outcome
    assert schedule(request, rebuilt(snapshot)) == outcome


@LAW
@given(clusters(), REQUESTS)
def test_one_more_empty_host_never_hurts(snapshot: Snapshot, request: Request) -> None:
    empty = msgspec.structs.replace(make_host("new-1"), capacity=EMPTY)
    if isinstance(schedule(request, snapshot), Placement):
        assert isinstance(schedule(request, rebuilt(snapshot, empty)), Placement)


@LAW
@given(clusters(), REQUESTS)
def test_a_refusal_gives_every_host_a_reason_of_its_own(snapshot: Snapshot, request: Request) -> None:
    outcome = schedule(request, snapshot)
    if isinstance(outcome, Refusal):
        assert sorted(outcome.reasons) == sorted(host.name for host in snapshot.hosts)
        assert all(outcome.reasons.values())
        assert frozenset(outcome.lost) <= frozenset(outcome.reasons)


@LAW
@given(clusters(), REQUESTS)
def test_a_lost_host_is_named_exactly_if_its_return_would_help(snapshot: Snapshot, request: Request) -> None:
    outcome = schedule(request, snapshot)
    if isinstance(outcome, Placement):
        return
    for host in snapshot.hosts:
        if host.name not in snapshot.alive:
            back = rebuilt(snapshot)
            back.set_alive(host.name, True)
            assert (host.name in outcome.lost) == isinstance(schedule(request, back), Placement)


@LAW
@given(
    st.one_of(
        st.lists(st.integers(1, 4), min_size=1, max_size=4),
        st.integers(1, 3).flatmap(lambda each: st.lists(st.just(each), min_size=1, max_size=4)),
    ),
    st.integers(0, 30),
    st.lists(st.booleans(), min_size=30, max_size=30),
)
def test_with_room_everywhere_hosts_and_then_regions_are_even_within_one(
    sizes: list[int], machines: int, destroyed: list[bool]
) -> None:
    """Hosts differ by one at most; regions too, as far as their numbers of hosts allow."""
    found = [
        msgspec.structs.replace(make_host(f"r{region}-{number}"), capacity=EMPTY)
        for region, size in enumerate(sizes)
        for number in range(size)
    ]
    snapshot = Snapshot(hosts=found, alive=[host.name for host in found])
    place_all(snapshot, [Request(app="chat", machine_id="", guest=Guest())] * machines)
    on_host = Counter({host.name: 0 for host in found})
    on_host.update(machine.host for machine in snapshot.machines)
    assert sum(on_host.values()) == machines
    least = min(on_host.values())
    assert max(on_host.values()) - least <= 1
    in_region = Counter({host.region: 0 for host in found})
    in_region.update(machine.region for machine in snapshot.machines)
    for host in found:
        for other in found:  # a region in which a host still has one less has not been passed over
            if on_host[host.name] == least and on_host[other.name] > least:
                assert in_region[other.region] <= in_region[host.region] + 1
    if len(frozenset(sizes)) == 1:
        assert max(in_region.values()) - min(in_region.values()) <= 1
    # What goes and comes back finds the gaps: still even.
    gone = [m for m, goes in zip(list(snapshot.machines), destroyed, strict=False) if goes]
    for machine in gone:
        snapshot.drop_machine(machine.id)
    for number, _ in enumerate(gone):
        request = Request(app="chat", machine_id=f"again{number}", guest=Guest())
        outcome = schedule(request, snapshot)
        assert isinstance(outcome, Placement)
        commit(snapshot, request, outcome)
    again = Counter({host.name: 0 for host in found})
    again.update(machine.host for machine in snapshot.machines)
    assert max(again.values()) - min(again.values()) <= 1


@LAW
@given(clusters(), REQUESTS)
def test_a_machine_that_is_placed_anew_does_not_stand_in_its_own_way(
    snapshot: Snapshot, request: Request
) -> None:
    """The spread is that of the others: as if the machine were not there."""
    for machine in list(snapshot.machines)[:3]:
        again = msgspec.structs.replace(request, app=machine.app, machine_id=machine.id)
        without = rebuilt(snapshot)
        without.drop_machine(machine.id)
        assert schedule(again, snapshot) == schedule(again, without)
