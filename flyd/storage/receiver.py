"""Keeps a copy of another host's volume on this one: disk promised, stream fetched, record written.

In this order, and each step can be repeated: a flyd that dies between two leaves a promise without a copy or
a copy without a record, and the next order for the same volume goes on. Called by the API of the host that
gets the copy, when the volume's host asks (copier.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from msgspec.structs import replace

from flyd.errors import NotFound
from flyd.model import Volume, decode, encode
from flyd.ports import KV, Clock, Delete, Entropy, Put, Unchanged
from flyd.storage import records
from flyd.storage.copier import CopyOrder
from flyd.storage.copies import VolumeCopy, copy_id
from flyd.storage.local import LocalVolumes, StreamPiece
from flyd.store import keys

KEPT = 2  # copies of one volume: while the newest is looked at or comes, there is the one before

Fetch = Callable[[CopyOrder, str, int], AsyncIterator[StreamPiece]]
"""The stream of an order's snapshot, from the parent of that id and from so many bytes on."""


class CopyReceiver:
    """One host's."""

    def __init__(
        self, host: str, kv: KV, volumes: LocalVolumes, fetch: Fetch, *, clock: Clock, entropy: Entropy
    ) -> None:
        self._host = host
        self._kv = kv
        self._volumes = volumes
        self._fetch = fetch
        self._clock = clock
        self._entropy = entropy
        self._locks: dict[str, asyncio.Lock] = {}

    async def keep(self, order: CopyOrder) -> int:
        """Fetch and keep; how many bytes came. NotFound if the volume is no longer where the order says."""
        async with self._locks.setdefault(order.volume, asyncio.Lock()):
            volume = await self._volume(order)
            here = replace(volume, id=copy_id(volume.id), host=self._host)
            await records.promise(self._kv, here, entropy=self._entropy)
            await self._volumes.create(here.id, here.size_gb)
            moved = await self._receive(order, here.id)
            await self._record(order, here.id)
            for old in (await self._volumes.snapshots(here.id))[:-KEPT]:
                await self._volumes.delete_snapshot(here.id, old.id)
            return moved

    async def _volume(self, order: CopyOrder) -> Volume:
        record = await self._kv.get(keys.volume(order.app, order.volume))
        volume = decode(record.value, Volume) if record else None
        if volume is None or volume.host != order.source:
            raise NotFound(
                f"volume {order.volume} of app {order.app} is not on {order.source}",
                hint="`fly volumes list` shows where each volume is",
            )
        return volume

    async def _receive(self, order: CopyOrder, here: str) -> int:
        have = [s.id for s in await self._volumes.snapshots(here)]
        parent = next((i for i in reversed(have) if i in order.parents), "")
        arrived = await self._volumes.arrived_bytes(here, order.snapshot, parent)
        moved = 0

        async def counted() -> AsyncGenerator[StreamPiece]:
            nonlocal moved
            async for piece in self._fetch(order, parent, arrived):
                moved += len(piece.data)
                yield piece

        await self._volumes.receive(
            here,
            order.snapshot,
            counted(),
            parent_id=parent,
            made_at_s=order.made_at_s,
            size_gb=order.size_gb,
            consistent=order.consistent,
        )
        return moved

    async def _record(self, order: CopyOrder, here: str) -> None:
        """Tell of it, unless a newer one was told of meanwhile."""
        got = next(s for s in await self._volumes.snapshots(here) if s.id == order.snapshot)
        key = keys.volume_copy(order.app, order.volume, self._host)
        copy = VolumeCopy(
            app=order.app,
            volume=order.volume,
            host=self._host,
            source=order.source,
            snapshot=got.id,
            made_at_s=got.made_at_s,
            copied_at_s=self._clock.wall_s(),
            size_gb=got.size_gb,
            used_bytes=got.used_bytes,
            consistent=got.consistent,
        )

        async def change() -> records.Change:
            owner = await self._kv.get(keys.volume(order.app, order.volume))
            known = await self._kv.get(key)
            before = decode(known.value, VolumeCopy) if known else copy
            if owner is None or (known and before.made_at_s >= copy.made_at_s):
                return (), ()
            told = replace(copy, verified_at_s=before.verified_at_s, verify_error=before.verify_error)
            compares = [
                Unchanged(owner.key, owner.mod_revision),
                Unchanged(key, known.mod_revision if known else 0),
            ]
            effects: list[Put | Delete] = [Put(key, encode(told))]
            return compares, effects

        await records.commit(
            self._kv, change, self._entropy, f"the copy of volume {order.volume} was not told of"
        )
