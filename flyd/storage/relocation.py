"""A volume's life goes on on another host, with its machine: one etcd transaction.

The data is there already, under a new id, as a destroyed volume (records.reserve_copy). This makes it a
volume, gives the machine to that host with the next epoch, and leaves the old volume without a claim: kept
aside under another name, or given up. All or nothing, so at no moment do both belong to the machine; the
host that had it ends its copy before it does anything else (flyd/machines/fencing.py). Called by
recovery.py and moving.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from flyd.errors import Conflict, OutcomeUnknown, Refused
from flyd.model import App, AppKind, Desired, Event, Machine, Reservations, Value, Volume, decode, encode
from flyd.placement.draft import choose
from flyd.placement.placer import PLACE_ATTEMPTS, wait_before_retry
from flyd.placement.scheduler import Placement, Request, address, reserved
from flyd.placement.snapshot import Sighting, read_snapshot
from flyd.ports import KV, Clock, Delete, Entropy, Put, Unchanged
from flyd.storage.records import Destroyed, destroyed_key
from flyd.store import keys


class Relocation(Value, frozen=True, kw_only=True):
    """What is to become of a volume. `old` and `machine` are as they were decided on."""

    old: Volume
    new: Volume  # without a claim
    reserved: Destroyed  # its record until now
    machine: Machine | None
    desired: Desired | None = None  # what the machine shall do there; None: as it is
    aside: Volume | None = None  # what the old one becomes; None: it is given up
    kind: str
    why: str


def follow(mounted: Machine, old: str, new: str) -> Machine:
    """The machine with one volume in place of another."""
    mounts = tuple(
        replace(mount, volume=new) if mount.volume == old else mount for mount in mounted.config.mounts
    )
    return replace(mounted, config=replace(mounted.config, mounts=mounts))


async def check_relocatable(kv: KV, volume: Volume) -> Machine | None:
    """The machine that goes with the volume; Refused where they can not go."""
    app = await kv.get(keys.app(volume.app))
    if app is not None and decode(app.value, App).kind is AppKind.POSTGRES:
        raise Refused(
            f"volume {volume.id} is a member of Postgres cluster {volume.app}: an older state of it would "
            "break what it has promised to the others",
            hint="The other members have its data; it follows them once it is back.",
        )
    if not volume.attached_machine:
        return None
    record = await kv.get(keys.machine(volume.app, volume.attached_machine))
    machine = decode(record.value, Machine) if record else None
    if machine is None or machine.desired is Desired.DESTROYED:
        raise Conflict(
            f"machine {volume.attached_machine} of volume {volume.id} is being destroyed", hint="Try again."
        )
    if len(machine.config.mounts) != 1:
        raise Refused(
            f"machine {machine.id} has {len(machine.config.mounts)} volumes: they would have to go together",
            hint="Destroy the machine, then bring each volume over by itself.",
        )
    return machine


def place(sighting: Sighting, machine: Machine, host: str) -> Placement:
    """The machine on that very host, or Unplaceable with the reason."""
    request = Request(
        app=machine.app,
        machine_id=machine.id,
        guest=machine.config.guest,
        host=host,
        labels=machine.config.host_labels,
        spread_group=machine.config.process_group,
    )
    return choose(request, sighting.snapshot)


async def relocate(
    kv: KV,
    wanted: Relocation,
    *,
    guards: Sequence[Unchanged],
    also: Sequence[Delete] = (),
    clock: Clock,
    entropy: Entropy,
) -> Volume:
    """Commit it, and `also` that; the volume as it is now. Conflict if it was decided on an old view."""
    for attempt in range(PLACE_ATTEMPTS):
        sighting = await read_snapshot(kv, wanted.old.app)
        there = sighting.snapshot.volume(wanted.new.app, wanted.new.id)
        if there is not None:
            return there  # by an attempt whose answer was lost
        _check_unchanged(sighting, wanted)
        compares, effects, new = await _transaction(kv, wanted, sighting, clock)
        try:
            if (await kv.txn((*guards, *compares), (*effects, *also))).succeeded:
                return new
        except OutcomeUnknown:
            continue  # reading again tells
        await wait_before_retry(kv, attempt, entropy, guards)
    raise Conflict(
        f"volume {wanted.old.id} was not brought over: others kept changing its records", hint="Try again."
    )


def _check_unchanged(sighting: Sighting, wanted: Relocation) -> None:
    volume = sighting.snapshot.volume(wanted.old.app, wanted.old.id)
    machine = sighting.snapshot.machine(wanted.machine.id) if wanted.machine else None
    if volume != wanted.old or machine != wanted.machine:
        raise Conflict(
            f"volume {wanted.old.id} or its machine was changed meanwhile: nothing was brought over",
            hint="Look at `fly volumes list`, then try again.",
        )


async def _transaction(
    kv: KV, wanted: Relocation, sighting: Sighting, clock: Clock
) -> tuple[list[Unchanged], list[Put | Delete], Volume]:
    old, new, machine, host = wanted.old, wanted.new, wanted.machine, wanted.new.host
    at_s = clock.wall_s()
    held = await kv.get(destroyed_key(host, new.id))
    compares = [
        Unchanged(destroyed_key(host, new.id), held.mod_revision if held else 0),
        *(sighting.unchanged(key) for key in (keys.volume(old.app, old.id), keys.volume(new.app, new.id))),
        sighting.unchanged(keys.host(host)),
        sighting.unchanged(keys.reservations(host)),
    ]
    if held is None or decode(held.value, Destroyed) != wanted.reserved:
        raise Conflict(f"the disk promised to volume {new.id} on {host} is gone", hint="Try again.")
    effects: list[Put | Delete] = [Delete(destroyed_key(host, new.id))]
    if wanted.aside is not None:
        effects.append(Put(keys.volume(old.app, old.id), encode(wanted.aside)))
    else:
        given_up = Destroyed(volume=replace(old, attached_machine=""), at_s=at_s)
        effects += [
            Delete(keys.volume(old.app, old.id)),
            Put(destroyed_key(old.host, old.id), encode(given_up)),
        ]
    if machine is not None:
        new = replace(new, attached_machine=machine.id, epoch=new.epoch + 1)
        more_compares, more_effects = await _claim(kv, wanted, machine, sighting)
        compares += more_compares
        effects += more_effects
    effects += [Put(keys.volume(new.app, new.id), encode(new)), _history(wanted, at_s)]
    return compares, effects, new


async def _claim(
    kv: KV, wanted: Relocation, machine: Machine, sighting: Sighting
) -> tuple[list[Unchanged], list[Put | Delete]]:
    """The machine's part: what the old host said of it goes."""
    host = wanted.new.host
    placement = place(sighting, machine, host)
    moved = replace(
        follow(machine, wanted.old.id, wanted.new.id),
        host=host,
        region=placement.host.region,
        private_ip=address(placement.host.subnet, placement.address_number),
        epoch=machine.epoch + 1,
        desired=wanted.desired or machine.desired,
    )
    promised = sighting.snapshot.reservations.get(host) or Reservations(host=host)
    updated = replace(
        promised,
        machines={**promised.machines, machine.id: reserved(machine.config.guest)},
        addresses={**promised.addresses, machine.id: placement.address_number},
    )
    status = await kv.get(keys.status(machine.app, machine.id))
    compares = [
        sighting.unchanged(keys.machine(machine.app, machine.id)),
        Unchanged(keys.status(machine.app, machine.id), status.mod_revision if status else 0),
    ]
    return compares, [
        Put(keys.machine(moved.app, moved.id), encode(moved)),
        Put(keys.reservations(host), encode(updated)),
        Delete(keys.status(machine.app, machine.id)),
    ]


def _history(wanted: Relocation, at_s: float) -> Put:
    old, new = wanted.old, wanted.new
    fields = {"from": old.host, "to": new.host, "old": old.id, "machine": old.attached_machine}
    line = Event(
        at_s=at_s,
        app=new.app,
        source=new.id,
        kind=wanted.kind,
        message=f"volume {old.name} from {old.host} ({old.id}) to {new.host} ({new.id}): {wanted.why}",
        fields=fields,
    )
    return Put(keys.event(new.app, at_s, new.id), encode(line))
