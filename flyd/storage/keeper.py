"""The loop that looks after a host's volumes: sizes, scheduled snapshots, and what is destroyed.

Started by the daemon on every host; the only one that removes data for ever. It removes what a record in
etcd says was destroyed KEPT_S ago, never what merely has no record: an etcd that was set back to an old
state must not cost anybody a volume. Decides nothing itself: schedule.py, records.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog

from flyd.errors import FlydError, NotFound, Refused
from flyd.model import Event, Reservations, Volume, decode, encode
from flyd.ports import KV, Clock, Entropy, Put
from flyd.storage import records
from flyd.storage.copies import copied_volume, is_copy
from flyd.storage.fullness import KINDS, Level, grown_gb, level, story
from flyd.storage.local import LocalVolumes, VolumeUsage
from flyd.storage.schedule import plan
from flyd.store import keys

log = structlog.get_logger(__name__)

ROUND_S = 60.0
VOLUME_EXTENDED = "volume.extended"
LOOK_S = 10.0  # between looks at how full the volumes are


class VolumeKeeper:
    """One host's."""

    def __init__(self, host: str, kv: KV, volumes: LocalVolumes, *, clock: Clock, entropy: Entropy) -> None:
        self._host = host
        self._kv = kv
        self._volumes = volumes
        self._clock = clock
        self._entropy = entropy
        self._levels: dict[str, Level] = {}  # of attached volumes; forgotten with flyd, then told again

    async def keep_volumes(self) -> None:
        """For ever: a round each ROUND_S, a look each LOOK_S. What fails is logged and tried again."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._repeat(self.round, ROUND_S), name="rounds")
            if self._volumes.abilities().limited:
                group.create_task(self._repeat(self.tell_full, LOOK_S), name="fullness")

    async def _repeat(self, work: Callable[[], Awaitable[None]], every_s: float) -> None:
        while True:
            try:
                await work()
            except FlydError as error:
                log.warning("volumes.round_failed", error=error.message)
            await asyncio.sleep(every_s)

    async def round(self) -> None:
        """Everything that is due now."""
        now_s = self._clock.wall_s()
        await self._volumes.tidy()
        await self._remove_destroyed(now_s)
        await self._give_up_copies(now_s)
        for volume in await self._own():
            try:
                await self._look_after(volume, now_s)
            except NotFound:
                pass  # never attached yet: its data is made then
            except FlydError as error:
                log.warning("volumes.failed", volume=volume.id, error=error.message)

    async def tell_full(self) -> None:
        """Put into an app's history which of its volumes has become full, or nearly."""
        for volume in await self._own():
            if not volume.attached_machine:
                continue
            with suppress(NotFound):
                usage = await self._volumes.usage(volume.id)
                if size_gb := grown_gb(volume, usage.used_bytes):
                    usage = await self._extend(volume, size_gb, usage)
                before = self._levels.get(volume.id, Level.ROOMY)
                now = level(before, usage.used_bytes, usage.size_bytes)
                if now > before:
                    await self._tell(volume, KINDS[now], story(now, volume.id, volume.name, volume.size_gb))
                self._levels[volume.id] = now

    async def _extend(self, volume: Volume, size_gb: int, usage: VolumeUsage) -> VolumeUsage:
        """As its settings say; where its host has no room it stays as it is, and being full is told of."""
        try:
            await records.extend(self._kv, volume.app, volume.id, size_gb, entropy=self._entropy)
            await self._volumes.extend(volume.id, size_gb)
        except FlydError as error:
            log.warning("volumes.not_extended", volume=volume.id, error=error.message)
            return usage
        message = f"volume {volume.name} ({volume.id}) has grown by itself: {volume.size_gb} to {size_gb} GB"
        await self._tell(volume, VOLUME_EXTENDED, message)
        return await self._volumes.usage(volume.id)

    async def _tell(self, volume: Volume, kind: str, message: str) -> None:
        at_s = self._clock.wall_s()
        fields = {"volume": volume.id, "host": volume.host, "machine": volume.attached_machine}
        line = Event(at_s=at_s, app=volume.app, source=volume.id, kind=kind, message=message, fields=fields)
        await self._kv.txn(
            (), (Put(keys.event(volume.app, at_s, f"{volume.id}-{kind.rpartition('.')[2]}"), encode(line)),)
        )

    async def _own(self) -> list[Volume]:
        """The volumes of this host, as etcd has them now."""
        listing = await self._kv.list(keys.VOLUMES)
        found = (decode(item.value, Volume) for item in listing.items)
        return [volume for volume in found if volume.host == self._host]

    async def _remove_destroyed(self, now_s: float) -> None:
        """In an order in which a volume that comes back at any moment is never purged.

        What is forgotten is promised no disk any more, and can never come back. So whatever is promised
        is marked as living before the purge, unless it was destroyed too short a time ago to be purged:
        also one that came back, and perhaps was destroyed again, while this went on.
        """
        not_due: list[str] = []
        for destroyed in await records.list_destroyed(self._kv, self._host):
            try:
                await self._volumes.destroy(destroyed.volume.id, destroyed.at_s)
            except FlydError as error:
                log.warning("volumes.not_destroyed", volume=destroyed.volume.id, error=error.message)
                continue
            if destroyed.at_s + records.KEPT_S <= now_s:
                await records.forget(self._kv, destroyed, entropy=self._entropy)
            else:
                not_due.append(destroyed.volume.id)
        for volume_id in await self._promised():
            if volume_id not in not_due:
                with suppress(NotFound):
                    await self._volumes.undestroy(volume_id)
        for volume_id in await self._volumes.purge(now_s - records.KEPT_S):
            log.info("volumes.purged", volume=volume_id)

    async def _promised(self) -> tuple[str, ...]:
        """The volumes that are promised disk here: living ones, and destroyed ones that are kept."""
        stored = await self._kv.get(keys.reservations(self._host))
        return tuple(sorted(decode(stored.value, Reservations).volumes_gb)) if stored is not None else ()

    async def _give_up_copies(self, now_s: float) -> None:
        """Copies of volumes that are no more go the way of destroyed volumes, in KEPT_S.

        So does disk that was promised to a copy which then never came (a flyd died in between).
        """
        here = [held.id for held in await self._volumes.held()]
        kept = sorted(name for name in {*here, *await self._promised()} if is_copy(name))
        if not kept:
            return
        known = await self._living()
        destroyed = await records.list_destroyed(self._kv)
        known += [d.volume.id for d in destroyed]
        known += await self._living()  # one that came back between the two looks is in neither
        given_up = [d.volume.id for d in destroyed if d.volume.host == self._host]
        for copy in kept:
            volume_id = copied_volume(copy)
            if volume_id not in known and copy not in given_up:
                left = Volume(id=copy, name="", app="", region="", host=self._host, size_gb=0)
                await records.give_up_copies(self._kv, left, volume_id, now_s, entropy=self._entropy)
                log.info("volumes.copies_given_up", volume=volume_id)

    async def _living(self) -> list[str]:
        """All volumes of the cluster, by id."""
        return [keys.last_part(item.key) for item in (await self._kv.list(keys.VOLUMES)).items]

    async def _look_after(self, volume: Volume, now_s: float) -> None:
        with suppress(Refused):  # larger already: an extension whose record is not seen yet
            await self._volumes.extend(volume.id, volume.size_gb)
        if not self._volumes.abilities().instant:
            return  # each would be a whole copy: only on demand
        due = plan(await self._volumes.snapshots(volume.id), now_s)
        if due.take:
            made = await self._volumes.snapshot(volume.id, f"daily-{int(now_s)}", now_s, scheduled=True)
            log.info("volumes.snapshot", volume=volume.id, snapshot=made.id)
        for snapshot_id in due.remove:
            await self._volumes.delete_snapshot(volume.id, snapshot_id)
