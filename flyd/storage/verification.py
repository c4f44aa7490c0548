"""Shows that a volume could be restored: by restoring it, on the host that has the copy.

A snapshot becomes a scratch volume as it would become a real one, each file of that is read, and the
checksum is compared with that of the snapshot which the volume's own host still has: a copy is held against
what it was made from. The scratch volume goes at once; one that a crash left goes with the next verification.
The history tells of each, and the copy's record has when it was and why it failed. Called by the API of the
host that restores, and by VolumeVerifier for volumes whose owners want it regularly.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog
from msgspec.structs import replace

from flyd.errors import FlydError, Refused, Unavailable
from flyd.model import Event, Value, Volume, decode, encode
from flyd.ports import KV, Clock, Put, Unchanged
from flyd.storage.copies import VolumeCopy, copies_prefix, copy_id, is_copy, verify_due
from flyd.storage.local import LocalVolumes, VolumeSnapshot
from flyd.store import keys
from flyd.store.mirror import Mirror

log = structlog.get_logger(__name__)

LOOK_S = 30.0

VOLUME_VERIFIED = "volume.verified"
VOLUME_NOT_VERIFIED = "volume.not_verified"
BEFORE_ALL_S = 1.0  # a time at which nothing else was destroyed: scratch volumes are purged by it

Digest = Callable[[str, str, str], Awaitable[str]]
"""The checksum of a snapshot on another host: host, volume, snapshot."""


class Verified(Value, frozen=True, kw_only=True):
    """What was restored, and found to be what it should."""

    host: str
    snapshot: str
    data_at_s: float
    sha256: str
    compared_with: str


class Verification:
    """One host's."""

    def __init__(
        self,
        host: str,
        kv: KV,
        volumes: LocalVolumes,
        digest: Digest,
        *,
        clock: Clock,
        scratch: str = "verify",
    ) -> None:
        """`scratch`: how its scratch volumes' names begin; two that work side by side need two."""
        self._scratch = scratch
        self._host = host
        self._kv = kv
        self._volumes = volumes
        self._digest = digest
        self._clock = clock

    async def verify(self, volume: Volume, on_disk: str) -> Verified:
        """Restore the newest snapshot of `on_disk`, the volume or its copies; Refused if it differs."""
        try:
            found = await self._verify(volume, on_disk)
        except FlydError as error:
            await self._tell(volume, VOLUME_NOT_VERIFIED, f"not restored: {error.message}")
            if is_copy(on_disk):
                await self._record(volume, error.message)
            raise
        age_s = self._clock.wall_s() - found.data_at_s
        message = (
            f"{found.snapshot}, {age_s:.0f} s old, was restored on {found.host}; every file is as it was"
        )
        await self._tell(volume, VOLUME_VERIFIED, message)
        if is_copy(on_disk):
            await self._record(volume, "")
        return found

    async def _record(self, volume: Volume, error: str) -> None:
        """In the copy's record; should a newer copy be told of right now, the next trial says it."""
        record = await self._kv.get(keys.volume_copy(volume.app, volume.id, self._host))
        if record is not None:
            copy = decode(record.value, VolumeCopy)
            told = replace(copy, verified_at_s=self._clock.wall_s(), verify_error=error)
            unchanged = Unchanged(record.key, record.mod_revision)
            await self._kv.txn((unchanged,), (Put(record.key, encode(told)),))

    async def _verify(self, volume: Volume, on_disk: str) -> Verified:
        snapshots = await self._volumes.snapshots(on_disk)
        if not snapshots:
            raise Unavailable(
                f"volume {volume.id} has no snapshot to restore",
                hint=f"`fly volumes snapshots create {volume.id}` makes one.",
            )
        newest = snapshots[-1]
        restored = await self._restored(volume, on_disk, newest)
        compared_with, wanted = await self._wanted(volume, on_disk, newest)
        if restored != wanted:
            raise Refused(
                f"what was restored of volume {volume.id} from {newest.id} on {self._host} is not what "
                f"{compared_with} has: {restored[:12]}, not {wanted[:12]}",
                hint="Do not rely on this copy. Look at the disks and memory of both hosts.",
            )
        return Verified(
            host=self._host,
            snapshot=newest.id,
            data_at_s=newest.made_at_s,
            sha256=restored,
            compared_with=compared_with,
        )

    async def _restored(self, volume: Volume, on_disk: str, snapshot: VolumeSnapshot) -> str:
        scratch = f"{self._scratch}-{volume.id}"
        await self._remove(scratch)
        try:
            await self._volumes.fork(on_disk, scratch, max(volume.size_gb, snapshot.size_gb), snapshot.id)
            return await self._volumes.digest(scratch)
        finally:
            await self._remove(scratch)

    async def _remove(self, scratch: str) -> None:
        await self._volumes.destroy(scratch, BEFORE_ALL_S)
        await self._volumes.purge(BEFORE_ALL_S)

    async def _wanted(self, volume: Volume, on_disk: str, snapshot: VolumeSnapshot) -> tuple[str, str]:
        """The checksum that it should have, and who says so."""
        if volume.host != self._host:
            try:
                return volume.host, await self._digest(volume.host, volume.id, snapshot.id)
            except FlydError:
                pass  # the host is lost, or has removed the snapshot: the copy itself is what there is
        return self._host, await self._volumes.digest(on_disk, snapshot.id)

    async def _tell(self, volume: Volume, kind: str, message: str) -> None:
        at_s = self._clock.wall_s()
        fields = {"volume": volume.id, "host": self._host}
        line = Event(at_s=at_s, app=volume.app, source=volume.id, kind=kind, message=message, fields=fields)
        await self._kv.txn((), (Put(keys.event(volume.app, at_s, volume.id), encode(line)),))


class VolumeVerifier:
    """Restores, as often as their owners want it, the copies on this host that are their volumes' newest."""

    def __init__(self, host: str, mirror: Mirror, verification: Verification, *, clock: Clock) -> None:
        self._host = host
        self._mirror = mirror
        self._verification = verification
        self._clock = clock

    async def keep_verifying(self) -> None:
        """For ever, one volume after the other."""
        await self._mirror.wait_synced()
        while True:
            await self.round()
            await asyncio.sleep(LOOK_S)

    async def round(self) -> None:
        """Every trial that is due now; one that fails is told of, and comes again when it is due again."""
        for volume in [item.value for item in self._mirror.list(keys.VOLUMES, Volume)]:
            copies = [item.value for item in self._mirror.list(copies_prefix(volume), VolumeCopy)]
            if verify_due(volume, copies, self._host, self._clock.wall_s()):
                try:
                    await self._verification.verify(volume, copy_id(volume.id))
                except FlydError as error:
                    log.warning("volumes.not_verified", volume=volume.id, error=error.message)
