"""Where one machine goes: a pure choice over a snapshot of the cluster.

Owns the rules of placement. `schedule` puts each host through the filters, in order;
the first that fails gives the host's reason, in words a user can act on. Of the hosts
that pass, the best by `_rank` is taken: fewest machines of the spread group in the region,
then on the host, then most memory left, then by name, so that the same snapshot and
request always give the same answer.

Invariants: a placement never exceeds a host's capacity, never uses a volume that is
attached or lives elsewhere, and never makes an empty volume where a free one of that name
exists (its data may be what the user wants). Called by placer.py; reads no clock, no store.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

from flyd.model import (
    Desired,
    Guest,
    Host,
    Machine,
    MachineConfig,
    Mount,
    Reservations,
    Resources,
    Value,
    Volume,
)

ADDRESSES_PER_HOST = 250 * 250
"""Machine addresses in one host's subnet."""


class Order(Value, frozen=True, kw_only=True):
    """A machine that somebody wants placed. Empty `machine_id` and `name`: the placer makes them."""

    app: str
    config: MachineConfig
    region: str | None = None
    host: str | None = None
    machine_id: str = ""
    name: str = ""
    release: int = 0


class Request(Value, frozen=True, kw_only=True):
    """What is to be placed: a machine, or (`guest` None) only the volumes in `mounts`."""

    app: str
    machine_id: str
    guest: Guest | None = Guest()
    region: str | None = None  # None: any
    host: str | None = None  # None: any
    mounts: tuple[Mount, ...] = ()
    spread_group: str = "app"  # machines of this process group are kept apart


class Snapshot(Value, frozen=True, kw_only=True):
    """The cluster as placement sees it. Volumes and machines are those of one application."""

    hosts: tuple[Host, ...] = ()
    alive: tuple[str, ...] = ()  # names of hosts that hold their lease
    reservations: dict[str, Reservations] = {}  # by host; absent: nothing promised yet
    volumes: tuple[Volume, ...] = ()
    machines: tuple[Machine, ...] = ()


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
    reasons: dict[str, str] = {}
    lost: list[str] = []
    fitting: list[Placement] = []
    for host in sorted(snapshot.hosts, key=lambda h: h.name):
        elsewhere = _elsewhere(request, host)
        outcome = elsewhere or _fit(request, snapshot, host)
        if host.name not in snapshot.alive and not elsewhere:
            lost += () if isinstance(outcome, str) else (host.name,)
            reasons[host.name] = "lost: it no longer renews its lease"
        elif isinstance(outcome, str):
            reasons[host.name] = outcome
        else:
            fitting.append(outcome)
    if not fitting:
        return Refusal(reasons=reasons, lost=tuple(lost))
    return min(fitting, key=lambda placement: _rank(request, snapshot, placement.host))


def reserved(guest: Guest) -> Resources:
    """What a machine takes of its host. Shared CPUs are time slices and not reserved; memory always is."""
    return Resources(
        cpus=guest.cpus if guest.cpu_kind == "performance" else 0,
        memory_mb=guest.memory_mb,
    )


def free_capacity(host: Host, promised: Reservations | None) -> Resources:
    """What is left of a host after all that is promised on it."""
    machines = promised.machines.values() if promised else ()
    volumes_gb = promised.volumes_gb.values() if promised else ()
    return Resources(
        cpus=host.capacity.cpus - sum(r.cpus for r in machines),
        memory_mb=host.capacity.memory_mb - sum(r.memory_mb for r in machines),
        disk_gb=host.capacity.disk_gb - sum(volumes_gb),
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


def _fit(request: Request, snapshot: Snapshot, host: Host) -> Placement | str:
    """The request on this host, whether it is alive or not, or the first reason against it."""
    if host.cordoned:
        return "cordoned"
    mounts = _resolve_mounts(request, snapshot, host)
    if isinstance(mounts, str):
        return mounts
    promised = snapshot.reservations.get(host.name)
    new_gb = sum(m.size_gb for m in mounts if not m.volume)
    against = _capacity(request.guest, new_gb, host, free_capacity(host, promised))
    if against:
        return against
    number = free_address(request.machine_id, promised.addresses if promised else {})
    if number is None:
        return f"all {ADDRESSES_PER_HOST} machine addresses are taken"
    return Placement(host=host, mounts=mounts, address_number=number)


def _elsewhere(request: Request, host: Host) -> str:
    if request.region is not None and host.region != request.region:
        return f"wrong region {host.region} ({request.region} wanted)"
    if request.host is not None and host.name != request.host:
        return f"not the host that was asked for ({request.host})"
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
    volumes = tuple(sorted(snapshot.volumes, key=lambda v: v.id))
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


def _rank(request: Request, snapshot: Snapshot, host: Host) -> tuple[int, int, int, str]:
    """Lower is better."""
    group = tuple(
        m
        for m in snapshot.machines
        if m.config.process_group == request.spread_group
        and m.desired is not Desired.DESTROYED
        and m.host in snapshot.alive
        and m.id != request.machine_id
    )
    return (
        sum(1 for m in group if m.region == host.region),
        sum(1 for m in group if m.host == host.name),
        -free_capacity(host, snapshot.reservations.get(host.name)).memory_mb,
        host.name,
    )
