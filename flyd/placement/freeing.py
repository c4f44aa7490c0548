"""Gives back what a machine held, once its host says that it is destroyed.

Owns the end of a claim: `free_machine` removes the claim and the status and returns
capacity, address and volumes, in one transaction. Until the host itself has written
`destroyed` for this epoch nothing is freed, so a lost host's volumes stay attached and
its capacity stays promised: it may still run the machine, and come back.

`keep_freed` does so for every machine; the elected deployer runs it beside the deploys.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
import structlog

from flyd.errors import Compacted, Conflict, OutcomeUnknown, Unavailable
from flyd.model import Machine, MachineState, MachineStatus, Reservations, Volume, decode, encode
from flyd.placement.placer import PLACE_ATTEMPTS, wait_before_retry
from flyd.ports import KV, Delete, Entropy, Put, Unchanged
from flyd.store import keys

RETRY_S = 1.0
"""Wait before the loop tries again after etcd did not answer or a compare kept failing."""

log = structlog.get_logger(__name__)


def is_gone(machine: Machine, status: MachineStatus | None) -> bool:
    """Whether the host has said, of this very claim, that the machine is destroyed."""
    return (
        status is not None
        and status.state is MachineState.DESTROYED
        and status.host == machine.host
        and status.epoch == machine.epoch
        and status.instance_id == machine.instance_id
    )


async def free_machine(
    kv: KV, app: str, machine_id: str, *, entropy: Entropy, guards: Sequence[Unchanged] = ()
) -> bool:
    """Free the machine if its host has destroyed it. False: it has not (yet). Repeating is harmless."""
    machine_key, status_key = keys.machine(app, machine_id), keys.status(app, machine_id)
    for attempt in range(PLACE_ATTEMPTS):
        claim = await kv.get(machine_key)
        if claim is None:
            return True
        machine = decode(claim.value, Machine)
        said = await kv.get(status_key)
        if said is None or not is_gone(machine, decode(said.value, MachineStatus)):
            return False
        compares = [Unchanged(machine_key, claim.mod_revision), Unchanged(status_key, said.mod_revision)]
        effects: list[Put | Delete] = [Delete(machine_key), Delete(status_key)]
        await _give_back(kv, machine, compares, effects)
        try:
            result = await kv.txn((*guards, *compares), effects)
        except OutcomeUnknown:
            continue  # the claim's absence will tell
        if result.succeeded:
            return True
        await wait_before_retry(kv, attempt, entropy, guards)
    raise Conflict(f"machine {machine_id} of app {app} was not freed: others kept changing its records")


async def keep_freed(kv: KV, *, entropy: Entropy, guards: Sequence[Unchanged] = ()) -> None:
    """Free every machine that its host has destroyed, for ever. Run under leadership, with its guard."""
    while True:
        try:
            listing = await kv.list(keys.STATUS)
            for item in listing.items:
                await _consider(kv, item.value, entropy, guards)
            async for batch in kv.watch(keys.STATUS, listing.revision + 1):
                for change in batch.changes:
                    if change.value is not None:
                        await _consider(kv, change.value.value, entropy, guards)
        except Compacted:
            continue
        except (Unavailable, Conflict) as error:
            log.warning("placement.free_failed", error=str(error), retry_s=RETRY_S)
            await asyncio.sleep(RETRY_S)


async def _consider(kv: KV, value: bytes, entropy: Entropy, guards: Sequence[Unchanged]) -> None:
    status = decode(value, MachineStatus)
    if status.state is MachineState.DESTROYED:
        await free_machine(kv, status.app, status.id, entropy=entropy, guards=guards)


async def _give_back(
    kv: KV, machine: Machine, compares: list[Unchanged], effects: list[Put | Delete]
) -> None:
    """Add to the transaction what returns the machine's capacity, address and volumes."""
    reservations_key = keys.reservations(machine.host)
    held = await kv.get(reservations_key)
    if held is not None:
        promised = decode(held.value, Reservations)
        compares.append(Unchanged(reservations_key, held.mod_revision))
        effects.append(Put(reservations_key, encode(_without(promised, machine.id))))
    for mount in machine.config.mounts:
        volume_key = keys.volume(machine.app, mount.volume)
        record = await kv.get(volume_key)
        if record is None:
            continue
        volume = decode(record.value, Volume)
        if volume.attached_machine == machine.id:
            compares.append(Unchanged(volume_key, record.mod_revision))
            detached = msgspec.structs.replace(volume, attached_machine="")
            effects.append(Put(volume_key, encode(detached)))


def _without(promised: Reservations, machine_id: str) -> Reservations:
    return Reservations(
        host=promised.host,
        machines={key: value for key, value in promised.machines.items() if key != machine_id},
        volumes_gb=promised.volumes_gb,
        addresses={key: value for key, value in promised.addresses.items() if key != machine_id},
    )
