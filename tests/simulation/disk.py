"""A host's volumes as its disk has them, and the port through which flyd sees them.

Owned by driver.py's `Hardware`: what is here survives power cuts (the real store syncs each change).
Every operation takes time, and its effect happens somewhere within that time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import msgspec

from flyd.errors import NotFound, Refused


class KeptSnapshot(msgspec.Struct, frozen=True):
    """A volume as it was."""

    id: str
    made_at_s: float
    size_gb: int
    content: tuple[int, ...]
    used_bytes: int = 1
    scheduled: bool = False
    consistent: bool = True


class Attachment(msgspec.Struct):
    """What the disk knows of a volume: its newest epoch, whose that is, and whether it still has it."""

    claimant: str = ""
    epoch: int = 0
    held: bool = False
    destroyed_at_s: float = 0.0  # 0: it lives
    content: tuple[int, ...] = ()  # what was written, in order (mounts.py)
    snapshots: dict[str, KeptSnapshot] = {}
    arrived: dict[str, bytes] = {}  # of streams that are not whole yet

    @property
    def machine(self) -> str:
        """Who has it now; empty: nobody."""
        return self.claimant if self.held else ""


class SimulatedVolumes:
    """ports.VolumeStore, and what flyd/storage/keeper.py needs, on one host's disk.

    `purged` learns the ids of volumes whose data is gone for ever.
    """

    def __init__(
        self, volumes: dict[str, Attachment], purged: list[str], work: Callable[[], Awaitable[None]]
    ) -> None:
        self._volumes = volumes
        self._purged = purged
        self._work = work

    def abilities(self) -> Any:
        """No limits and no snapshots, like directories."""
        return SimpleNamespace(limited=False, instant=False, atomic=False)

    async def create(self, volume_id: str, size_gb: int) -> None:
        await self._work()
        if volume_id in self._volumes:
            self._live(volume_id)
        self._volumes.setdefault(volume_id, Attachment())
        await self._work()

    async def attach(self, volume_id: str, machine_id: str, epoch: int) -> str:
        await self._work()
        volume = self._live(volume_id)
        if epoch < volume.epoch or (epoch == volume.epoch and volume.claimant not in ("", machine_id)):
            raise Refused(f"volume {volume_id} is {volume.claimant}'s claim with epoch {volume.epoch}")
        volume.claimant, volume.epoch, volume.held = machine_id, epoch, True
        await self._work()
        return f"/volumes/{volume_id}"

    async def detach(self, volume_id: str, machine_id: str, epoch: int) -> None:
        await self._work()
        volume = self._volumes.get(volume_id)
        if volume is not None and (volume.claimant, volume.epoch) == (machine_id, epoch):
            volume.held = False
        await self._work()

    async def extend(self, volume_id: str, size_gb: int) -> None:
        await self._work()
        self._live(volume_id)

    async def destroy(self, volume_id: str, at_s: float) -> None:
        await self._work()
        volume = self._volumes.get(volume_id)
        if volume is not None and volume.machine:
            raise Refused(f"volume {volume_id} is attached to {volume.machine}")
        if volume is not None and volume.destroyed_at_s < at_s:
            volume.destroyed_at_s = at_s
        await self._work()

    async def undestroy(self, volume_id: str) -> None:
        await self._work()
        self._there(volume_id).destroyed_at_s = 0.0
        await self._work()

    async def purge(self, destroyed_before_s: float) -> tuple[str, ...]:
        await self._work()
        gone = tuple(
            v for v, a in sorted(self._volumes.items()) if 0 < a.destroyed_at_s <= destroyed_before_s
        )
        for volume_id in gone:
            del self._volumes[volume_id]
            self._purged.append(volume_id)
        await self._work()
        return gone

    async def held(self) -> list[Any]:
        await self._work()
        return [SimpleNamespace(id=volume_id) for volume_id in sorted(self._volumes)]

    async def tidy(self) -> None:
        await self._work()

    def _there(self, volume_id: str) -> Attachment:
        volume = self._volumes.get(volume_id)
        if volume is None:
            raise NotFound(f"volume {volume_id} is not here")
        return volume

    def _live(self, volume_id: str) -> Attachment:
        volume = self._there(volume_id)
        if volume.destroyed_at_s:
            raise NotFound(f"volume {volume_id} is destroyed, and only kept for a while")
        return volume
