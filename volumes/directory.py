"""Volumes as plain directories: works on any file system, without root.

    <root>/<volume id>/
        data/          what the machine sees
        volume.json    size, and the newest claim: which machine, with which epoch, attached or not

Implements flyd's ports.VolumeStore; called by the host's machine operations. It imports nothing of
flyd but its errors.

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

Each change is on disk (written aside, fsynced, renamed) before a call answers. What it can not do:
limit a volume's size; `size_gb` is written down and shown, not enforced.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from pathlib import Path

import msgspec

from flyd.errors import InvalidInput, NotFound, Refused

_VOLUME_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """volume.json."""

    size_gb: int
    machine_id: str = ""
    epoch: int = 0
    attached: bool = False


class DirectoryVolumes:
    """The volumes below one root directory."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._lock = asyncio.Lock()
        self._root.mkdir(mode=0o711, parents=True, exist_ok=True)

    async def create(self, volume_id: str, size_gb: int) -> None:
        """Make an empty volume; one that exists is left as it is."""
        path = self._path(volume_id)
        async with self._lock:
            await asyncio.to_thread(self._create, path, size_gb)

    async def attach(self, volume_id: str, machine_id: str, epoch: int) -> str:
        """Record the claim and answer the data's path; a claim that is not the latest is `Refused`."""
        path = self._path(volume_id)
        async with self._lock:
            record = _read(path)
            reason = _refusal(record, machine_id, epoch)
            if reason:
                raise Refused(
                    f"volume {volume_id} is not given to machine {machine_id} with epoch {epoch}: {reason}",
                    hint="a later claim holds it; `fly volumes list` shows which machine has it",
                )
            claim = msgspec.structs.replace(record, machine_id=machine_id, epoch=epoch, attached=True)
            if claim != record:
                await asyncio.to_thread(_write, path, claim)
        return str(path / "data")

    async def detach(self, volume_id: str, machine_id: str, epoch: int) -> None:
        """End exactly this claim; if it is not the recorded one, or the volume is gone, nothing happens."""
        path = self._path(volume_id)
        async with self._lock:
            if not path.exists():
                return
            record = _read(path)
            if record.attached and (record.machine_id, record.epoch) == (machine_id, epoch):
                await asyncio.to_thread(_write, path, msgspec.structs.replace(record, attached=False))

    async def destroy(self, volume_id: str) -> None:
        """Remove volume and data; `Refused` while attached, absent is no error."""
        path = self._path(volume_id)
        async with self._lock:
            if path.exists() and (record := _read(path)).attached:
                raise Refused(
                    f"volume {volume_id} is attached to machine {record.machine_id}",
                    hint=f"destroy the machine first: fly machine destroy {record.machine_id}",
                )
            await asyncio.to_thread(self._destroy, path)

    def _path(self, volume_id: str) -> Path:
        if not _VOLUME_ID.fullmatch(volume_id):
            raise InvalidInput(f"{volume_id!r} is no volume id")
        return self._root / volume_id

    def _create(self, path: Path, size_gb: int) -> None:
        if path.exists():
            return
        fresh = self._root / f".new-{path.name}"  # a dot is no part of an id
        if fresh.exists():
            shutil.rmtree(fresh)
        fresh.mkdir(mode=0o711)
        # Others may pass through: a database below drops to a user of its own.
        (fresh / "data").mkdir(mode=0o711)
        _write(fresh, Record(size_gb=size_gb))
        os.replace(fresh, path)
        _sync(self._root)

    def _destroy(self, path: Path) -> None:
        """Gone by one rename; what a crash leaves of the deleting, the next destroy of the name ends."""
        trash = self._root / f".gone-{path.name}"
        if trash.exists():
            shutil.rmtree(trash)
        if path.exists():
            os.replace(path, trash)
            _sync(self._root)
            shutil.rmtree(trash)


def _refusal(record: Record, machine_id: str, epoch: int) -> str:
    """Why this claim may not have the volume; empty if it may."""
    if epoch < record.epoch:
        return f"machine {record.machine_id} has claimed it since, with epoch {record.epoch}"
    if epoch == record.epoch and record.machine_id not in ("", machine_id):
        return f"epoch {epoch} is machine {record.machine_id}'s claim"
    return ""


def _read(path: Path) -> Record:
    try:
        return msgspec.json.decode((path / "volume.json").read_bytes(), type=Record)
    except FileNotFoundError:
        raise NotFound(
            f"no volume {path.name} on this host", hint="`fly volumes list` shows where each one is"
        ) from None


def _write(path: Path, record: Record) -> None:
    temporary = path / "volume.json.tmp"
    with open(temporary, "wb") as file:
        file.write(msgspec.json.encode(record))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path / "volume.json")
    _sync(path)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
