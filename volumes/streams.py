"""Snapshots as streams: from one host's store into another's. The store with all it can do.

A stream is gathered in a file beside the snapshots and turned into a tree only once all of it is there and
its checksum is right: one that is cut short goes on later from where it was, and one that is not what was
sent leaves nothing. That costs the stream's size on the receiving disk for a while.

    <root>/<volume>/snapshots/.part-<snapshot>-<parent>    what has come so far
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from pathlib import Path

from msgspec.structs import replace

from flyd.errors import FlydError, NotFound, Refused, Unavailable
from volumes.contract import Piece, Snapshot, StreamPart, check_id
from volumes.files import check_folder, write_record
from volumes.store import VolumeStore
from volumes.trees import digest

PART = ".part-"
RESERVE_PART = 0.03  # of the disk: a stream must not take the room that records are written with
GOES_ON_HINT = "Nothing half-made is used; the next attempt goes on from what has arrived."


class StreamStore(VolumeStore):
    """The volumes below one root directory, and their ways to and from other hosts."""

    async def send(
        self, volume_id: str, snapshot_id: str, parent_id: str = "", skip_bytes: int = 0
    ) -> AsyncGenerator[StreamPart]:
        """A snapshot's stream from `skip_bytes` on; with `parent_id` only what differs from that one.

        The last part has the checksum of the whole stream. Unavailable if a tool fails on the way.
        """
        source = await self._do(lambda: self._snapshot_data(volume_id, snapshot_id))
        parent = await self._do(lambda: self._snapshot_data(volume_id, parent_id)) if parent_id else None
        pieces, total, at = self._trees.send(source, parent), hashlib.sha256(), 0

        def next_piece() -> bytes:
            piece = next(pieces, b"")
            total.update(piece)
            return piece

        try:
            while piece := await self._do(next_piece):
                begin = max(0, skip_bytes - at)
                if begin < len(piece):
                    yield StreamPart(offset_bytes=at + begin, data=piece[begin:])
                at += len(piece)
            yield StreamPart(offset_bytes=at, sha256=total.hexdigest())
        finally:
            pieces.close()

    async def arrived_bytes(self, volume_id: str, snapshot_id: str, parent_id: str = "") -> int:
        """How much of a stream has come already."""
        part = self._part(volume_id, snapshot_id, parent_id)
        return await self._do(lambda: part.stat().st_size if part.exists() else 0)

    async def receive(
        self,
        volume_id: str,
        snapshot_id: str,
        parts: AsyncIterator[Piece],
        *,
        parent_id: str = "",
        made_at_s: float,
        size_gb: int,
        consistent: bool = True,
    ) -> Snapshot:
        """Make the snapshot that a stream is of; one that is here already is answered as it is.

        `Refused`, with nothing kept, if the stream is not what was sent; Unavailable if it was cut short
        (what came is kept) or the disk has no room for it (nothing is).
        """
        snapshot = Snapshot(
            id=snapshot_id, made_at_s=made_at_s, size_gb=size_gb, used_bytes=0, consistent=consistent
        )
        check_id(snapshot.id, "snapshot")
        with suppress(NotFound):
            return await self._do(lambda: self._folders.snapshot_record(volume_id, snapshot.id))
        part = await self._do(lambda: self._begin(volume_id, snapshot.id, parent_id))
        gathering = await self._do(lambda: _Gathering(part))
        try:
            async for piece in parts:
                await self._do(lambda piece=piece: gathering.add(piece))
        finally:
            gathering.close()
        gathering.check_whole()
        return await self._do(lambda: self._apply(volume_id, snapshot, parent_id, part))

    async def digest(self, volume_id: str, snapshot_id: str = "") -> str:
        """The sha256 (hex) of all files of a volume, or of a snapshot; the same on every back end."""
        if snapshot_id:
            return await self._do(lambda: digest(self._snapshot_data(volume_id, snapshot_id)))
        check_id(volume_id)
        return await self._do(lambda: digest(self._folders.data(volume_id)))

    def _snapshot_data(self, volume_id: str, snapshot_id: str) -> Path:
        check_id(volume_id)
        check_id(snapshot_id, "snapshot")
        self._folders.snapshot_record(volume_id, snapshot_id)
        data = self._folders.snapshots(volume_id) / snapshot_id / "data"
        check_folder(data, f"snapshot {snapshot_id} of volume {volume_id}")
        return data

    def _part(self, volume_id: str, snapshot_id: str, parent_id: str) -> Path:
        check_id(volume_id)
        check_id(snapshot_id, "snapshot")
        if parent_id:
            check_id(parent_id, "snapshot")
        return self._folders.snapshots(volume_id) / f"{PART}{snapshot_id}-{parent_id or 'all'}"

    def _begin(self, volume_id: str, snapshot_id: str, parent_id: str) -> Path:
        """Where the stream is gathered; what is there of any other stream of the volume goes."""
        part = self._part(volume_id, snapshot_id, parent_id)
        self._folders.live(volume_id)
        if parent_id:
            self._snapshot_data(volume_id, parent_id)
        with suppress(FileExistsError):
            part.parent.mkdir(mode=0o700)
        for name in os.listdir(part.parent):
            if name.startswith(PART) and name != part.name:
                (part.parent / name).unlink()
        return part

    def _apply(self, volume_id: str, snapshot: Snapshot, parent_id: str, part: Path) -> Snapshot:
        made: list[Snapshot] = []
        with self._held(volume_id):
            folder = self._folders.snapshots(volume_id)
            parent = self._snapshot_data(volume_id, parent_id) if parent_id else None

            def make(data: Path) -> None:
                try:
                    check_room(data.parent, part.stat().st_size)
                    self._trees.receive(part, parent, data)
                except FlydError:
                    part.unlink()  # the tool does not take it, or there is no room: again from the start
                    raise
                made.append(replace(snapshot, used_bytes=self._trees.used_bytes(data)))
                write_record(data.parent / "snapshot.json", made[0])

            self._folders.build(folder, snapshot.id, make)
            part.unlink()
        return made[0]


class _Gathering:
    """One stream on its way into a file. Used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._total = hashlib.sha256()
        self._size = 0
        self._whole = False
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b")
        while piece := self._file.read(1 << 20):
            self._total.update(piece)
            self._size += len(piece)

    def add(self, part: Piece) -> None:
        """The next piece; Refused if it is another, or if the whole is not what was sent."""
        if part.offset_bytes != self._size or self._whole:
            self._refuse(f"a piece at {part.offset_bytes} came, {self._size} was next")
        if part.sha256:
            if part.sha256 != self._total.hexdigest():
                self._refuse("its checksum is wrong")
            self._whole = True
            return
        try:
            check_room(self._path.parent, len(part.data))
        except Unavailable:
            self._path.unlink()
            raise
        self._file.write(part.data)
        self._total.update(part.data)
        self._size += len(part.data)

    def check_whole(self) -> None:
        """Unavailable if its end has not come."""
        if not self._whole:
            raise Unavailable(f"a volume's stream ended after {self._size} bytes", hint=GOES_ON_HINT)

    def close(self) -> None:
        """What was written so far is in the file."""
        self._file.close()

    def _refuse(self, why: str) -> None:
        self._path.unlink(missing_ok=True)
        raise Refused(
            f"a volume's stream is not what was sent: {why}",
            hint="Nothing of it is kept. If it happens again, look at the disks and memory of both hosts.",
        )


def check_room(folder: Path, more_bytes: int) -> None:
    """Unavailable if the disk would not keep its reserve."""
    disk = os.statvfs(folder)
    left = disk.f_bavail * disk.f_frsize - more_bytes
    if left < disk.f_blocks * disk.f_frsize * RESERVE_PART:
        raise Unavailable(
            f"the disk of this host's volumes has no room for {more_bytes >> 20} MB more",
            hint="`df -h` shows it; `fly volumes list --all` shows what is there.",
        )
