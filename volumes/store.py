"""A host's volumes: their records, their fence and their life, the same on every back end.

Implements flyd's storage.local.LocalVolumes; one process at a time has a root (flyd's lock sees to that).

Every operation can be repeated, after a crash too (folders.py tells how things are made and removed). A
change of a volume is one record written aside and renamed; the size in the record is the truth, and
`attach` and `tidy` give it to the file system again.

The fence. A claim is (machine, epoch); epochs grow with each attach that is decided in etcd, so of
two claims the one with the greater epoch is the later. This store never goes back:
- older epoch than recorded: `Refused`, whoever asks. A delayed or repeated old operation can not
  take the volume from the machine that has it now.
- the recorded epoch: its own machine may attach again and again (a restart); any other is `Refused`,
  attached or not, for two machines with one epoch are a bug in whoever made the claims.
- newer epoch: it becomes the claim, even while another machine is recorded as attached. It must: the
  old machine may have been destroyed while this host was down, and no detach will ever come. The
  caller answers for the old machine being stopped before it asks (flyd stops it as a logged step);
  the store can not see processes. From then on the old machine is fenced out here.
`detach` speaks of one claim and leaves any other alone, so a late one is harmless.

Each operation is one piece of work in a thread and holds its volume's lock: a caller that is cancelled
does not cut it short. On a back end that must copy, a snapshot or fork of a volume that nobody has
attached holds up its next attach until it is done; that is what keeps it whole.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from msgspec.structs import replace

from flyd.errors import Conflict, FlydError, InvalidInput, NotFound, Refused, Unavailable
from volumes.contract import (
    GB,
    Abilities,
    Held,
    Record,
    Snapshot,
    Space,
    Trees,
    Usage,
    check_id,
    check_size,
    refusal,
)
from volumes.files import check_folder, write_record
from volumes.folders import GONE, NEW, Folders

T = TypeVar("T")
THREADS = 8  # its own: a long copy must not take those of the rest of flyd


class VolumeStore:
    """The volumes below one root directory."""

    def __init__(self, root: Path, trees: Trees) -> None:
        self._folders = Folders(root, trees)
        self._trees = trees
        self._locks: dict[str, threading.Lock] = {}
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="volumes")

    def abilities(self) -> Abilities:
        """What the back end can do on this disk."""
        return self._trees.abilities()

    # ------------------------------------------------------------------ a volume's life

    async def create(self, volume_id: str, size_gb: int) -> None:
        """Make an empty volume; one that exists is left as it is. Refused if it was destroyed."""
        check_id(volume_id)
        check_size(size_gb)
        await self._do(lambda: self._create(volume_id, size_gb))

    async def attach(self, volume_id: str, machine_id: str, epoch: int) -> str:
        """Record the claim and answer the data's path; a claim that is not the latest is `Refused`."""
        check_id(volume_id)
        return await self._do(lambda: self._attach(volume_id, machine_id, epoch))

    async def detach(self, volume_id: str, machine_id: str, epoch: int) -> None:
        """End exactly this claim; if it is not the recorded one, or the volume is gone, nothing happens."""
        check_id(volume_id)

        def detach() -> None:
            with self._held(volume_id), suppress(NotFound):
                record = self._folders.record(volume_id)
                if record.attached and (record.machine_id, record.epoch) == (machine_id, epoch):
                    self._folders.write(volume_id, replace(record, attached=False))

        await self._do(detach)

    async def extend(self, volume_id: str, size_gb: int) -> None:
        """Make it larger, also while a machine uses it; `Refused` if it would shrink."""
        check_id(volume_id)
        check_size(size_gb)

        def extend() -> None:
            with self._held(volume_id):
                record = self._folders.live(volume_id)
                if size_gb < record.size_gb:
                    raise Refused(
                        f"volume {volume_id} has {record.size_gb} GB and can not shrink to {size_gb} GB",
                        hint="Make a smaller volume and copy what it needs.",
                    )
                if size_gb > record.size_gb:
                    self._folders.write(volume_id, replace(record, size_gb=size_gb))
                self._trees.limit(self._folders.data(volume_id), size_gb * GB)

        await self._do(extend)

    async def destroy(self, volume_id: str, at_s: float) -> None:
        """Give it up; it is kept until `purge`. `Refused` while attached, absent is no error."""
        check_id(volume_id)

        def destroy() -> None:
            with self._held(volume_id), suppress(NotFound):
                record = self._folders.record(volume_id)
                if record.attached:
                    raise Refused(
                        f"volume {volume_id} is attached to machine {record.machine_id}",
                        hint=f"destroy the machine first: fly machine destroy {record.machine_id}",
                    )
                if record.destroyed_at_s < at_s:  # also one that came back and was destroyed again
                    self._folders.write(volume_id, replace(record, destroyed_at_s=at_s))

        await self._do(destroy)

    async def undestroy(self, volume_id: str) -> None:
        """Take `destroy` back; NotFound once it is purged."""
        check_id(volume_id)

        def undestroy() -> None:
            with self._held(volume_id):
                record = self._folders.record(volume_id)
                if record.destroyed_at_s:
                    self._folders.write(volume_id, replace(record, destroyed_at_s=0.0))

        await self._do(undestroy)

    async def purge(self, destroyed_before_s: float) -> tuple[str, ...]:
        """Remove for ever what was destroyed before then, with its snapshots; the ids."""
        return await self._do(lambda: self._purge(destroyed_before_s))

    # ------------------------------------------------------------------ copies

    async def snapshot(
        self, volume_id: str, snapshot_id: str, at_s: float, *, scheduled: bool = False
    ) -> Snapshot:
        """Keep the volume as it is now; a snapshot of that id is answered as it is."""
        check_id(volume_id)
        check_id(snapshot_id, "snapshot")
        return await self._do(lambda: self._snapshot(volume_id, snapshot_id, at_s, scheduled))

    async def snapshots(self, volume_id: str) -> tuple[Snapshot, ...]:
        """A volume's snapshots, the oldest first."""
        check_id(volume_id)

        def snapshots() -> tuple[Snapshot, ...]:
            self._folders.record(volume_id)
            found = [
                self._folders.snapshot_record(volume_id, name)
                for name in self._folders.snapshot_names(volume_id)
            ]
            return tuple(sorted(found, key=lambda s: (s.made_at_s, s.id)))

        return await self._do(snapshots)

    async def delete_snapshot(self, volume_id: str, snapshot_id: str) -> None:
        """Remove a snapshot; absent is no error. Volumes made from it do not need it."""
        check_id(volume_id)
        check_id(snapshot_id, "snapshot")

        def delete() -> None:
            with self._held(volume_id):
                self._folders.remove(self._folders.snapshots(volume_id), snapshot_id)

        await self._do(delete)

    async def fork(self, volume_id: str, new_id: str, size_gb: int, snapshot_id: str = "") -> None:
        """A new volume with the contents of another, or of a snapshot, and a claim of nobody.

        `Refused` if it holds more than `size_gb`, or if it is in use and can only be copied; `Conflict`
        if the new id is taken by something else.
        """
        check_id(volume_id)
        check_id(new_id)
        check_size(size_gb)
        if snapshot_id:
            check_id(snapshot_id, "snapshot")
        if volume_id == new_id:
            raise InvalidInput(f"volume {volume_id} can not be forked onto itself")
        await self._do(lambda: self._fork(volume_id, new_id, size_gb, snapshot_id))

    # ------------------------------------------------------------------ what there is

    async def held(self) -> tuple[Held, ...]:
        """The volumes on this disk, destroyed ones too, by id; what is not readable is left out."""
        return await self._do(lambda: tuple(self._folders.held()))

    async def usage(self, volume_id: str) -> Usage:
        """How full a volume is."""
        check_id(volume_id)

        def usage() -> Usage:
            record = self._folders.record(volume_id)
            used_bytes = self._trees.used_bytes(self._folders.data(volume_id))
            return Usage(used_bytes=used_bytes, size_bytes=record.size_gb * GB)

        return await self._do(usage)

    async def space(self) -> Space:
        """The disk below all volumes."""

        def space() -> Space:
            disk = os.statvfs(self._folders.root)
            return Space(total_bytes=disk.f_blocks * disk.f_frsize, free_bytes=disk.f_bavail * disk.f_frsize)

        return await self._do(space)

    async def tidy(self) -> None:
        """Remove what a crash left half made or half removed, and set every limit again."""
        await self._do(self._tidy)

    # ------------------------------------------------------------------ in a thread

    async def _do(self, act: Callable[[], T]) -> T:
        def safely() -> T:
            try:
                return act()
            except OSError as error:
                raise Unavailable(
                    f"the disk of this host's volumes: {error.strerror} ({error.filename or 'a tool'})",
                    hint="`df -h` shows whether it is full. Nothing half-made is used; try again.",
                ) from error

        return await asyncio.get_running_loop().run_in_executor(self._threads, safely)

    @contextmanager
    def _held(self, *volume_ids: str) -> Generator[None]:
        with ExitStack() as stack:
            for volume_id in sorted(volume_ids):  # one order: two forks never wait for each other
                stack.enter_context(self._locks.setdefault(volume_id, threading.Lock()))
            yield

    def _create(self, volume_id: str, size_gb: int) -> None:
        with self._held(volume_id):
            if self._folders.exists(volume_id):
                self._folders.live(volume_id)
                return

            def make(data: Path) -> None:
                self._trees.make(data)
                self._trees.limit(data, size_gb * GB)
                write_record(data.parent / "volume.json", Record(size_gb=size_gb))

            self._folders.build(self._folders.root, volume_id, make)

    def _attach(self, volume_id: str, machine_id: str, epoch: int) -> str:
        with self._held(volume_id):
            record, data = self._folders.live(volume_id), self._folders.data(volume_id)
            if reason := refusal(record, machine_id, epoch):
                raise Refused(
                    f"volume {volume_id} is not given to machine {machine_id} with epoch {epoch}: {reason}",
                    hint="a later claim holds it; `fly volumes list` shows which machine has it",
                )
            claim = replace(record, machine_id=machine_id, epoch=epoch, attached=True)
            if claim != record:
                self._folders.write(volume_id, claim)
            self._trees.limit(data, record.size_gb * GB)
            return str(data)

    def _purge(self, before_s: float) -> tuple[str, ...]:
        purged: list[str] = []
        for seen in self._folders.held():
            with self._held(seen.id), suppress(NotFound):
                record = self._folders.record(seen.id)
                if 0 < record.destroyed_at_s <= before_s:
                    self._folders.remove(self._folders.root, seen.id)
                    purged.append(seen.id)
        return tuple(purged)

    def _snapshot(self, volume_id: str, snapshot_id: str, at_s: float, scheduled: bool) -> Snapshot:
        with self._held(volume_id):
            record, data, folder = (
                self._folders.live(volume_id),
                self._folders.data(volume_id),
                self._folders.snapshots(volume_id),
            )
            with suppress(NotFound):
                return self._folders.snapshot_record(volume_id, snapshot_id)
            with suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            made: list[Snapshot] = []

            def make(copy: Path) -> None:
                self._trees.copy(data, copy, writable=False)
                snapshot = Snapshot(
                    id=snapshot_id,
                    made_at_s=at_s,
                    size_gb=record.size_gb,
                    used_bytes=self._trees.used_bytes(copy),
                    scheduled=scheduled,
                    consistent=not record.attached or self._trees.abilities().atomic,
                )
                write_record(copy.parent / "snapshot.json", snapshot)
                made.append(snapshot)

            self._folders.build(folder, snapshot_id, make)
            return made[0]

    def _fork(self, volume_id: str, new_id: str, size_gb: int, snapshot_id: str) -> None:
        origin = f"{volume_id}@{snapshot_id}" if snapshot_id else volume_id
        with self._held(volume_id, new_id):
            if self._folders.exists(new_id):
                there = self._folders.record(new_id)
                if there.origin != origin:
                    raise Conflict(f"volume {new_id} exists and was not made from {origin}")
                return
            record, source = self._folders.record(volume_id), self._folders.data(volume_id)
            if snapshot_id:
                self._folders.snapshot_record(volume_id, snapshot_id)
                source = self._folders.snapshots(volume_id) / snapshot_id / "data"
                check_folder(source, f"snapshot {snapshot_id} of volume {volume_id}")
            elif record.attached and not self._trees.abilities().atomic:
                raise Refused(
                    f"volume {volume_id} is in use by machine {record.machine_id}, and this host's disk can "
                    "only copy it file by file: the copy would be of no one instant",
                    hint="Destroy the machine first, or fork a snapshot.",
                )

            def make(data: Path) -> None:
                self._trees.copy(source, data, writable=True)
                used_bytes = self._trees.used_bytes(data)
                if used_bytes > size_gb * GB:
                    raise Refused(
                        f"{origin} holds {used_bytes / GB:.2f} GB and does not fit into {size_gb} GB",
                        hint=f"Give the new volume {-(-used_bytes // GB)} GB or more.",
                    )
                self._trees.limit(data, size_gb * GB)
                write_record(data.parent / "volume.json", Record(size_gb=size_gb, origin=origin))

            self._folders.build(self._folders.root, new_id, make)

    def _tidy(self) -> None:
        for name in sorted(os.listdir(self._folders.root)):
            for mark in (NEW, GONE):
                if name.startswith(mark):
                    with self._held(name.removeprefix(mark)):
                        self._folders.clear(self._folders.root / name)
        for volume in self._folders.held():
            with self._held(volume.id), suppress(FlydError):  # one that is damaged says so when it is used
                folder = self._folders.snapshots(volume.id)
                for name in sorted(os.listdir(folder)) if folder.exists() else ():
                    if name.startswith((NEW, GONE)):
                        self._folders.clear(folder / name)
                self._trees.limit(self._folders.data(volume.id), self._folders.record(volume.id).size_gb * GB)
        self._trees.tidy(self._folders.root)
