"""Volumes that are destroyed and kept, that grow, and that are made from others: the records in etcd.

    destroyed_volumes/<host>/<volume>   Destroyed   the API; the volume's host, when it removes the data

A destroyed volume's disk stays promised until its data is gone: it is still there, and undoing must not
fail for want of room. A copy begins its life as a destroyed volume: should flyd die before the copy is
made and told of, its host removes what there is of it after KEPT_S like any other.

Called by the API of the volume's host and by keeper.py. Every change is one transaction that compares
what it read; each can be repeated.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from msgspec.structs import replace

from flyd.errors import Conflict, NotFound, OutcomeUnknown, Refused, Unplaceable
from flyd.model import Host, Reservations, Value, Volume, decode, encode
from flyd.placement.index import free_capacity
from flyd.placement.placer import PLACE_ATTEMPTS, wait_before_retry
from flyd.ports import KV, Delete, Entropy, KeyValue, Put, Unchanged
from flyd.store import keys

DESTROYED = keys.ROOT + "destroyed_volumes/"
KEPT_S = 24 * 3600.0

Change = tuple[Sequence[Unchanged], Sequence[Put | Delete]]


class Destroyed(Value, frozen=True, kw_only=True):
    """A volume that somebody gave up, as it was."""

    volume: Volume
    at_s: float


def destroyed_key(host: str, volume_id: str) -> str:
    """A destroyed volume's record."""
    return f"{DESTROYED}{host}/{volume_id}"


async def list_destroyed(kv: KV, host: str = "") -> tuple[Destroyed, ...]:
    """Those of a host, or all, by host and id."""
    listing = await kv.list(f"{DESTROYED}{host}/" if host else DESTROYED)
    return tuple(decode(item.value, Destroyed) for item in listing.items)


async def destroy(kv: KV, app: str, volume_id: str, at_s: float, *, entropy: Entropy) -> None:
    """Give a volume up; `Refused` while it is attached."""
    key = keys.volume(app, volume_id)
    sent = False

    async def change() -> Change:
        nonlocal sent
        record = await kv.get(key)
        if record is None and sent:
            return (), ()
        volume = _volume(record, volume_id, app)
        if volume.attached_machine:
            raise Refused(
                f"volume {volume_id} ({volume.name}) is attached to machine {volume.attached_machine}",
                hint=f"Destroy the machine first: fly machine destroy {volume.attached_machine}",
            )
        sent = True
        kept = Put(destroyed_key(volume.host, volume_id), encode(Destroyed(volume=volume, at_s=at_s)))
        return [_unchanged(key, record)], [Delete(key), kept]

    await commit(kv, change, entropy, f"volume {volume_id} of app {app} was not destroyed")


async def undestroy(kv: KV, app: str, volume_id: str, *, entropy: Entropy) -> Volume:
    """Bring a destroyed volume back; the record. NotFound once its host has begun to remove the data."""
    back: list[Volume] = []

    async def change() -> Change:
        listed = [(item, decode(item.value, Destroyed)) for item in (await kv.list(DESTROYED)).items]
        found = [(item, d) for item, d in listed if (d.volume.app, d.volume.id) == (app, volume_id)]
        if not found:
            present = await kv.get(keys.volume(app, volume_id))
            if present is not None:
                back.append(decode(present.value, Volume))
                return (), ()
            raise NotFound(
                f"no volume {volume_id} of app {app} was destroyed in the last {KEPT_S / 3600:g} hours",
                hint=f"`fly volumes list --destroyed -a {app}` shows those that can come back.",
            )
        item, volume = found[0][0], found[0][1].volume
        owner = await kv.get(keys.app(app))
        if owner is None:
            raise NotFound(f"app {app} is gone", hint=f"Make it again first: fly apps create {app}")
        back.append(volume)
        compares = [
            Unchanged(item.key, item.mod_revision),  # as it was listed: its host may be removing it
            Unchanged(owner.key, owner.mod_revision),
            Unchanged(keys.volume(app, volume_id), 0),
        ]
        return compares, [
            Delete(item.key),
            Put(keys.volume(app, volume_id), encode(volume)),
        ]

    await commit(kv, change, entropy, f"volume {volume_id} of app {app} was not brought back")
    return back[-1]


async def forget(kv: KV, destroyed: Destroyed, *, entropy: Entropy) -> None:
    """From here on it can not come back: its record goes, and its disk is free for others.

    Only its own host calls this, before it removes the data. NotFound if it was brought back meanwhile.
    """
    volume = destroyed.volume
    key = destroyed_key(volume.host, volume.id)

    async def change() -> Change:
        record = await kv.get(key)
        if record is None or decode(record.value, Destroyed) != destroyed:
            return (), ()
        reservations = await kv.get(keys.reservations(volume.host))
        held = _reservations(volume.host, reservations)
        left = {name: size for name, size in held.volumes_gb.items() if name != volume.id}
        return [_unchanged(key, record), _unchanged(keys.reservations(volume.host), reservations)], [
            Delete(key),
            Put(keys.reservations(volume.host), encode(replace(held, volumes_gb=left))),
        ]

    await commit(kv, change, entropy, f"destroyed volume {volume.id} was not forgotten")


