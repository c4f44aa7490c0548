"""What others may ask of a cluster's members: called by the API (and tests), walked by the primary's agent.

A request changes the record's `target` by one compare-and-set and nothing else; how it comes about is
change.py's. Every request can be called again, after a crash of whoever asked as well.
"""

from __future__ import annotations

from typing import NamedTuple

from flyd.errors import Conflict, NotFound, Refused, Unavailable
from flyd.model import PostgresLeader, PostgresMember, decode, encode
from flyd.ports import KV, Delete, KeyValue, Put, Unchanged
from flyd.store.keys import postgres_members
from pgha import keys
from pgha.membership import acks_needed, everybody, in_flux, retargeted
from pgha.model import Membership

FEWEST_MEMBERS = 2  # with one copy, losing its host loses the data
MOST_MEMBERS = 9  # each has a walsender of 16, and copies and rewinds need some, too


async def membership(kv: KV, cluster: str) -> Membership:
    """Who the members are now, and who they are to be; `NotFound` before the first primary has written it."""
    return (await _record(kv, cluster))[1]


class Wish(NamedTuple):
    """A change of the record that is not written yet, so that it can be part of a larger transaction."""

    record: Membership
    compares: tuple[Unchanged, ...]
    effect: Put


async def request_add(kv: KV, cluster: str, node: str) -> Membership:
    """Let this member in once it has what there is; start it before or after. Again: nothing new."""
    before = await membership(kv, cluster)
    if node in before.target:
        return before
    return await _write(kv, cluster, await addition(kv, cluster, node))


async def addition(kv: KV, cluster: str, node: str) -> Wish:
    """What `request_add` writes, for a caller that writes more with it."""
    item, record = await _record(kv, cluster)
    if node in record.retired:
        raise Refused(
            f"{node} was removed from {cluster}: a name does not come back",
            hint="What it had promised went with its disk. Add a member with another name.",
        )
    _refuse_while_changing(cluster, record, but=node)
    if len(record.target) >= MOST_MEMBERS:
        raise Refused(f"{cluster} has {len(record.target)} members; it can not have more than {MOST_MEMBERS}")
    await _refuse_while_paused(kv, cluster)
    return _wish(cluster, item, retargeted(record, (*record.target, node)))


async def request_remove(kv: KV, cluster: str, node: str) -> Membership:
    """Take this member's word away; its machine may be destroyed once it is `retired`. Again: nothing new."""
    item, record = await _record(kv, cluster)
    if node not in record.target:
        if node in record.retired or node in everybody(record.quorum):
            return record
        raise NotFound(
            f"{node} is no member of {cluster}",
            hint=f"Its members: {', '.join(record.target)}",
        )
    leader = await _leader(kv, cluster)
    if leader.node == node:
        raise Refused(
            f"{node} is the primary of {cluster}",
            hint=f"First move it: fly postgres switchover -a {cluster}",
        )
    _refuse_while_changing(cluster, record, but=node)
    left = tuple(n for n in record.target if n != node)
    if len(left) < FEWEST_MEMBERS:
        raise Refused(
            f"{cluster} would have {len(left)} member without {node}: it needs at least {FEWEST_MEMBERS}",
            hint="Add another one first: fly postgres members add --region REGION",
        )
    if node in everybody(record.quorum):
        await _refuse_without_quorum(kv, cluster, leader, node, left)
    return await _write(kv, cluster, _wish(cluster, item, retargeted(record, left)))


async def forget(kv: KV, cluster: str, node: str) -> None:
    """What a removed member last said of itself is shown no more. Once its agent is gone."""
    await kv.txn([], [Delete(keys.member(cluster, node)), Delete(keys.doubt(cluster, node))])


async def _record(kv: KV, cluster: str) -> tuple[KeyValue, Membership]:
    item = await kv.get(keys.membership(cluster))
    if item is None:
        raise NotFound(
            f"Postgres cluster {cluster} has not recorded its members yet",
            hint=f"Its first primary does that: fly postgres status -a {cluster}",
        )
    return item, decode(item.value, Membership)


async def _leader(kv: KV, cluster: str) -> PostgresLeader:
    item = await kv.get(keys.postgres_leader(cluster))
    if item is None:
        raise NotFound(f"Postgres cluster {cluster} has no leader")
    return decode(item.value, PostgresLeader)


def _refuse_while_changing(cluster: str, record: Membership, but: str) -> None:
    """One at a time. But who is being let in may be taken out again, and the other way round."""
    if in_flux(record) in ((), (but,)):
        return
    raise Conflict(
        f"the members of {cluster} are being changed already, to {', '.join(record.target)}",
        hint=f"fly postgres members list -a {cluster} shows how far it is",
    )


async def _refuse_without_quorum(
    kv: KV, cluster: str, leader: PostgresLeader, node: str, left: tuple[str, ...]
) -> None:
    """Those that stay must be able to acknowledge without it."""
    listing = await kv.list(postgres_members(cluster))
    said = {m.node: m for m in (decode(i.value, PostgresMember) for i in listing.items)}
    others = [n for n in left if n != leader.node]
    down = [n for n in others if n not in said or not said[n].streaming]
    if len(others) - len(down) < acks_needed(len(left)):
        raise Refused(
            f"without {node} no quorum of {cluster} would be left: {', '.join(down)} does not stream",
            hint="Bring it back first, or remove it instead.",
        )


def _wish(cluster: str, item: KeyValue, record: Membership) -> Wish:
    key = keys.membership(cluster)
    compares = (Unchanged(key, item.mod_revision), Unchanged(keys.pause(cluster), 0))
    return Wish(record, compares, Put(key, encode(record)))


async def _write(kv: KV, cluster: str, wish: Wish) -> Membership:
    if (await kv.txn(wish.compares, [wish.effect])).succeeded:
        return wish.record
    await _refuse_while_paused(kv, cluster)
    raise Unavailable(f"the record of {cluster}'s members changed meanwhile", hint="Try again.")


async def _refuse_while_paused(kv: KV, cluster: str) -> None:
    if await kv.get(keys.pause(cluster)) is not None:
        raise Conflict(f"{cluster} is paused", hint=f"fly postgres resume -a {cluster}")
