"""Placements decided one after the other on one sighting, and the transaction that commits them all.

Owns what a placement writes, all or nothing: the host's reservations (capacity and address), the
machine's claim, and the claims of its volumes (`attached_machine`, `epoch` + 1). The transaction
compares the revision of every record that it changes and of each chosen host, so two placers can
never promise the same capacity, address or volume. Called by placer.py and volumes.py.
"""

from __future__ import annotations

import msgspec

from flyd.errors import Unplaceable
from flyd.model import Host, Machine, Mount, Reservations, Volume, encode
from flyd.placement import ids
from flyd.placement.index import Snapshot
from flyd.placement.scheduler import Order, Placement, Refusal, Request, address, reserved, schedule
from flyd.placement.snapshot import Record, Sighting
from flyd.ports import Clock, Entropy, Put, Unchanged
from flyd.store import keys


class Draft:
    """What is to be committed. The sighting's snapshot has it already: the next placement counts it."""

    def __init__(self, sighting: Sighting, clock: Clock, entropy: Entropy) -> None:
        self.records: dict[str, Record] = {}
        self._sighting = sighting
        self._clock = clock
        self._entropy = entropy
        self._hosts: dict[str, None] = {}

    def place(self, order: Order) -> Machine:
        """Place one machine, or find the one of that id; Unplaceable with each host's reason."""
        existing = self._sighting.snapshot.machine(order.machine_id)
        if existing is not None:
            return existing
        placement = choose(request_of(order), self._sighting.snapshot)
        volumes = self._claimed_volumes(order, placement)
        machine = self._claim(order, placement, volumes)
        name = placement.host.name
        promised = self._promised(name)
        self._put(
            keys.reservations(name),
            Reservations(
                host=name,
                machines={**promised.machines, machine.id: reserved(machine.config.guest)},
                volumes_gb={**promised.volumes_gb, **{v.id: v.size_gb for v in volumes}},
                addresses={**promised.addresses, machine.id: placement.address_number},
            ),
        )
        self._put(keys.machine(machine.app, machine.id), machine)
        for volume in volumes:
            self._put(keys.volume(volume.app, volume.id), volume)
        self._hosts[name] = None
        return machine

    def add_volume(self, request: Request, volume_id: str) -> Volume:
        """Reserve the disk of one free volume, or find the one of that id; Unplaceable with each reason."""
        existing = self._sighting.snapshot.volume(request.app, volume_id)
        if existing is not None:
            return existing
        host = choose(request, self._sighting.snapshot).host
        volume = new_volume(volume_id, request.app, request.mounts[0], host, self._clock)
        promised = self._promised(host.name)
        updated = msgspec.structs.replace(
            promised, volumes_gb={**promised.volumes_gb, volume.id: volume.size_gb}
        )
        self._put(keys.reservations(host.name), updated)
        self._put(keys.volume(volume.app, volume.id), volume)
        self._hosts[host.name] = None
        return volume

    def transaction(self) -> tuple[list[Unchanged], list[Put]]:
        """The compares and effects that commit everything at once; none if all was found."""
        hosts = [self._sighting.unchanged(keys.host(name)) for name in self._hosts]
        compares = [*hosts, *(self._sighting.unchanged(key) for key in self.records)]
        return compares, [Put(key, encode(record)) for key, record in self.records.items()]

    def _put(self, key: str, record: Record) -> None:
        """For this draft only: the sighting's revisions stay those that were seen."""
        self.records[key] = record
        snapshot = self._sighting.snapshot
        match record:
            case Reservations():
                snapshot.put_reservations(record)
            case Volume():
                snapshot.put_volume(record)
            case Machine():
                snapshot.put_machine(record)
            case Host():
                snapshot.put_host(record)

    def _promised(self, host: str) -> Reservations:
        return self._sighting.snapshot.reservations.get(host) or Reservations(host=host)

    def _claimed_volumes(self, order: Order, placement: Placement) -> tuple[Volume, ...]:
        """One volume for each mount, in order, attached to the machine in its next epoch."""
        claimed: list[Volume] = []
        for mount in placement.mounts:
            found = self._sighting.snapshot.volume(order.app, mount.volume) if mount.volume else None
            volume = found or new_volume(
                ids.new_volume_id(self._entropy), order.app, mount, placement.host, self._clock
            )
            rule = msgspec.structs.asdict(mount.rule) if mount.rule else {}
            claimed.append(
                msgspec.structs.replace(
                    volume, attached_machine=order.machine_id, epoch=volume.epoch + 1, **rule
                )
            )
        return tuple(claimed)

    def _claim(self, order: Order, placement: Placement, volumes: tuple[Volume, ...]) -> Machine:
        mounts = tuple(
            Mount(path=mount.path, name=volume.name, size_gb=volume.size_gb, volume=volume.id)
            for mount, volume in zip(placement.mounts, volumes, strict=True)
        )
        return Machine(
            id=order.machine_id,
            app=order.app,
            name=order.name or ids.machine_name(order.machine_id),
            region=placement.host.region,
            host=placement.host.name,
            instance_id=ids.new_instance_id(self._clock, self._entropy),
            config=msgspec.structs.replace(order.config, mounts=mounts),
            private_ip=address(placement.host.subnet, placement.address_number),
            release=order.release,
            desired=order.desired,
            cordoned=order.cordoned,
            created_at_s=self._clock.wall_s(),
        )


def request_of(order: Order) -> Request:
    """What the scheduler is asked for a machine that somebody wants placed."""
    return Request(
        app=order.app,
        machine_id=order.machine_id,
        guest=order.config.guest,
        region=order.region,
        host=order.host,
        mounts=order.config.mounts,
        labels=order.config.host_labels,
        spread_group=order.config.process_group,
    )


def choose(request: Request, snapshot: Snapshot) -> Placement:
    """The scheduler's placement, or its refusal as an error for people."""
    outcome = schedule(request, snapshot)
    if not isinstance(outcome, Refusal):
        return outcome
    what = "a machine" if request.guest is not None else "a volume"
    where = f" in {request.region}" if request.region else ""
    if not outcome.reasons:
        raise Unplaceable(
            f"no host can take {what} of app {request.app}{where}: no host has joined the cluster",
            {},
            hint="Start flyd on a host: flyd --help.",
        )
    regions = sorted({host.region for host in snapshot.hosts})
    if request.region is not None and request.region not in regions:
        hint = f"Region {request.region} has no host. Regions with hosts: {', '.join(regions)}."
    else:
        hint = "Free or add capacity, or choose another region. `fly hosts list` shows what each host has."
    reasons = "".join(f"\n  {name}: {reason}" for name, reason in sorted(outcome.reasons.items()))
    raise Unplaceable(
        f"no host can take {what} of app {request.app}{where}:{reasons}",
        outcome.reasons,
        hint=hint,
        lost=outcome.lost,
    )


def new_volume(volume_id: str, app: str, mount: Mount, host: Host, clock: Clock) -> Volume:
    """A volume on a host, free and never yet attached."""
    return Volume(
        id=volume_id,
        name=mount.name,
        app=app,
        region=host.region,
        host=host.name,
        size_gb=mount.size_gb,
        created_at_s=clock.wall_s(),
    )
