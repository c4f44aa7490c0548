"""Where one machine goes: a pure choice over a snapshot of the cluster.

Owns the rules of placement. `schedule` takes hosts from best to worst and puts each through the
filters, in order; the first host that passes all is taken. Better is (`rank`): fewer machines of
the spread group on the host, then in its region, then most memory left, then by name, so that the
same snapshot and request always give the same answer. If none passes, each host's first filter that
failed is its reason, in words a user can act on.

Invariants: a placement never exceeds a host's capacity, never goes to a host without the labels
that were asked for, never uses a volume that is attached or lives elsewhere, and never makes an
empty volume where a free one of that name exists (its data may be what the user wants). Called by
placer.py and verdicts.py; reads no clock, no store. What it costs: bench/scheduler.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from heapq import merge
from itertools import groupby

from flyd.errors import InvariantBroken
from flyd.model import Desired, Guest, Host, MachineConfig, Mount, Resources, Value, Volume
from flyd.placement.index import Snapshot, Spread

ADDRESSES_PER_HOST = 250 * 250
"""Machine addresses in one host's subnet."""


LOST = "lost: it no longer renews its lease"


class Order(Value, frozen=True, kw_only=True):
    """A machine that somebody wants placed. Empty `machine_id` and `name`: the placer makes them."""

    app: str
    config: MachineConfig
    region: str | None = None
    host: str | None = None
    machine_id: str = ""
    name: str = ""
    release: int = 0
    desired: Desired = Desired.STARTED
    cordoned: bool = False


class Request(Value, frozen=True, kw_only=True):
    """What is to be placed: a machine, or (`guest` None) only the volumes in `mounts`."""

    app: str
    machine_id: str
    guest: Guest | None = Guest()
    region: str | None = None  # None: any
    host: str | None = None  # None: any
    mounts: tuple[Mount, ...] = ()
    labels: dict[str, str] = {}  # the host must have all of these
    spread_group: str = "app"  # machines of this process group are kept apart


class Placement(Value, frozen=True, kw_only=True):
    """The choice. `mounts` are the request's, with `volume` set where an existing one is taken."""

    host: Host
    mounts: tuple[Mount, ...] = ()
    address_number: int = 0


class Refusal(Value, frozen=True, kw_only=True):
    """No host can take it: each host's name and its reason.

    `lost`: those of them that would take it if they were back; it may help to wait for them.
    """

    reasons: dict[str, str] = {}
    lost: tuple[str, ...] = ()


def schedule(request: Request, snapshot: Snapshot) -> Placement | Refusal:
    """The best host for the request, or every host's reason against it."""
    for host in _best_first(request, snapshot):
        outcome = fit(request, snapshot, host)
        if isinstance(outcome, Placement):
            return outcome
    return _refusal(request, snapshot)


def fit(request: Request, snapshot: Snapshot, host: Host) -> Placement | str:
    """The request on this very host, or the first reason against it."""
    elsewhere = _elsewhere(request, host)
    if elsewhere:
        return elsewhere
    return _fit(request, snapshot, host) if host.name in snapshot.alive else LOST


def rank(request: Request, spread: Spread, snapshot: Snapshot, host: Host) -> tuple[int, int, int, str]:
    """Lower is better. `spread` is the request's (`snapshot.spread`)."""
    on_host, in_region = spread.on_host.get(host.name, 0), spread.in_region.get(host.region, 0)
    return on_host, in_region, -snapshot.free[host.name].memory_mb, host.name


def spread_of(request: Request, snapshot: Snapshot) -> Spread:
    """Where the machines are that the request's is kept apart from."""
    return snapshot.spread(request.app, request.spread_group, without=request.machine_id)


def reserved(guest: Guest) -> Resources:
    """What a machine takes of its host. Shared CPUs are time slices and not reserved; memory always is."""
    return Resources(
        cpus=guest.cpus if guest.cpu_kind == "performance" else 0,
        memory_mb=guest.memory_mb,
    )


