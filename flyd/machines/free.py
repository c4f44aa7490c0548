"""Giving a destroyed machine's place back: one etcd transaction.

Owns which keys vanish with a machine and who may remove them. Invariants: claim, status,
reservation and the volumes' attachment go together or not at all; a claim that is another
host's by now, or that asks for the machine again, is never touched. Called by the last
step of DESTROY (operations.py), after nothing of the machine is left on this host; doing
it again changes nothing.
"""

from __future__ import annotations

import msgspec

from flyd.errors import Conflict
from flyd.machines.leases import lease_key
from flyd.model import Desired, Machine, MachineStatus, Reservations, Volume, decode, encode
from flyd.ports import KV, Delete, Put, Unchanged
from flyd.store import keys

MAX_ATTEMPTS = 16


async def free(kv: KV, host: str, ours: Machine) -> None:
    """Remove what etcd holds of machine `ours`, as far as it is still this host's to remove."""
    for _ in range(MAX_ATTEMPTS):
        if await _try_free(kv, host, ours):
            return
    raise Conflict(
        f"the reservations of host {host} kept changing while machine {ours.id} was being freed",
        hint="flyd tries again by itself",
    )


async def _try_free(kv: KV, host: str, ours: Machine) -> bool:
    """One attempt; False if something read had changed when it was to be written."""
    claim_key = keys.machine(ours.app, ours.id)
    stored = await kv.get(claim_key)
    claim = decode(stored.value, Machine) if stored else None
    compares = [Unchanged(claim_key, stored.mod_revision if stored else 0)]
    effects: list[Put | Delete] = []
    if claim is not None and claim.host == host and claim.desired is not Desired.DESTROYED:
        return True  # given to this host again: its place is still needed
    await _free_reservation(kv, host, ours.id, compares, effects)
    if claim is None or claim.host == host:
        effects += [Delete(claim_key), Delete(lease_key(ours.app, ours.id))]
        await _free_status(kv, host, ours, compares, effects)
        await _free_volumes(kv, claim or ours, compares, effects)
    return (await kv.txn(compares, effects)).succeeded if effects else True


async def _free_reservation(
    kv: KV, host: str, machine_id: str, compares: list[Unchanged], effects: list[Put | Delete]
) -> None:
    stored = await kv.get(keys.reservations(host))
    if stored is None:
        return
    reserved = decode(stored.value, Reservations)
    if machine_id not in reserved.machines and machine_id not in reserved.addresses:
        return
    freed = msgspec.structs.replace(
        reserved,
        machines={m: size for m, size in reserved.machines.items() if m != machine_id},
        addresses={m: number for m, number in reserved.addresses.items() if m != machine_id},
    )
    compares.append(Unchanged(stored.key, stored.mod_revision))
    effects.append(Put(stored.key, encode(freed)))


async def _free_status(
    kv: KV, host: str, ours: Machine, compares: list[Unchanged], effects: list[Put | Delete]
) -> None:
    key = keys.status(ours.app, ours.id)
    stored = await kv.get(key)
    # Compared even if absent: a status that is being published right now must not outlive its claim.
    compares.append(Unchanged(key, stored.mod_revision if stored else 0))
    if stored is not None and decode(stored.value, MachineStatus).host == host:
        effects.append(Delete(key))


async def _free_volumes(
    kv: KV, claim: Machine, compares: list[Unchanged], effects: list[Put | Delete]
) -> None:
    for mount in claim.config.mounts:
        stored = await kv.get(keys.volume(claim.app, mount.volume)) if mount.volume else None
        volume = decode(stored.value, Volume) if stored else None
        if stored and volume and volume.attached_machine == claim.id:
            compares.append(Unchanged(stored.key, stored.mod_revision))
            effects.append(Put(stored.key, encode(msgspec.structs.replace(volume, attached_machine=""))))
