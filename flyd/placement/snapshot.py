"""What was seen in etcd: the scheduler's snapshot, with the revisions that a commit must compare.

Owns `Sighting`, and its two sources: `read_snapshot` reads it afresh, `Follower` keeps one current
from a mirror, so that a look costs what has changed since the last one. A sighting may be a moment
old, and its prefixes may be read at different revisions. That is safe because nothing is decided on
it alone: the commit compares every record that it changes. A host that was lost or cordoned
meanwhile may still be chosen; its machine waits for it, as it would had the host been lost a moment
later. Called by placer.py and volumes.py only.
"""

from __future__ import annotations

from collections.abc import Mapping

from flyd.model import Host, Machine, Reservations, Volume, decode
from flyd.placement.index import Snapshot
from flyd.ports import KV, Unchanged
from flyd.store import keys
from flyd.store.mirror import Mirror

Record = Host | Reservations | Volume | Machine

KINDS: dict[str, type[Record]] = {
    keys.HOSTS: Host,
    keys.RESERVATIONS: Reservations,
    keys.VOLUMES: Volume,
    keys.MACHINES: Machine,
}
"""What is kept of each prefix; of ALIVE only which keys are there."""


class Sighting:
    """A snapshot and, by key, the revision of each record in it."""

    def __init__(self) -> None:
        self.snapshot = Snapshot()
        self._revisions: dict[str, int] = {}

    def unchanged(self, key: str) -> Unchanged:
        """The compare that the record is still as it was seen (also: still absent)."""
        return Unchanged(key, self._revisions.get(key, 0))

    def see(self, key: str, record: Record, revision: int) -> None:
        """A record as it stands."""
        self._revisions[key] = revision
        match record:
            case Host():
                self.snapshot.put_host(record)
            case Reservations():
                self.snapshot.put_reservations(record)
            case Volume():
                self.snapshot.put_volume(record)
            case Machine():
                self.snapshot.put_machine(record)

    def see_absent(self, key: str) -> None:
        """A record that is not there (any more)."""
        self._revisions.pop(key, None)
        name = keys.last_part(key)
        if key.startswith(keys.HOSTS):
            self.snapshot.drop_host(name)
        elif key.startswith(keys.RESERVATIONS):
            self.snapshot.put_reservations(Reservations(host=name))
        elif key.startswith(keys.VOLUMES):
            self.snapshot.drop_volume(key.removeprefix(keys.VOLUMES).partition("/")[0], name)
        elif key.startswith(keys.MACHINES):
            self.snapshot.drop_machine(name)


async def read_snapshot(kv: KV, app: str) -> Sighting:
    """The cluster's hosts and one application's volumes and machines, as they stand now."""
    sighting = Sighting()
    for prefix in (keys.HOSTS, keys.RESERVATIONS, f"{keys.VOLUMES}{app}/", f"{keys.MACHINES}{app}/"):
        kind = next(kind for beginning, kind in KINDS.items() if prefix.startswith(beginning))
        for item in (await kv.list(prefix)).items:
            sighting.see(item.key, decode(item.value, kind), item.mod_revision)
    for item in (await kv.list(keys.ALIVE)).items:
        sighting.snapshot.set_alive(keys.last_part(item.key), True)
    return sighting


class Follower:
    """A sighting that follows a mirror, with what this process has itself committed a moment before.

    The mirror must hold HOSTS, ALIVE, RESERVATIONS, VOLUMES and MACHINES, of all applications.
    """

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._sighting = Sighting()
        self._changed: dict[str, None] = {}  # keys to be read before the next look
        self._own: dict[str, tuple[Record, int]] = {}  # committed here, and not yet in the mirror
        mirror.follow(self._note)

    def look(self) -> Sighting:
        """The newest sighting. What the caller puts into its snapshot must be confirmed or forgotten."""
        while self._changed:
            key, _ = self._changed.popitem()
            self._read(key)
        return self._sighting

    def confirm(self, records: Mapping[str, Record], revision: int) -> None:
        """These were committed at `revision`: seen from now on, also before the mirror shows them."""
        for key, record in records.items():
            self._own[key] = record, revision
            self._changed[key] = None

    def forget(self, records: Mapping[str, Record]) -> None:
        """These were put into the snapshot and not committed."""
        for key in records:
            self._changed[key] = None

    def _note(self, key: str) -> None:
        if key.startswith((*KINDS, keys.ALIVE)):
            self._changed[key] = None

    def _read(self, key: str) -> None:
        if key.startswith(keys.ALIVE):
            alive = self._mirror.get(key, bytes) is not None
            self._sighting.snapshot.set_alive(keys.last_part(key), alive)
            return
        record, revision = self._own.get(key, (None, 0))
        if record is None or revision <= self._mirror.revision:
            self._own.pop(key, None)
            kind = next(kind for prefix, kind in KINDS.items() if key.startswith(prefix))
            found = self._mirror.get(key, kind)
            record, revision = (found.value, found.mod_revision) if found is not None else (None, 0)
        if record is None:
            self._sighting.see_absent(key)
        else:
            self._sighting.see(key, record, revision)
