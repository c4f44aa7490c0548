"""Reads the scheduler's snapshot from etcd, with the revisions a commit must compare.

Each prefix is read at a revision of its own. That is safe because nothing is decided on
the snapshot alone: the commit compares every record that it changes. A host that was lost
or cordoned between the reads may still be chosen; its machine waits for it, as it would
had the host been lost a moment later. Called by placer.py only.
"""

from __future__ import annotations

import msgspec

from flyd.model import Host, Machine, Reservations, Volume, decode
from flyd.placement.scheduler import Snapshot
from flyd.ports import KV, Unchanged
from flyd.store import keys


class Sighting(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot and, by key, the revision of each record in it."""

    snapshot: Snapshot
    revisions: dict[str, int]

    def unchanged(self, key: str) -> Unchanged:
        """The compare that the record is still as it was seen (also: still absent)."""
        return Unchanged(key, self.revisions.get(key, 0))


async def read_snapshot(kv: KV, app: str) -> Sighting:
    """The cluster's hosts and one application's volumes and machines, as they stand now."""
    hosts = await kv.list(keys.HOSTS)
    alive = await kv.list(keys.ALIVE)
    reservations = await kv.list(keys.RESERVATIONS)
    volumes = await kv.list(f"{keys.VOLUMES}{app}/")
    machines = await kv.list(f"{keys.MACHINES}{app}/")
    listings = (hosts, reservations, volumes, machines)
    return Sighting(
        snapshot=Snapshot(
            hosts=tuple(decode(item.value, Host) for item in hosts.items),
            alive=tuple(keys.last_part(item.key) for item in alive.items),
            reservations={
                keys.last_part(item.key): decode(item.value, Reservations) for item in reservations.items
            },
            volumes=tuple(decode(item.value, Volume) for item in volumes.items),
            machines=tuple(decode(item.value, Machine) for item in machines.items),
        ),
        revisions={item.key: item.mod_revision for listing in listings for item in listing.items},
    )
