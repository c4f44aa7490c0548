"""Volumes as plain directories: works on any file system, without root.

It can not limit a volume's size: `size_gb` is written down and shown, not enforced. Snapshots and forks
are copies: where the file system can share data between files (XFS, btrfs) they cost nothing at first,
elsewhere the whole volume is copied. Either way file by file: of a volume that is in use no copy is of
one instant, and its record says so. `abilities` tells which.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

from volumes.contract import Abilities
from volumes.files import run
from volumes.streams import StreamStore
from volumes.trees import receive_tree, send_tree

FICLONE = 0x40049409  # ioctl: share another file's data


class DirectoryTrees:
    """contract.Trees over any file system."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._shares: bool | None = None

    def abilities(self) -> Abilities:
        """Instant where files can share their data."""
        if self._shares is None:
            self._shares = shares_data(self._root)
        return Abilities(limited=False, instant=self._shares, atomic=False)

    def make(self, path: Path) -> None:
        """A directory; others may pass through it."""
        path.mkdir(mode=0o711)

    def copy(self, source: Path, target: Path, *, writable: bool) -> None:
        """With owners, times, links and holes. `cp` dies with this thread's flyd: none writes on unseen."""
        copy = ("cp", "--archive", "--reflink=auto", "--no-target-directory", str(source), str(target))
        run("setpriv", "--pdeathsig", "KILL", *copy)
        run("sync", "--file-system", str(target))

    def send(self, source: Path, parent: Path | None) -> Generator[bytes]:
        """What was removed, then a tar of what is new or differs (trees.py)."""
        return send_tree(source, parent)

    def receive(self, stream: Path, parent: Path | None, target: Path) -> None:
        """The parent's copy, or nothing, with the stream's changes."""
        if parent is None:
            self.make(target)
        else:
            self.copy(parent, target, writable=True)
        receive_tree(stream, target)
        run("sync", "--file-system", str(target))

    def limit(self, path: Path, size_bytes: int) -> None:
        """Nothing here can."""

    def used_bytes(self, path: Path) -> int:
        """The blocks of all files; what vanishes while it is counted is not there."""
        total, seen = 0, frozenset[tuple[int, int]]()
        for folder, _, files in os.walk(path):
            for name in files:
                try:
                    found = os.lstat(os.path.join(folder, name))
                except FileNotFoundError:
                    continue
                if found.st_nlink > 1:
                    if (found.st_dev, found.st_ino) in seen:
                        continue
                    seen |= {(found.st_dev, found.st_ino)}
                total += found.st_blocks * 512
        return total

    def delete(self, path: Path) -> None:
        """All of it; links are removed, not followed."""
        shutil.rmtree(path)

    def tidy(self, root: Path) -> None:
        """A plain directory leaves nothing."""


class DirectoryVolumes(StreamStore):
    """The volumes below one root directory, on any file system."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, DirectoryTrees(root.absolute()))


def shares_data(folder: Path) -> bool:
    """Whether files in this folder can share their data; tried, with two files that have no name."""
    with tempfile.TemporaryFile(dir=folder) as source, tempfile.TemporaryFile(dir=folder) as target:
        source.write(b"x" * 4096)
        source.flush()
        try:
            fcntl.ioctl(target.fileno(), FICLONE, source.fileno())
        except OSError:
            return False
    return True
