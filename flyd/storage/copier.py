"""The loop that has a host's volumes copied to other hosts, as each volume's settings say.

Started by the daemon on every host, for the volumes that are its own. It makes a snapshot and asks the
other host to fetch it (receiver.py); that host writes the record once it has all. So this loop keeps nothing:
a flyd that dies anywhere begins again with what the records say. Decides nothing itself: copies.py.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import structlog

from flyd.errors import FlydError, NotFound, Unplaceable
from flyd.model import Event, Host, Reservations, Value, Volume, encode
from flyd.placement.index import free_capacity
from flyd.ports import KV, Clock, Put
from flyd.storage.copies import (
    COPY_BYTES_PER_S,
    SNAPSHOT_PREFIX,
    VolumeCopy,
    copies_prefix,
    copy_id,
    plan_copies,
)
from flyd.storage.local import LocalVolumes, VolumeSnapshot
from flyd.store import keys
from flyd.store.mirror import Mirror

log = structlog.get_logger(__name__)

LOOK_S = 2.0
AGAIN_S = 30.0  # after a failure
COPY_FAILED = "volume.copy_failed"
COPIED_AGAIN = "volume.copied_again"


class CopyOrder(Value, frozen=True, kw_only=True):
    """What a host is asked to fetch and keep."""

    app: str
    volume: str
    source: str
    snapshot: str
    made_at_s: float
    size_gb: int
    consistent: bool
    parents: tuple[str, ...] = ()  # what the source has besides
    max_bytes_per_s: int = 0


class CopyPeers(Protocol):
    """The other hosts' flyds."""

    async def keep_copy(self, host: str, order: CopyOrder) -> int:
        """Have a host fetch a snapshot and keep it; how many bytes that moved."""
        ...