def free_address(machine_id: str, taken: Mapping[str, int]) -> int | None:
    """A free address number, None if all are taken.

    The search begins at a place given by the machine's id: a number given back by one
    machine is then rarely the next one's, and a route that is a moment old does not lead
    to a stranger.
    """
    used = frozenset(taken.values())
    start = zlib.crc32(machine_id.encode()) % ADDRESSES_PER_HOST
    for offset in range(ADDRESSES_PER_HOST):
        number = (start + offset) % ADDRESSES_PER_HOST
        if number not in used:
            return number
    return None


def address(subnet: str, number: int) -> str:
    """The private address of a number. Ends in 2..251: 1 is the host's own."""
    return f"{subnet}.{number // 250}.{number % 250 + 2}"


# --------------------------------------------------------------------------- the order of trying


def _best_first(request: Request, snapshot: Snapshot) -> Iterator[Host]:
    """The open hosts that may do, best first; those with too little memory are left out."""
    spread = spread_of(request, snapshot)
    pinned = _pinned(request, snapshot)
    if pinned is not None:
        hosts = [host for name in pinned if (host := snapshot.host(name)) is not None]
        yield from sorted(hosts, key=lambda host: rank(request, spread, snapshot, host))
        return
    regions = [request.region] if request.region is not None else list(snapshot.roomy)
    regions.sort(key=lambda region: spread.in_region.get(region, 0))
    memory_mb = reserved(request.guest).memory_mb if request.guest is not None else None
    for machines in sorted({0, *(n for region in regions for n in spread.open.get(region, ()))}):
        for _, equal in groupby(regions, key=lambda region: spread.in_region.get(region, 0)):
            walks = [_walk(snapshot, spread, region, machines) for region in equal]
            for free, name in merge(*walks) if len(walks) > 1 else walks[0]:
                if memory_mb is not None and -free < memory_mb:
                    break  # so have all after it
                if (host := snapshot.host(name)) is not None:
                    yield host


def _walk(snapshot: Snapshot, spread: Spread, region: str, machines: int) -> Iterator[tuple[int, str]]:
    """The region's open hosts with so many machines of the group, most free memory first.

    Either those hosts are sorted, or the region's order is searched for them: whichever is shorter.
    """
    roomy, levels = snapshot.roomy.get(region, []), spread.open.get(region, {})
    if machines == 0:
        if sum(map(len, levels.values())) < len(roomy):
            yield from (entry for entry in roomy if entry[1] not in spread.on_host)
        return
    hosts = levels.get(machines, {})
    if len(hosts) * len(hosts) < len(roomy):
        yield from sorted((-snapshot.free[name].memory_mb, name) for name in hosts)
    else:
        yield from (entry for entry in roomy if entry[1] in hosts)


def _pinned(request: Request, snapshot: Snapshot) -> list[str] | None:
    """The only hosts that come into question, because of a volume or a wish; None: all do."""
    if request.host is not None:
        return [request.host]
    volumes = snapshot.volumes_of(request.app) if request.mounts else ()
    for mount in request.mounts:
        if mount.volume:
            return [v.host for v in volumes if v.id == mount.volume]
        free = _free_volumes(mount.name, request, volumes, ())
        if free:
            return sorted({v.host for v in free})
    return None


def _refusal(request: Request, snapshot: Snapshot) -> Refusal:
    """Every host's reason, by name; those that would do if they were back."""
    reasons: dict[str, str] = {}
    lost: list[str] = []
    for host in sorted(snapshot.hosts, key=lambda host: host.name):
        outcome = fit(request, snapshot, host)
        if isinstance(outcome, Placement):
            raise InvariantBroken(f"host {host.name} can take {request} and was not found")
        reasons[host.name] = outcome
        if outcome == LOST and isinstance(_fit(request, snapshot, host), Placement):
            lost.append(host.name)
    return Refusal(reasons=reasons, lost=tuple(lost))


# --------------------------------------------------------------------------- the filters


