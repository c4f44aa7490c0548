"""Gives a placed machine to another host, by one etcd transaction.

The machine keeps its id, name and configuration; its claim gets a new host, address and region and
the next epoch, and its status (what the old host said of it) goes. The transaction compares the
claim, the status, the chosen host with its reservations and its sign of life, and whatever the
caller's decision rests on (`guards`), so a move that was decided on an old view changes nothing.

What is reserved on the old host stays reserved until that host has ended its copy and frees it
(flyd/machines/free.py), or is removed: while the copy may still run, its room is taken.
Called by repairs.py alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from flyd.errors import Conflict, OutcomeUnknown, Unplaceable
from flyd.model import Desired, Event, Machine, MachineStatus, Reservations, decode, encode
from flyd.placement.draft import choose, request_of
from flyd.placement.loss import MoveOff
from flyd.placement.placer import PLACE_ATTEMPTS, wait_before_retry
from flyd.placement.scheduler import Order, Placement, address, reserved
from flyd.placement.snapshot import Sighting, read_snapshot
from flyd.ports import KV, Clock, Delete, Entropy, Put, Unchanged
from flyd.store import keys

MACHINE_MOVED = "machine.moved"


async def move(
    kv: KV,
    wanted: MoveOff,
    why: str,
    *,
    clock: Clock,
    entropy: Entropy,
    guards: Sequence[Unchanged],
) -> Machine | None:
    """Place the machine elsewhere; its new claim, or None if its claim is no longer the one decided on.

    Raises Unplaceable with each host's reason, and Conflict where a guard no longer holds or the
    compares keep failing. `why` goes into the app's history, in the same transaction.
    """
    old = wanted.machine
    for attempt in range(PLACE_ATTEMPTS):
        sighting = await read_snapshot(kv, old.app)
        claim = next((m for m in sighting.snapshot.machines if m.id == old.id), None)
        if claim is None or claim != old:
            return None  # moved already, or somebody wants something else of it: decide again
        placement = _choose(claim, wanted.regions, sighting)
        alive = await kv.get(keys.alive(placement.host.name))
        status = await kv.get(keys.status(claim.app, claim.id))
        if alive is not None:
            said = decode(status.value, MachineStatus).next_start_s if status is not None else 0.0
            moved = _moved(claim, placement, wanted.at_rest, said or claim.starts_at_s)
            compares, effects = _transaction(moved, placement, sighting)
            compares += [
                Unchanged(alive.key, alive.mod_revision),
                Unchanged(keys.status(claim.app, claim.id), status.mod_revision if status else 0),
            ]
            effects.append(Delete(keys.status(claim.app, claim.id)))
            effects.append(_history(claim, moved, why, clock))
            try:
                if (await kv.txn((*guards, *compares), effects)).succeeded:
                    return moved
            except OutcomeUnknown:
                continue  # reading again tells
        await wait_before_retry(kv, attempt, entropy, guards)
    raise Conflict(
        f"machine {old.id} of app {old.app} was not moved off {old.host}: others changed the same records "
        f"{PLACE_ATTEMPTS} times in a row"
    )


def _choose(claim: Machine, regions: Sequence[str | None], sighting: Sighting) -> Placement:
    """The best host of the first region that has one."""
    refused: Unplaceable | None = None
    reasons: dict[str, str] = {}
    for region in regions:
        request = request_of(Order(app=claim.app, config=claim.config, region=region, machine_id=claim.id))
        try:
            return choose(request, sighting.snapshot)
        except Unplaceable as error:
            refused = error
            # A host is in one region: its own region's reason says more than "wrong region".
            for host, reason in error.reasons.items():
                if host not in reasons or not reason.startswith("wrong region"):
                    reasons[host] = reason
    assert refused is not None
    said = "; ".join(f"{host}: {reason}" for host, reason in sorted(reasons.items()))
    raise Unplaceable(
        f"no host can take machine {claim.id} of app {claim.app} from {claim.host}: {said}",
        reasons,
        hint=refused.hint,
    )


def _moved(claim: Machine, placement: Placement, at_rest: bool, next_start_s: float) -> Machine:
    scheduled = at_rest and claim.desired is Desired.STARTED and claim.config.schedule != ""
    return msgspec.structs.replace(
        claim,
        host=placement.host.name,
        region=placement.host.region,
        private_ip=address(placement.host.subnet, placement.address_number),
        epoch=claim.epoch + 1,
        desired=Desired.STOPPED if at_rest and not scheduled else claim.desired,
        starts_at_s=next_start_s if scheduled else 0.0,
    )


def _transaction(
    moved: Machine, placement: Placement, sighting: Sighting
) -> tuple[list[Unchanged], list[Put | Delete]]:
    name = placement.host.name
    promised = sighting.snapshot.reservations.get(name) or Reservations(host=name)
    updated = msgspec.structs.replace(
        promised,
        machines={**promised.machines, moved.id: reserved(moved.config.guest)},
        addresses={**promised.addresses, moved.id: placement.address_number},
    )
    records: list[Put | Delete] = [
        Put(keys.reservations(name), encode(updated)),
        Put(keys.machine(moved.app, moved.id), encode(moved)),
    ]
    changed = (keys.host(name), *(record.key for record in records))
    return [sighting.unchanged(key) for key in changed], records


def _history(before: Machine, after: Machine, why: str, clock: Clock) -> Put:
    at_s = clock.wall_s()
    line = Event(
        at_s=at_s,
        app=before.app,
        source=before.id,
        kind=MACHINE_MOVED,
        message=f"from {before.host} ({before.region}) to {after.host} ({after.region}): {why}",
        fields={"from": before.host, "to": after.host, "region": after.region, "epoch": str(after.epoch)},
    )
    return Put(keys.event(before.app, at_s, f"{before.id}-moved"), encode(line))
