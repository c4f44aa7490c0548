"""Volumes as btrfs subvolumes: limited, with snapshots and forks in milliseconds, whatever the size.

Each tree is a subvolume; its quota group limits what it refers to, so a volume at its size gets EDQUOT
and the others never notice. All trees together, snapshots too, are in one group that ends before the pool
does: the room that is left is what records are written with, so a volume can be detached, destroyed and
purged when nothing else fits any more. A snapshot is made by the kernel in one transaction: it shows
one instant, also of what the machine has written and not yet flushed. Needs root, and a pool (pool.py).
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

from flyd.errors import Unavailable
from volumes.contract import Abilities
from volumes.files import run, stream
from volumes.streams import StreamStore

ALL = "1/1"  # the quota group of all volumes and snapshots of a pool
MIN_RESERVE_BYTES = 32 << 20
SUBVOLUME_INODE = 256  # the root of every subvolume has it


class BtrfsTrees:
    """contract.Trees over one btrfs with quotas."""

    def abilities(self) -> Abilities:
        """All of them."""
        return Abilities(limited=True, instant=True, atomic=True)

    def make(self, path: Path) -> None:
        """An empty subvolume; others may pass through it."""
        run("btrfs", "subvolume", "create", "-i", ALL, str(path))
        path.chmod(0o711)

    def copy(self, source: Path, target: Path, *, writable: bool) -> None:
        """A snapshot: on disk when this returns, for the kernel commits it."""
        flags = () if writable else ("-r",)
        run("btrfs", "subvolume", "snapshot", *flags, "-i", ALL, str(source), str(target))

    def send(self, source: Path, parent: Path | None) -> Generator[bytes]:
        """btrfs's own stream: blocks, not files."""
        given = () if parent is None else ("-p", str(parent))
        return stream(("btrfs", "send", "--quiet", *given, str(source)))

    def receive(self, stream: Path, parent: Path | None, target: Path) -> None:
        """By `btrfs receive`, which finds the parent by its own mark and names the tree as it was: `data`.

        What comes is in the group of no pool: keep_reserve counts it as room that is not there.
        """
        run("btrfs", "receive", "--quiet", "-e", "-f", str(stream), str(target.parent))
        run("btrfs", "filesystem", "sync", str(target))

    def limit(self, path: Path, size_bytes: int) -> None:
        """By the quota group, at once, also while it is written to."""
        run("btrfs", "qgroup", "limit", str(size_bytes), str(path))

    def used_bytes(self, path: Path) -> int:
        """What the quota group counts, as of the kernel's last commit: of a fresh copy now, else 30 s ago."""
        listed = run("btrfs", "qgroup", "show", "--raw", "-f", str(path))
        return referenced_bytes(listed, "0/")

    def delete(self, path: Path) -> None:
        """The subvolume, and those that a machine has made inside."""
        inode = os.lstat(path).st_ino
        if inode != SUBVOLUME_INODE:
            run("rm", "--recursive", "--force", "--one-file-system", str(path))
            return
        for inner in inner_subvolumes(path):
            run("btrfs", "subvolume", "delete", str(inner))
        run("btrfs", "subvolume", "delete", str(path))

    def tidy(self, root: Path) -> None:
        """Drop the groups whose tree is gone (those still being emptied wait), set the reserve anew."""
        with suppress(Unavailable):
            run("btrfs", "qgroup", "clear-stale", str(root))
        keep_reserve(root)


class BtrfsVolumes(StreamStore):
    """The volumes below one directory of a pool (pool.open_pool)."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, BtrfsTrees())


def inner_subvolumes(path: Path) -> list[Path]:
    """The subvolumes below a directory, the deepest first."""
    found = [
        Path(folder) / name
        for folder, names, _ in os.walk(path)
        for name in names
        if os.lstat(os.path.join(folder, name)).st_ino == SUBVOLUME_INODE
    ]
    return sorted(found, key=lambda p: len(p.parts), reverse=True)


def keep_reserve(root: Path) -> None:
    """Let all volumes together have what there is but for the reserve, as the pool is now."""
    listed = run("btrfs", "qgroup", "show", "--raw", "--sync", str(root))
    disk = os.statvfs(root)
    reserve_bytes = max(MIN_RESERVE_BYTES, disk.f_blocks * disk.f_frsize // 100)
    limit_bytes = referenced_bytes(listed, ALL) + disk.f_bavail * disk.f_frsize - reserve_bytes
    run("btrfs", "qgroup", "limit", str(max(limit_bytes, MIN_RESERVE_BYTES)), ALL, str(root))


def referenced_bytes(listed: str, group: str) -> int:
    """The second column of the first group in `btrfs qgroup show` that begins so, or Unavailable."""
    for line in listed.splitlines():
        if line.startswith(group):
            return int(line.split()[1])
    raise Unavailable(
        f"btrfs shows no quota group {group} for the volumes",
        hint="`btrfs quota rescan -w` on the pool counts anew.",
    )
