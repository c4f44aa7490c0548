"""What a host can do with the volumes on its own disks: the contract, besides ports.VolumeStore.

Implemented by volumes/store.py on every back end and chosen by flyd/daemon.py; used by the API of the
volume's host and by keeper.py. The conformance suite is tests/conformance/test_volumes.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from flyd.ports import VolumeStore


class VolumeAbilities(Protocol):
    """What a host's back end can do."""

    @property
    def limited(self) -> bool:
        """A volume can not hold more than its size."""
        ...

    @property
    def instant(self) -> bool:
        """Snapshots and forks share their data: nothing is copied, whatever the size."""
        ...

    @property
    def atomic(self) -> bool:
        """A snapshot of a volume in use shows one instant of it."""
        ...


class VolumeSnapshot(Protocol):
    """A volume as it was."""

    @property
    def id(self) -> str:
        """Unique on the volume."""
        ...

    @property
    def made_at_s(self) -> float:
        """Seconds since the epoch."""
        ...

    @property
    def size_gb(self) -> int:
        """The volume's size then."""
        ...

    @property
    def used_bytes(self) -> int:
        """What it holds: a volume made from it must be at least that large."""
        ...

    @property
    def scheduled(self) -> bool:
        """Made by the schedule, which removes it again."""
        ...

    @property
    def consistent(self) -> bool:
        """Whether it shows one instant."""
        ...


class HeldVolume(Protocol):
    """A volume on this host's disk, whatever etcd says of it."""

    @property
    def id(self) -> str:
        """Its name there."""
        ...


class VolumeUsage(Protocol):
    """How full a volume is."""

    @property
    def used_bytes(self) -> int:
        """What it holds."""
        ...

    @property
    def size_bytes(self) -> int:
        """What it may hold."""
        ...


class StreamPiece(Protocol):
    """A piece of a snapshot's stream; the last has no data but the checksum of the whole."""

    @property
    def offset_bytes(self) -> int:
        """Where in the stream it belongs."""
        ...

    @property
    def data(self) -> bytes:
        """Empty: the end."""
        ...

    @property
    def sha256(self) -> str:
        """Of the whole stream, in hex: with the end."""
        ...


class LocalVolumes(VolumeStore, Protocol):
    """All that a host can do with its volumes (volumes/store.py). Every call can be repeated."""

    def abilities(self) -> VolumeAbilities:
        """What the back end can do on this disk."""
        ...

    async def extend(self, volume_id: str, size_gb: int) -> None:
        """Make it larger while it is used; `Refused` if it would shrink."""
        ...

    async def destroy(self, volume_id: str, at_s: float) -> None:
        """Give it up; kept until `purge`. `Refused` while attached, absent is no error."""
        ...

    async def undestroy(self, volume_id: str) -> None:
        """Take `destroy` back; NotFound once it is purged."""
        ...

    async def purge(self, destroyed_before_s: float) -> tuple[str, ...]:
        """Remove for ever what was destroyed before then; the ids."""
        ...

    async def snapshot(
        self, volume_id: str, snapshot_id: str, at_s: float, *, scheduled: bool = False
    ) -> VolumeSnapshot:
        """Keep the volume as it is now; a snapshot of that id is answered as it is."""
        ...

    async def snapshots(self, volume_id: str) -> Sequence[VolumeSnapshot]:
        """A volume's snapshots, the oldest first."""
        ...

    async def delete_snapshot(self, volume_id: str, snapshot_id: str) -> None:
        """Remove a snapshot; absent is no error."""
        ...

    async def fork(self, volume_id: str, new_id: str, size_gb: int, snapshot_id: str = "") -> None:
        """A new volume with the contents of another, or of its snapshot; `Refused` if it does not fit."""
        ...

    def send(
        self, volume_id: str, snapshot_id: str, parent_id: str = "", skip_bytes: int = 0
    ) -> AsyncIterator[StreamPiece]:
        """A snapshot as a stream, from `skip_bytes` on; with `parent_id` what differs from that one."""
        ...

    async def arrived_bytes(self, volume_id: str, snapshot_id: str, parent_id: str = "") -> int:
        """How much of a stream has come already."""
        ...

    async def receive(
        self,
        volume_id: str,
        snapshot_id: str,
        parts: AsyncIterator[StreamPiece],
        *,
        parent_id: str = "",
        made_at_s: float,
        size_gb: int,
        consistent: bool = True,
    ) -> VolumeSnapshot:
        """Make a snapshot of a stream: all of it, or nothing (`Refused`, Unavailable)."""
        ...

    async def digest(self, volume_id: str, snapshot_id: str = "") -> str:
        """The checksum of all files of a volume, or of a snapshot; the same on every back end."""
        ...

    async def usage(self, volume_id: str) -> VolumeUsage:
        """How full a volume is."""
        ...

    async def held(self) -> Sequence[HeldVolume]:
        """What is on this disk, destroyed ones too."""
        ...

    async def tidy(self) -> None:
        """Remove what a crash left half made or half removed, and set every limit again."""
        ...
