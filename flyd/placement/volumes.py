"""Volumes as records: created and listed; given up in flyd/storage/records.py.

Creating reserves disk on one host; the data itself is made by that host when a machine
first attaches the volume. Attaching is part of placing a machine (placer.py), detaching of
freeing one (flyd/machines/free.py).
Called by the API and by `fly postgres create`.
"""

from __future__ import annotations

from collections.abc import Sequence

from flyd.errors import Conflict, OutcomeUnknown, Unavailable
from flyd.model import Mount, Volume, decode
from flyd.placement import ids
from flyd.placement.draft import Draft
from flyd.placement.placer import PLACE_ATTEMPTS, wait_before_retry
from flyd.placement.scheduler import Request
from flyd.placement.snapshot import read_snapshot
from flyd.ports import KV, Clock, Entropy, Unchanged
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
            draft = Draft(await read_snapshot(kv, app), clock, entropy)
        except Unavailable as error:
            if not sent:
                raise
            raise OutcomeUnknown(
                f"whether volume {name} of app {app} was created is not known: {error.message}",
                hint=f"Once etcd answers, `fly volumes list -a {app}` shows {volume_id} if it was.",
            ) from error
        volume = draft.add_volume(request, volume_id)
        compares, effects = draft.transaction()
        if not effects:
            return volume  # an attempt whose answer was lost
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
