"""What others may ask of a cluster: called by the API (and tests), carried out by the agents."""

from __future__ import annotations

from flyd.errors import Conflict, InvalidInput, NotFound
from flyd.model import PostgresLeader, decode, encode
from flyd.ports import KV, Put, Unchanged
from flyd.store.keys import last_part, postgres_members
from pgha import keys
from pgha.model import Switchover


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
    if not (await kv.txn([Unchanged(key, 0)], [Put(key, encode(wish))])).succeeded:
        raise Conflict(f"a switchover of {cluster} is under way", hint="wait until the epoch has changed")
    return leader
