"""Volumes as records: created, listed and destroyed by the same transactions as machines.

Creating reserves disk on one host; the data itself is made by that host when a machine
first attaches the volume. Destroying is refused while a machine holds it. Attaching is
part of placing a machine (placer.py), detaching of freeing one (flyd/machines/free.py).
Called by the API and by `fly postgres create`.
"""

from __future__ import annotations

from collections.abc import Sequence

from flyd.errors import Conflict, NotFound, OutcomeUnknown, Refused, Unavailable
from flyd.model import Mount, Reservations, Volume, decode, encode
from flyd.placement import ids
from flyd.placement.placer import PLACE_ATTEMPTS, choose, new_volume, wait_before_retry
from flyd.placement.scheduler import Request
from flyd.placement.snapshot import read_snapshot
from flyd.ports import KV, Clock, Delete, Entropy, Put, Unchanged
from flyd.store import keys


async def create_volume(
    kv: KV,
    app: str,
    name: str,
    region: str,
    size_gb: int,
    *,
    clock: Clock,
    entropy: Entropy,
    host: str | None = None,
    guards: Sequence[Unchanged] = (),
) -> Volume:
    """A new, free volume on a host of the region that has the disk for it.

    All attempts share one id, wherever they would put it: of those whose answer was lost, one at
    most takes effect. Raises OutcomeUnknown where etcd then says nothing any more.
    """
    mount = Mount(path="", name=name, size_gb=size_gb)
    volume_id = ids.new_volume_id(entropy)
    request = Request(app=app, machine_id="", guest=None, region=region, host=host, mounts=(mount,))
    sent = False
    for attempt in range(PLACE_ATTEMPTS):
        try:
            sighting = await read_snapshot(kv, app)
        except Unavailable as error:
            if not sent:
                raise
            raise OutcomeUnknown(
                f"whether volume {name} of app {app} was created is not known: {error.message}",
                hint=f"Once etcd answers, `fly volumes list -a {app}` shows {volume_id} if it was.",
            ) from error
        existing = next((v for v in sighting.snapshot.volumes if v.id == volume_id), None)
        if existing is not None:
            return existing  # an attempt whose answer was lost
        target = choose(request, sighting.snapshot).host
        volume = new_volume(volume_id, app, mount, target, clock)
        promised = sighting.snapshot.reservations.get(target.name) or Reservations(host=target.name)
        effects = [
            Put(keys.reservations(target.name), encode(_with_volume(promised, volume))),
            Put(keys.volume(app, volume.id), encode(volume)),
        ]
        compares = [sighting.unchanged(keys.host(target.name)), *(sighting.unchanged(e.key) for e in effects)]
        try:
            result = await kv.txn((*guards, *compares), effects)
        except OutcomeUnknown:
            sent = True
            continue  # reading again tells
        if result.succeeded:
            return volume
        await wait_before_retry(kv, attempt, entropy, guards)
    raise Conflict(
        f"volume {name} of app {app} was not created: others kept changing the same host's records"
    )


async def list_volumes(kv: KV, app: str) -> tuple[Volume, ...]:
    """The app's volumes, by id."""
    listing = await kv.list(f"{keys.VOLUMES}{app}/")
    return tuple(decode(item.value, Volume) for item in listing.items)


async def destroy_volume(kv: KV, app: str, volume_id: str, *, entropy: Entropy) -> None:
    """Remove a free volume's record and give its disk back; Refused while it is attached."""
    volume_key = keys.volume(app, volume_id)
    sent = False
    for attempt in range(PLACE_ATTEMPTS):
        record = await kv.get(volume_key)
        if record is None:
            if sent:
                return
            raise NotFound(f"volume {volume_id} does not exist in app {app}", hint="See `fly volumes list`.")
        volume = decode(record.value, Volume)
        if volume.attached_machine:
            raise Refused(
                f"volume {volume_id} ({volume.name}) is attached to machine {volume.attached_machine}",
                hint=f"Destroy the machine first: fly machine destroy {volume.attached_machine}",
            )
        compares = [Unchanged(volume_key, record.mod_revision)]
        effects: list[Put | Delete] = [Delete(volume_key)]
        held = await kv.get(keys.reservations(volume.host))
        if held is not None:
            compares.append(Unchanged(held.key, held.mod_revision))
            effects.append(
                Put(held.key, encode(_without_volume(decode(held.value, Reservations), volume_id)))
            )
        try:
            result = await kv.txn(compares, effects)
        except OutcomeUnknown:
            sent = True
            continue
        if result.succeeded:
            return
        await wait_before_retry(kv, attempt, entropy)
    raise Conflict(f"volume {volume_id} of app {app} was not destroyed: others kept changing its records")


def _with_volume(promised: Reservations, volume: Volume) -> Reservations:
    return Reservations(
        host=promised.host,
        machines=promised.machines,
        volumes_gb={**promised.volumes_gb, volume.id: volume.size_gb},
        addresses=promised.addresses,
    )


def _without_volume(promised: Reservations, volume_id: str) -> Reservations:
    return Reservations(
        host=promised.host,
        machines=promised.machines,
        volumes_gb={key: value for key, value in promised.volumes_gb.items() if key != volume_id},
        addresses=promised.addresses,
    )