class VolumeCopier:
    """One host's."""

    def __init__(
        self,
        host: str,
        kv: KV,
        mirror: Mirror,
        volumes: LocalVolumes,
        peers: CopyPeers,
        *,
        clock: Clock,
    ) -> None:
        self._host = host
        self._kv = kv
        self._mirror = mirror
        self._volumes = volumes
        self._peers = peers
        self._clock = clock
        self._not_before_s: dict[str, float] = {}  # monotonic, by volume: after a failure
        self._failing: dict[str, None] = {}  # volumes of which it was told that copies fail

    async def keep_copying(self) -> None:
        """For ever, one volume after the other. What fails is logged and tried again in AGAIN_S."""
        await self._mirror.wait_synced()
        while True:
            await self.round()
            await asyncio.sleep(LOOK_S)

    async def round(self) -> None:
        """Every copy that is due now."""
        for item in self._mirror.list(keys.VOLUMES, Volume):
            volume = item.value
            if volume.host != self._host or not volume.replicas:
                continue
            if self._not_before_s.get(volume.id, 0.0) > self._clock.monotonic_s():
                continue
            try:
                await self._copy_due(volume)
            except NotFound:
                pass  # no machine has used it yet: there is nothing to lose
            except FlydError as error:
                log.warning("volumes.copy_failed", volume=volume.id, error=error.message)
                self._not_before_s[volume.id] = self._clock.monotonic_s() + AGAIN_S
                await self._tell(volume, error.message)
            else:
                await self._tell(volume, "")

    async def copy_to(self, volume: Volume, target: str) -> int:
        """Bring the volume to a host as fast as it goes, as it is or lately was; how many bytes that moved.

        A stream that was cut short goes on. The snapshots of earlier copies go.
        """
        copies = [i.value for i in self._mirror.list(copies_prefix(volume), VolumeCopy)]
        now_s = self._clock.wall_s()
        snapshot = await self._unfinished(volume, copies, now_s) or await self._take(volume)
        await self._remove_old(volume, copies)
        return await self._copy(volume, snapshot, target, 0)

    async def copy_now(self, volume: Volume, target: str) -> tuple[str, int]:
        """Bring the volume to a host as it is at this moment; the snapshot and how many bytes that moved."""
        snapshot = await self._take(volume)
        return snapshot.id, await self._copy(volume, snapshot, target, 0)

    async def _copy_due(self, volume: Volume) -> None:
        copies = [i.value for i in self._mirror.list(copies_prefix(volume), VolumeCopy)]
        now_s = self._clock.wall_s()
        begun = self._begun(volume)
        plan = plan_copies(volume, copies, self._alive(), self._free_gb(), now_s, begun)
        if not plan.due:
            if plan.lacking:
                raise Unplaceable(plan.lacking, {})
            return
        snapshot = await self._unfinished(volume, copies, now_s) or await self._take(volume)
        await self._remove_old(volume, copies)
        for target in plan.due:
            moved = await self._copy(volume, snapshot, target, COPY_BYTES_PER_S)
            log.info("volumes.copied", volume=volume.id, to=target, moved_bytes=moved)
        if plan.lacking:
            raise Unplaceable(plan.lacking, {})

    async def _tell(self, volume: Volume, failure: str) -> None:
        """Put into the app's history that copies fail, and that they are made again: each once."""
        known = volume.id in self._failing
        if bool(failure) == known:
            return
        kind = COPY_FAILED if failure else COPIED_AGAIN
        message = f"no copy of volume {volume.name} ({volume.id}) could be made: {failure}"
        if not failure:
            message = f"volume {volume.name} ({volume.id}) is copied again"
        at_s = self._clock.wall_s()
        fields = {"volume": volume.id, "host": volume.host}
        line = Event(at_s=at_s, app=volume.app, source=volume.id, kind=kind, message=message, fields=fields)
        try:
            await self._kv.txn((), (Put(keys.event(volume.app, at_s, volume.id), encode(line)),))
        except FlydError as error:
            log.warning("volumes.not_told", volume=volume.id, error=error.message)
            return
        if failure:
            self._failing[volume.id] = None
        else:
            del self._failing[volume.id]

    async def _unfinished(
        self, volume: Volume, copies: list[VolumeCopy], now_s: float
    ) -> VolumeSnapshot | None:
        """One that was taken for a copy and has not come whole: the stream goes on, if it is not too old."""
        own = [s for s in await self._volumes.snapshots(volume.id) if s.id.startswith(SNAPSHOT_PREFIX)]
        told = max((copy.made_at_s for copy in copies), default=0.0)
        fresh = [s for s in own if s.made_at_s > told and 0 <= now_s - s.made_at_s < volume.copy_every_s]
        return fresh[-1] if fresh else None

    async def _take(self, volume: Volume) -> VolumeSnapshot:
        """A new one, whatever the clock says: never an old one of the same name."""
        now_s = self._clock.wall_s()
        names = [s.id for s in await self._volumes.snapshots(volume.id)]
        number = sum(name.startswith(f"{SNAPSHOT_PREFIX}{now_s:.3f}") for name in names)
        return await self._volumes.snapshot(volume.id, f"{SNAPSHOT_PREFIX}{now_s:.3f}-{number}", now_s)

    async def _copy(self, volume: Volume, snapshot: VolumeSnapshot, target: str, max_bytes_per_s: int) -> int:
        parents = [s.id for s in await self._volumes.snapshots(volume.id) if s.id != snapshot.id]
        order = CopyOrder(
            app=volume.app,
            volume=volume.id,
            source=self._host,
            snapshot=snapshot.id,
            made_at_s=snapshot.made_at_s,
            size_gb=volume.size_gb,
            consistent=snapshot.consistent,
            parents=tuple(parents),
            max_bytes_per_s=max_bytes_per_s,
        )
        return await self._peers.keep_copy(target, order)

    async def _remove_old(self, volume: Volume, copies: list[VolumeCopy]) -> None:
        """Of its own snapshots the newest stays, and what another host's copy is: the next begins there."""
        needed = {copy.snapshot: None for copy in copies}
        own = [s.id for s in await self._volumes.snapshots(volume.id) if s.id.startswith(SNAPSHOT_PREFIX)]
        for snapshot_id in own[:-1]:
            if snapshot_id not in needed:
                await self._volumes.delete_snapshot(volume.id, snapshot_id)

    def _alive(self) -> list[Host]:
        hosts = [item.value for item in self._mirror.list(keys.HOSTS, Host)]
        return [host for host in hosts if self._mirror.get(keys.alive(host.name), bool) is not None]

    def _begun(self, volume: Volume) -> tuple[str, ...]:
        """The hosts on which disk is promised to its copies."""
        promised = (item.value for item in self._mirror.list(keys.RESERVATIONS, Reservations))
        return tuple(held.host for held in promised if copy_id(volume.id) in held.volumes_gb)

    def _free_gb(self) -> dict[str, int]:
        free: dict[str, int] = {}
        for item in self._mirror.list(keys.HOSTS, Host):
            promised = self._mirror.get(keys.reservations(item.value.name), Reservations)
            held = promised.value if promised else Reservations(host=item.value.name)
            free[item.value.name] = free_capacity(item.value, held).disk_gb
        return free