def _fit(request: Request, snapshot: Snapshot, host: Host) -> Placement | str:
    """The request on this host, whether it is alive or not, or the first reason against it."""
    if host.cordoned:
        return "cordoned"
    mounts = _resolve_mounts(request, snapshot, host)
    if isinstance(mounts, str):
        return mounts
    new_gb = sum(m.size_gb for m in mounts if not m.volume)
    against = _capacity(request.guest, new_gb, host, snapshot.free[host.name])
    if against:
        return against
    promised = snapshot.reservations.get(host.name)
    number = free_address(request.machine_id, promised.addresses if promised else {})
    if number is None:
        return f"all {ADDRESSES_PER_HOST} machine addresses are taken"
    return Placement(host=host, mounts=mounts, address_number=number)


def _elsewhere(request: Request, host: Host) -> str:
    if request.region is not None and host.region != request.region:
        return f"wrong region {host.region} ({request.region} wanted)"
    if request.host is not None and host.name != request.host:
        return f"not the host that was asked for ({request.host})"
    for label, wanted in sorted(request.labels.items()):
        if host.labels.get(label) != wanted:
            return f"its label {label} is {host.labels.get(label, 'not set')} ({wanted} wanted)"
    return ""


def _capacity(guest: Guest | None, new_gb: int, host: Host, free: Resources) -> str:
    capacity = host.capacity
    if guest is not None:
        wanted = reserved(guest)
        if wanted.memory_mb > free.memory_mb:
            left_mb = max(free.memory_mb, 0)
            return f"needs {wanted.memory_mb} MB memory, {left_mb} MB free of {capacity.memory_mb}"
        if guest.cpus > capacity.cpus:
            return f"needs {guest.cpus} CPUs, it has {capacity.cpus}"
        if wanted.cpus > free.cpus:
            return f"needs {wanted.cpus} dedicated CPUs, {max(free.cpus, 0)} free of {capacity.cpus}"
    if new_gb > 0 and new_gb > free.disk_gb:
        return f"needs {new_gb} GB disk, {max(free.disk_gb, 0)} GB free of {capacity.disk_gb}"
    return ""


def _resolve_mounts(request: Request, snapshot: Snapshot, host: Host) -> tuple[Mount, ...] | str:
    """The mounts with their volumes on this host; a mount left without one gets a new volume."""
    if not request.mounts:
        return ()
    volumes = snapshot.volumes_of(request.app)
    resolved: list[Mount] = []
    for mount in request.mounts:
        if mount.volume:
            against = _named_by_id(mount.volume, request, volumes, host)
            if against:
                return against
            resolved.append(mount)
            continue
        taken = tuple(m.volume for m in resolved)
        free = _free_volumes(mount.name, request, volumes, taken)
        here = tuple(v for v in free if v.host == host.name)
        if free and not here:
            places = ", ".join(f"{v.id} on {v.host}" for v in free)
            return f"a free volume {mount.name} exists and lives elsewhere ({places})"
        resolved.append(_with_volume(mount, here[0].id) if here else mount)
    return tuple(resolved)


def _named_by_id(volume_id: str, request: Request, volumes: tuple[Volume, ...], host: Host) -> str:
    volume = next((v for v in volumes if v.id == volume_id), None)
    if volume is None:
        return f"volume {volume_id} does not exist in app {request.app}"
    if volume.host != host.name:
        return f"volume {volume_id} lives on {volume.host}"
    if volume.attached_machine not in ("", request.machine_id):
        return f"volume {volume_id} is attached to machine {volume.attached_machine}"
    return ""


def _free_volumes(
    name: str, request: Request, volumes: tuple[Volume, ...], taken: tuple[str, ...]
) -> tuple[Volume, ...]:
    if request.guest is None:
        return ()  # only volumes are placed: always new ones
    return tuple(
        v
        for v in volumes
        if v.name == name
        and not v.attached_machine
        and v.id not in taken
        and request.region in (None, v.region)
    )


def _with_volume(mount: Mount, volume_id: str) -> Mount:
    return Mount(path=mount.path, name=mount.name, size_gb=mount.size_gb, volume=volume_id)
