"""A new version of a machine's configuration: one transaction that also changes what it reserves.

Owns what an update may change: all but the machine's place and its volumes. The new claim has a
new `instance_id`; the machine's host replaces what runs (decide.py). Invariants: an update decided
on one version never lands on another (`current_version`); the host's reservation always covers the
claim; a lost answer is looked up by the instance_id, so no update happens twice.

Called by the API.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from flyd.errors import Conflict, NotFound, OutcomeUnknown, Refused
from flyd.machines import leases
from flyd.model import (
    Desired,
    Host,
    Machine,
    MachineConfig,
    Mount,
    Reservations,
    Resources,
    decode,
    encode,
)
from flyd.placement import ids
from flyd.placement.scheduler import reserved
from flyd.ports import KV, Clock, Entropy, Put, Unchanged
from flyd.store import keys

ATTEMPTS = 16


async def update(
    kv: KV,
    app: str,
    machine_id: str,
    config: MachineConfig,
    *,
    current_version: str = "",
    nonce: str = "",
    clock: Clock,
    entropy: Entropy,
) -> Machine:
    """Replace the configuration, if it is still that of `current_version` (empty: whichever).

    Raises Conflict on another version or another's lease, Refused where volumes would change or
    the host has no room for the new size.
    """
    instance_id = ids.new_instance_id(clock, entropy)
    for _ in range(ATTEMPTS):
        record = await kv.get(keys.machine(app, machine_id))
        if record is None:
            raise NotFound(f"no machine {machine_id!r} in app {app!r}", hint="`fly machine list` shows all.")
        before = decode(record.value, Machine)
        if before.instance_id == instance_id:  # an attempt whose answer was lost
            return before
        _check(before, current_version)
        mounts = kept_mounts(before.config.mounts, config.mounts)
        after = msgspec.structs.replace(
            before, config=msgspec.structs.replace(config, mounts=mounts), instance_id=instance_id, stop=None
        )
        held = await leases.guard(kv, app, machine_id, nonce)
        compares, effects = await _resized(kv, before, after)
        compares += (held, Unchanged(record.key, record.mod_revision))
        try:
            result = await kv.txn(compares, (*effects, Put(record.key, encode(after))))
        except OutcomeUnknown:
            continue
        if result.succeeded:
            return after
    raise Conflict(
        f"machine {machine_id} was not updated: others changed it or its host {ATTEMPTS} times in a row",
        hint="Try again.",
    )


def _check(machine: Machine, current_version: str) -> None:
    if machine.desired is Desired.DESTROYED:
        raise Conflict(f"machine {machine.id} of app {machine.app} is being destroyed")
    if current_version and machine.instance_id != current_version:
        raise Conflict(
            f"machine {machine.id} is at version {machine.instance_id} by now, not {current_version}",
            hint="Somebody updated it meanwhile: read it again, and decide again.",
        )


def kept_mounts(old: Sequence[Mount], new: Sequence[Mount]) -> tuple[Mount, ...]:
    """The new mounts with the volumes that the machine has; only their paths may differ."""
    left = list(old)
    kept: list[Mount] = []
    for mount in new:
        found = next(
            (m for m in left if (mount.volume == m.volume if mount.volume else mount.name == m.name)), None
        )
        if found is None:
            raise Refused(
                f"volume {mount.volume or mount.name} is not one of this machine",
                hint="An update can not give a machine other volumes: make a new machine with them.",
            )
        left.remove(found)
        kept.append(msgspec.structs.replace(found, path=mount.path))
    if left:
        raise Refused(
            f"the new configuration leaves out volume {left[0].volume or left[0].name}",
            hint="An update can not take a machine's volumes away: name them all under mounts.",
        )
    return tuple(kept)


async def _resized(kv: KV, before: Machine, after: Machine) -> tuple[tuple[Unchanged, ...], tuple[Put, ...]]:
    """What changes of the host's reservations with the machine's size; nothing if it is the same."""
    size = reserved(after.config.guest)
    if size == reserved(before.config.guest):
        return (), ()
    stored = await kv.get(keys.reservations(before.host))
    described = await kv.get(keys.host(before.host))
    if stored is None or described is None:
        raise Refused(f"host {before.host} of machine {before.id} is not known", hint="`fly hosts list`")
    promised = decode(stored.value, Reservations)
    others = {m: taken for m, taken in promised.machines.items() if m != before.id}
    host = decode(described.value, Host)
    _check_room(host, size, others.values())
    resized = msgspec.structs.replace(promised, machines={**others, before.id: size})
    compares = (
        Unchanged(stored.key, stored.mod_revision),
        Unchanged(described.key, described.mod_revision),
    )
    return compares, (Put(stored.key, encode(resized)),)


def _check_room(host: Host, size: Resources, others: Iterable[Resources]) -> None:
    promised = tuple(others)
    lacks = [
        f"needs {wanted} {what}, {max(left, 0)} free"
        for what, wanted, left in (
            ("MB memory", size.memory_mb, host.capacity.memory_mb - sum(r.memory_mb for r in promised)),
            ("dedicated CPUs", size.cpus, host.capacity.cpus - sum(r.cpus for r in promised)),
        )
        if wanted > left
    ]
    if lacks:
        raise Refused(
            f"host {host.name} has no room for the machine's new size: {'; '.join(lacks)}",
            hint="A machine keeps its host: clone it elsewhere with the new size, and destroy this one.",
        )