async def extend(kv: KV, app: str, volume_id: str, size_gb: int, *, entropy: Entropy) -> Volume:
    """Promise the volume more of its host's disk; the record. `Refused` if it would shrink."""
    extended: list[Volume] = []

    async def change() -> Change:
        key = keys.volume(app, volume_id)
        record = await kv.get(key)
        volume = _volume(record, volume_id, app)
        if size_gb < volume.size_gb:
            raise Refused(
                f"volume {volume_id} has {volume.size_gb} GB and can not shrink to {size_gb} GB",
                hint="Make a smaller volume and copy what it needs.",
            )
        larger = replace(volume, size_gb=size_gb)
        extended.append(larger)
        if larger == volume:
            return (), ()
        compares, promise = await _promise(kv, volume, size_gb, size_gb - volume.size_gb)
        return [_unchanged(key, record), *compares], [Put(key, encode(larger)), promise]

    await commit(kv, change, entropy, f"volume {volume_id} of app {app} was not extended")
    return extended[-1]


async def reserve_copy(kv: KV, copy: Volume, at_s: float, *, entropy: Entropy) -> None:
    """Promise disk to a volume that is about to be made from another; a destroyed one until it is there."""
    key = destroyed_key(copy.host, copy.id)

    async def change() -> Change:
        if await kv.get(key) is not None:
            return (), ()
        compares, promise = await _promise(kv, copy, copy.size_gb, copy.size_gb)
        return [Unchanged(key, 0), *compares], [Put(key, encode(Destroyed(volume=copy, at_s=at_s))), promise]

    await commit(kv, change, entropy, f"no disk was promised to the copy {copy.id}")


async def promise(kv: KV, copy: Volume, *, entropy: Entropy) -> None:
    """Promise disk to something that is kept on a host besides its volumes; as much as it has grown to."""

    async def change() -> Change:
        record = await kv.get(keys.reservations(copy.host))
        more_gb = copy.size_gb - _reservations(copy.host, record).volumes_gb.get(copy.id, 0)
        if more_gb <= 0:
            return (), ()
        compares, promised = await _promise(kv, copy, copy.size_gb, more_gb)
        return compares, [promised]

    await commit(kv, change, entropy, f"no disk was promised to {copy.id}")


async def give_up_copies(kv: KV, copies: Volume, volume_id: str, at_s: float, *, entropy: Entropy) -> None:
    """Treat copies of a volume that is no more as a destroyed volume. `copies`: as they are on disk."""
    key = destroyed_key(copies.host, copies.id)

    async def change() -> Change:
        told = [
            item
            for item in (await kv.list(keys.VOLUME_COPIES)).items
            if item.key.endswith(f"/{volume_id}/{copies.host}")
        ]
        known = await kv.get(key)
        if known is not None and not told:
            return (), ()
        compares = [Unchanged(key, known.mod_revision if known else 0)]
        effects: list[Put | Delete] = [Put(key, encode(Destroyed(volume=copies, at_s=at_s)))]
        compares += [Unchanged(item.key, item.mod_revision) for item in told]
        effects += [Delete(item.key) for item in told]
        return compares, effects

    await commit(kv, change, entropy, f"copies of volume {volume_id} were not given up")


async def set_policy(
    kv: KV, app: str, volume_id: str, policy: Callable[[Volume], Volume], *, entropy: Entropy
) -> Volume:
    """Change how a volume is looked after, by what `policy` makes of its record; the new one."""
    changed: list[Volume] = []

    async def change() -> Change:
        key = keys.volume(app, volume_id)
        record = await kv.get(key)
        volume = _volume(record, volume_id, app)
        new = policy(volume)
        changed.append(new)
        return ((), ()) if new == volume else ([_unchanged(key, record)], [Put(key, encode(new))])

    await commit(kv, change, entropy, f"volume {volume_id} of app {app} was not changed")
    return changed[-1]


async def _promise(kv: KV, volume: Volume, size_gb: int, more_gb: int) -> tuple[list[Unchanged], Put]:
    """So much of the host's disk for the volume, or Unplaceable."""
    name = volume.host
    host_record, reservations = await kv.get(keys.host(name)), await kv.get(keys.reservations(name))
    if host_record is None:
        raise NotFound(f"host {name} of volume {volume.id} is gone", hint="`fly hosts list` shows the hosts.")
    held = _reservations(name, reservations)
    free_gb = free_capacity(decode(host_record.value, Host), held).disk_gb
    if more_gb > free_gb:
        reason = f"{more_gb} GB more are needed, {free_gb} GB of its disk are free"
        raise Unplaceable(
            f"host {name} has no room for volume {volume.id}: {reason}",
            {name: reason},
            hint="Free disk there, or take a smaller size. `fly hosts list` shows what each host has.",
        )
    promised = replace(held, volumes_gb={**held.volumes_gb, volume.id: size_gb})
    compares = [_unchanged(keys.host(name), host_record), _unchanged(keys.reservations(name), reservations)]
    return compares, Put(keys.reservations(name), encode(promised))


async def commit(kv: KV, change: Callable[[], Awaitable[Change]], entropy: Entropy, otherwise: str) -> None:
    """Read and write until it holds. No effects: it is done, by an attempt whose answer was lost."""
    for attempt in range(PLACE_ATTEMPTS):
        compares, effects = await change()
        if not effects:
            return
        try:
            if (await kv.txn(compares, effects)).succeeded:
                return
        except OutcomeUnknown:
            continue  # reading again tells
        await wait_before_retry(kv, attempt, entropy)
    raise Conflict(f"{otherwise}: others kept changing the same records", hint="Try again.")


def _volume(record: KeyValue | None, volume_id: str, app: str) -> Volume:
    if record is None:
        raise NotFound(f"volume {volume_id} does not exist in app {app}", hint="See `fly volumes list`.")
    return decode(record.value, Volume)


def _reservations(host: str, record: KeyValue | None) -> Reservations:
    return decode(record.value, Reservations) if record is not None else Reservations(host=host)


def _unchanged(key: str, record: KeyValue | None) -> Unchanged:
    return Unchanged(key, record.mod_revision if record is not None else 0)
