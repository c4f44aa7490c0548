"""What every volume store of a host says and takes: values, limits, names and the fence. Pure.

The rules that hold on every back end are here and in store.py; a back end (directory.py, btrfs.py) is
only a way to make, copy, limit and delete one tree of files.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from pathlib import Path
from typing import Protocol

import msgspec

from flyd.errors import InvalidInput

GB = 1 << 30
MAX_SIZE_GB = 64 * 1024  # 64 TB: more than a host's disk, far below what overflows in a tool
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


class Abilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a back end can do, as it is on this disk."""

    limited: bool  # a volume can not hold more than its size
    instant: bool  # snapshots and forks share their data: no copying, whatever the size
    atomic: bool  # a snapshot of a volume in use shows one instant of it


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """volume.json: what the host knows of a volume. Times are seconds since the epoch."""

    size_gb: int
    machine_id: str = ""
    epoch: int = 0
    attached: bool = False
    destroyed_at_s: float = 0.0  # not 0: kept until it is purged, and of no use to machines
    origin: str = ""  # the volume it was forked from, or volume@snapshot


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """snapshot.json: a volume as it was."""

    id: str
    made_at_s: float
    size_gb: int  # the volume's then
    used_bytes: int
    scheduled: bool = False
    consistent: bool = True  # False: copied file by file while a machine wrote


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A volume on this host's disk."""

    id: str
    record: Record


class Piece(Protocol):
    """What a store takes as a piece of a stream: StreamPart, or what it became on its way."""

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
        """Of the whole stream: with the end."""
        ...


class StreamPart(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a snapshot's stream, at `offset_bytes` of it; the last has no data but the whole's sum."""

    offset_bytes: int
    data: bytes = b""
    sha256: str = ""  # hex, of the whole stream, its first byte to its last: of the last piece alone


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a volume holds now, and may hold; a back end without limits does not enforce the latter."""

    used_bytes: int
    size_bytes: int


class Space(msgspec.Struct, frozen=True, kw_only=True):
    """The disk that all volumes of a host share."""

    total_bytes: int
    free_bytes: int


class Trees(Protocol):
    """A back end: trees of files on one file system. Called in threads; paths are the store's own."""

    def abilities(self) -> Abilities:
        """What it can do here."""
        ...

    def make(self, path: Path) -> None:
        """An empty tree."""
        ...

    def copy(self, source: Path, target: Path, *, writable: bool) -> None:
        """A new tree with the contents of another, on disk when this returns."""
        ...

    def send(self, source: Path, parent: Path | None) -> Generator[bytes]:
        """A read-only tree as a stream; with `parent`, an earlier one of the same volume, what differs.

        Closing it ends the tool behind it. The stream is this back end's own.
        """
        ...

    def receive(self, stream: Path, parent: Path | None, target: Path) -> None:
        """The tree that a stream in a file was made from, read-only where that can be, on disk at the end."""
        ...

    def limit(self, path: Path, size_bytes: int) -> None:
        """From now on the tree holds no more than this, where that can be enforced."""
        ...

    def used_bytes(self, path: Path) -> int:
        """How much the tree holds; what it shares with others counts."""
        ...

    def delete(self, path: Path) -> None:
        """Remove a tree and all in it."""
        ...

    def tidy(self, root: Path) -> None:
        """Forget what deleted trees have left in the file system's own books."""
        ...


def check_id(name: str, what: str = "volume") -> None:
    """A name that stays in its folder, or InvalidInput."""
    if not _ID.fullmatch(name):
        raise InvalidInput(
            f"{name!r} is no {what} id", hint="Ids are letters, digits, `-`, `_` and `.`, as flyd made them."
        )


def check_size(size_gb: int) -> None:
    """A size that a volume can have, or InvalidInput."""
    if not 1 <= size_gb <= MAX_SIZE_GB:
        raise InvalidInput(
            f"a volume of {size_gb} GB can not be made", hint=f"Sizes go from 1 to {MAX_SIZE_GB} GB."
        )


def refusal(record: Record, machine_id: str, epoch: int) -> str:
    """Why this claim may not have the volume; empty if it may."""
    if epoch < record.epoch:
        return f"machine {record.machine_id} has claimed it since, with epoch {record.epoch}"
    if epoch == record.epoch and record.machine_id not in ("", machine_id):
        return f"epoch {epoch} is machine {record.machine_id}'s claim"
    return ""
