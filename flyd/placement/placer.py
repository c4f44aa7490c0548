"""Commits placements, each by one etcd transaction.

`place` schedules over a fresh snapshot and writes, all or nothing: the host's
reservations (capacity and address), the machine's claim, and the claims of its volumes
(`attached_machine`, `epoch` + 1). The transaction compares the revision of every record
it changes and of the chosen host, so two placers can never promise the same capacity,
address or volume; the one that loses reads again and decides again.

Any flyd may place. A caller that gives the machine's id gets the same machine however
often it asks: an order whose outcome was unknown, or that a crashed deployer repeats, is
found instead of placed twice. What was placed is given back by the machine's host, once it
has destroyed the machine (flyd/machines/free.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from flyd.errors import Conflict, OutcomeUnknown, Unplaceable
from flyd.model import Host, Machine, Mount, Reservations, Volume, encode
from flyd.placement import ids
from flyd.placement.scheduler import Order, Placement, Refusal, Request, Snapshot, address, reserved, schedule
from flyd.placement.snapshot import Sighting, read_snapshot
from flyd.ports import KV, Clock, Entropy, Put, Unchanged
from flyd.store import keys

PLACE_ATTEMPTS = 24
"""Tries before a placement that keeps losing to others is given up."""

PLACE_BACKOFF_S = 0.02
"""Longest wait before the second try; grows by as much with each further one."""


async def place(
    kv: KV, order: Order, *, clock: Clock, entropy: Entropy, guards: Sequence[Unchanged] = ()
) -> Machine:
    """Place one machine; `guards` are further compares (a leader's, a run's).

    Raises Unplaceable with each host's reason, Conflict when the compares keep failing.
    """
    machine_id = order.machine_id or ids.new_machine_id(entropy)
    request = Request(
        app=order.app,
        machine_id=machine_id,
        guest=order.config.guest,
        region=order.region,
        host=order.host,
        mounts=order.config.mounts,
        spread_group=order.config.process_group,
    )
    for attempt in range(PLACE_ATTEMPTS):
        sighting = await read_snapshot(kv, order.app)
        existing = next((m for m in sighting.snapshot.machines if m.id == machine_id), None)
        if existing is not None:
            return existing
        placement = choose(request, sighting.snapshot)
        volumes = _claimed_volumes(machine_id, order.app, placement, sighting.snapshot, clock, entropy)
        machine = _claim(order, machine_id, placement, volumes, clock, entropy)
        compares, effects = _transaction(machine, placement, volumes, sighting)
        try:
            result = await kv.txn((*guards, *compares), effects)
        except OutcomeUnknown:
            continue  # reading again tells: the machine is there, or it never will be by this txn
        if result.succeeded:
            return machine
        await wait_before_retry(kv, attempt, entropy, guards)
    raise Conflict(
        f"machine {machine_id} of app {order.app} was not placed: others changed the same records "
        f"{PLACE_ATTEMPTS} times in a row",
        hint="Try again; if it stays, look for a program that places or frees machines in a loop.",
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


async def wait_before_retry(kv: KV, attempt: int, entropy: Entropy, guards: Sequence[Unchanged] = ()) -> None:
    """Let competitors pass: a wait by chance, longer with each attempt.

    Raises Conflict at once where it is a guard that failed: no retry makes it hold again.
    """
    for guard in guards:
        record = await kv.get(guard.key)
        if (record.mod_revision if record is not None else 0) != guard.mod_revision:
            raise Conflict(f"{guard.key} has changed meanwhile, so what depends on it was not done")
    share = int(entropy.token(1), 16) / 255
    await asyncio.sleep(PLACE_BACKOFF_S * (attempt + 1) * share)


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


def _claimed_volumes(
    machine_id: str,
    app: str,
    placement: Placement,
    snapshot: Snapshot,
    clock: Clock,
    entropy: Entropy,
) -> tuple[Volume, ...]:
    """One volume for each mount, in order, attached to the machine in its next epoch."""
    by_id = {volume.id: volume for volume in snapshot.volumes}
    volumes = (
        by_id[mount.volume]
        if mount.volume
        else new_volume(ids.new_volume_id(entropy), app, mount, placement.host, clock)
        for mount in placement.mounts
    )
    return tuple(
        msgspec.structs.replace(volume, attached_machine=machine_id, epoch=volume.epoch + 1)
        for volume in volumes
    )


def _claim(
    order: Order,
    machine_id: str,
    placement: Placement,
    volumes: tuple[Volume, ...],
    clock: Clock,
    entropy: Entropy,
) -> Machine:
    mounts = tuple(
        Mount(path=mount.path, name=volume.name, size_gb=volume.size_gb, volume=volume.id)
        for mount, volume in zip(placement.mounts, volumes, strict=True)
    )
    return Machine(
        id=machine_id,
        app=order.app,
        name=order.name or ids.machine_name(machine_id),
        region=placement.host.region,
        host=placement.host.name,
        instance_id=ids.new_instance_id(clock, entropy),
        config=msgspec.structs.replace(order.config, mounts=mounts),
        private_ip=address(placement.host.subnet, placement.address_number),
        release=order.release,
        created_at_s=clock.wall_s(),
    )


def _transaction(
    machine: Machine, placement: Placement, volumes: tuple[Volume, ...], sighting: Sighting
) -> tuple[list[Unchanged], list[Put]]:
    name = placement.host.name
    promised = sighting.snapshot.reservations.get(name) or Reservations(host=name)
    updated = Reservations(
        host=name,
        machines={**promised.machines, machine.id: reserved(machine.config.guest)},
        volumes_gb={**promised.volumes_gb, **{v.id: v.size_gb for v in volumes}},
        addresses={**promised.addresses, machine.id: placement.address_number},
    )
    records = [
        Put(keys.reservations(name), encode(updated)),
        Put(keys.machine(machine.app, machine.id), encode(machine)),
        *(Put(keys.volume(v.app, v.id), encode(v)) for v in volumes),
    ]
    compares = [
        sighting.unchanged(keys.host(name)),
        *(sighting.unchanged(record.key) for record in records),
    ]
    return compares, list(records)
