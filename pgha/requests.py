"""What others may ask of a cluster: called by the API (and tests), carried out by the agents."""

from __future__ import annotations

from flyd.errors import Conflict, InvalidInput, NotFound
from flyd.model import PostgresLeader, decode, encode
from flyd.ports import KV, Delete, Put, Unchanged
from flyd.store.keys import last_part, postgres_members
from pgha import keys
from pgha.model import Backup, Pause, Switchover


async def request_switchover(kv: KV, cluster: str, target: str, now_wall_s: float) -> PostgresLeader:
    """Ask for the primary to move to `target` (empty: the best replica); answers who leads now.

    Returns once the wish is recorded. The leader hands over within seconds, or refuses by the
    event postgres.switchover_refused; the epoch in the leader key growing says that it happened.
    """
    item = await kv.get(keys.postgres_leader(cluster))
    if item is None:
        raise NotFound(
            f"Postgres cluster {cluster} has no leader", hint=f"look at it: fly pg status {cluster}"
        )
    leader = decode(item.value, PostgresLeader)
    prefix = postgres_members(cluster)
    members = [last_part(m.key) for m in (await kv.list(prefix)).items]
    if target and target not in members:
        raise NotFound(f"{target} is no member of {cluster}", hint=f"members: {', '.join(members)}")
    if target == leader.node:
        raise InvalidInput(f"{target} is the primary of {cluster} already")
    key = keys.switchover(cluster)
    wish = Switchover(target=target, requested_at_s=now_wall_s)
    idle = [Unchanged(key, 0), Unchanged(keys.pause(cluster), 0)]
    if not (await kv.txn(idle, [Put(key, encode(wish))])).succeeded:
        if await kv.get(keys.pause(cluster)) is not None:
            raise Conflict(f"{cluster} is paused", hint=f"fly postgres resume -a {cluster}")
        raise Conflict(f"a switchover of {cluster} is under way", hint="wait until the epoch has changed")
    return leader


async def request_pause(kv: KV, cluster: str, reason: str, now_wall_s: float) -> Pause:
    """From now on no member takes over, and nobody's data is replaced, until `request_resume`.

    Holds on return: a take-over needs that the key is absent. Called again it keeps the first word.
    `Conflict` while a switchover is under way, which would end without a primary.
    """
    if await kv.get(keys.postgres_leader(cluster)) is None:
        raise NotFound(f"Postgres cluster {cluster} has no leader yet: there is nothing to pause")
    key, said = keys.pause(cluster), Pause(reason=reason, since_s=now_wall_s)
    idle = [Unchanged(key, 0), Unchanged(keys.switchover(cluster), 0)]
    if (await kv.txn(idle, [Put(key, encode(said))])).succeeded:
        return said
    before = await kv.get(key)
    if before is None:
        raise Conflict(f"a switchover of {cluster} is under way", hint="wait until the epoch has changed")
    return decode(before.value, Pause)


async def request_resume(kv: KV, cluster: str) -> None:
    """What was held back may happen; nothing to do if it was not paused."""
    await kv.txn([], [Delete(keys.pause(cluster))])


async def paused(kv: KV, cluster: str) -> Pause | None:
    """Whether a person has paused it."""
    item = await kv.get(keys.pause(cluster))
    return None if item is None else decode(item.value, Pause)


async def request_backup(kv: KV, cluster: str, name: str, now_wall_s: float) -> None:
    """Ask for a base backup under this name; `taken` tells what became of it. The primary takes it."""
    key = keys.backup_wish(cluster)
    wish = Backup(name=name, requested_at_s=now_wall_s)
    if not (await kv.txn([Unchanged(key, 0)], [Put(key, encode(wish))])).succeeded:
        raise Conflict(f"a backup of {cluster} is under way", hint=f"fly postgres backup list -a {cluster}")


async def taken(kv: KV, cluster: str) -> list[Backup]:
    """All base backups that were taken, or tried, oldest first; one under way has no `finished_at_s`."""
    listing = await kv.list(keys.backups(cluster))
    found = [decode(item.value, Backup) for item in listing.items]
    wish = await kv.get(keys.backup_wish(cluster))
    if wish is not None:
        found.append(decode(wish.value, Backup))
    return sorted(found, key=lambda backup: backup.requested_at_s)
