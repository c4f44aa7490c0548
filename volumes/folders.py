"""Where volumes and snapshots are below a root, and the only ways to make and to remove one.

    <root>/<volume>/
        data/                         what the machine sees: a tree of the back end
        volume.json                   contract.Record
        snapshots/<snapshot>/data/    a tree
        snapshots/<snapshot>/snapshot.json
    <root>/.new-<volume>/             half made; nobody sees it (snapshots: the same)
    <root>/.gone-<volume>/            half removed

Names are the journal. What is made is made aside, put on disk, and gets its name by one rename; what
is removed loses its name by one rename. So a crash at any point leaves a thing whole or absent under
its name, and store.py's `tidy` and the next call for the same name remove the rest. Links are never
followed: one that somebody planted is refused. Called in threads, by store.py, which holds the locks.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path

from flyd.errors import FlydError, NotFound
from volumes.contract import Held, Record, Snapshot, Trees, check_id
from volumes.files import check_folder, read_record, sync, write_record

NEW, GONE = ".new-", ".gone-"  # a dot is no part of an id


class Folders:
    """The folders below one root."""

    def __init__(self, root: Path, trees: Trees) -> None:
        self.root = root.absolute()
        self._trees = trees
        self.root.mkdir(mode=0o711, parents=True, exist_ok=True)

    def held(self) -> Generator[Held]:
        """The volumes, by id; what is foreign or damaged is left alone, and no reason to miss the rest."""
        for name in sorted(os.listdir(self.root)):
            if name.startswith("."):
                continue
            try:
                check_id(name)
                record = self.record(name)
            except FlydError:
                continue
            yield Held(id=name, record=record)

    def build(self, folder: Path, name: str, make: Callable[[Path], None]) -> None:
        """Make a thing aside, with its tree in `data`, and give it its name."""
        fresh = folder / f"{NEW}{name}"
        try:
            self.clear(fresh)
            # Others may pass through: a database below drops to a user of its own.
            fresh.mkdir(mode=0o711)
            make(fresh / "data")
            os.replace(fresh, folder / name)
        except (OSError, FlydError):
            with suppress(OSError, FlydError):  # `tidy` ends it
                self.clear(fresh)
            raise
        sync(folder)

    def remove(self, folder: Path, name: str) -> None:
        """Gone by one rename; what a crash leaves of the deleting, `tidy` or the next removal ends."""
        gone = folder / f"{GONE}{name}"
        self.clear(gone)
        try:
            os.replace(folder / name, gone)
        except FileNotFoundError:
            return
        sync(folder)
        self.clear(gone)

    def clear(self, path: Path) -> None:
        """Remove a thing that has no name any more; a link itself, never what it leads to."""
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(mode):
            path.unlink()
            return
        for data in (*path.glob("snapshots/*/data"), path / "data"):
            if self._is_own(data):
                self._trees.delete(data)
        shutil.rmtree(path)

    def exists(self, volume_id: str) -> bool:
        """Whether anything has the name."""
        return os.path.lexists(self.root / volume_id)

    def record(self, volume_id: str) -> Record:
        """A volume's record, or NotFound."""
        return read_record(self.root / volume_id / "volume.json", Record, f"volume {volume_id}")

    def live(self, volume_id: str) -> Record:
        """As `record`; NotFound too if it is destroyed."""
        record = self.record(volume_id)
        if record.destroyed_at_s:
            raise NotFound(
                f"volume {volume_id} was destroyed and is only kept for a while",
                hint=f"`fly volumes undestroy {volume_id}` brings it back.",
            )
        return record

    def write(self, volume_id: str, record: Record) -> None:
        """Replace a volume's record, durably."""
        write_record(self.root / volume_id / "volume.json", record)

    def data(self, volume_id: str) -> Path:
        """Where a volume's data is; Refused if that is no folder."""
        data = self.root / volume_id / "data"
        check_folder(data, f"data of volume {volume_id}")
        return data

    def snapshots(self, volume_id: str) -> Path:
        """Where its snapshots are or will be."""
        folder = self.root / volume_id / "snapshots"
        if os.path.lexists(folder):
            check_folder(folder, f"snapshots of volume {volume_id}")
        return folder

    def snapshot_names(self, volume_id: str) -> list[str]:
        """The ids of its snapshots, in no order."""
        folder = self.snapshots(volume_id)
        return [name for name in os.listdir(folder) if name[0] != "."] if folder.exists() else []

    def snapshot_record(self, volume_id: str, snapshot_id: str) -> Snapshot:
        """One snapshot's record, or NotFound."""
        path = self.snapshots(volume_id) / snapshot_id / "snapshot.json"
        return read_record(path, Snapshot, f"snapshot {snapshot_id} of volume {volume_id}")

    def _is_own(self, data: Path) -> bool:
        """Whether it is a folder, and no link leads to it."""
        below = [data, *data.parents]
        return all(stat.S_ISDIR(_mode(p)) for p in below[: below.index(self.root)])


def _mode(path: Path) -> int:
    try:
        return os.lstat(path).st_mode
    except FileNotFoundError:
        return 0
