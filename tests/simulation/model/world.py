"""What the model's world is made of: etcd, three members with their Postgres, what clients were told.

Frozen values only, so that a state can be hashed. Postgres is as far as the safety argument looks at it
(pgha/README.md): WAL is a list of entries, an LSN a number of entries; a standby flushes one entry at a time;
what it has flushed is known to its primary at once, and a row is acknowledged the moment that it may be.
Later or never only makes promises weaker: nothing that follows depends on what a client knows.

etcd is one linearizable store. So that states which cannot be told apart are one: its revision grows only
with the lease or the leader (nothing compares the revision of a vote), and votes of earlier rounds, which are
never read again, are dropped with promises to them.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import msgspec

from flyd.model import PostgresLeader, decode, encode
from flyd.ports import Delete, KeyValue, Listing, Put, Unchanged
from pgha import keys
from pgha.membership import settled as settled_quorum
from pgha.model import Bootstrap, Lease, Lineage, Membership, Synchronous, Vote

CLUSTER = "db"
NODES = ("a", "b", "c")
SYSTEM = "7"
NOBODY = -1
FIRST_EPOCH = 2


class Etcd(msgspec.Struct, frozen=True, eq=False):
    """What it holds, in key order. One object for each content: made by `etcd_of` alone."""

    revision: int
    items: tuple[KeyValue, ...]


class Entry(NamedTuple):
    """A WAL record. `row` 0: the begin of a timeline. `late`: written when etcd named a newer epoch."""

    timeline: int
    row: int = 0
    late: bool = False


Wal = tuple[Entry, ...]


class Member(NamedTuple):
    """One node: its disk, its Postgres, its agent."""

    wal: Wal
    promised: int = 0
    damaged: bool = False
    up: bool = False  # Postgres runs
    recovering: bool = True
    upstream: int = NOBODY
    reports: tuple[int, ...] = (0, 0, 0)  # as a primary: what each standby has said that it flushed
    alive: bool = True  # the agent runs
    won: int = 0  # its term's epoch
    renewed: int = 0  # the lease revision that its term knows
    synchronous: Synchronous = Synchronous()  # whose word its Postgres waits for
    complete_lsn: int = 0  # as a primary: what a quorum of those must have before the voters change
    act: int = 0  # what it is in the middle of (acts.py); 0: nothing

    def primary(self) -> bool:
        """Out of recovery."""
        return self.up and not self.recovering


class Budget(NamedTuple):
    """What may still happen in this history."""

    rows: int
    renewals: int
    crashes: int
    losses: int
    changes: int


class World(NamedTuple):
    """One state."""

    etcd: Etcd
    members: tuple[Member, ...]
    acknowledged: tuple[tuple[int, int], ...]  # (timeline, row), sorted
    owners: tuple[tuple[int, int], ...]  # (timeline, member) of every promotion, sorted
    budget: Budget


def first_world(budget: Budget, members: int) -> World:
    """Member a leads epoch 2, b and c stream from it. Of two members, c is none yet."""
    quorum = settled_quorum(NODES[:members])
    wal = (Entry(1), Entry(FIRST_EPOCH))
    lease_revision = 10
    values = {
        keys.bootstrap(CLUSTER): encode(Bootstrap(node=NODES[0])),
        keys.membership(CLUSTER): encode(Membership(quorum=quorum, target=NODES[:members], added_lsn=1)),
        keys.lease(CLUSTER): encode(Lease(epoch=FIRST_EPOCH, node=NODES[0])),
        keys.postgres_leader(CLUSTER): encode(
            PostgresLeader(
                cluster=CLUSTER,
                epoch=FIRST_EPOCH,
                node=NODES[0],
                address=address(0),
                serving=True,
                since_s=0.0,
            )
        ),
        keys.history(CLUSTER, FIRST_EPOCH): encode(
            Lineage(epoch=FIRST_EPOCH, node=NODES[0], system_id=SYSTEM, parent=1, switch_lsn=1)
        ),
    }
    items = tuple(KeyValue(key, values[key], lease_revision, 1) for key in sorted(values))
    primary = Member(
        wal=wal,
        up=True,
        recovering=False,
        reports=(0, 2, 2),
        won=FIRST_EPOCH,
        renewed=lease_revision,
        synchronous=quorum.synchronous,
        complete_lsn=2,
    )
    standby = Member(wal=wal, up=True, upstream=0, synchronous=quorum.synchronous)
    return World(etcd_of(lease_revision, items), (primary, standby, standby), (), ((FIRST_EPOCH, 0),), budget)


def address(number: int) -> str:
    """Where a member's Postgres is."""
    return f"10.0.0.{number}:5432"


def number_at(where: str) -> int:
    """Which member's Postgres is there."""
    return int(where.removeprefix("10.0.0.").removesuffix(":5432"))


# --------------------------------------------------------------------------- etcd


@cache
def etcd_of(revision: int, items: tuple[KeyValue, ...]) -> Etcd:
    """The one object with this content."""
    return Etcd(revision, items)


@cache
def get(etcd: Etcd, key: str) -> KeyValue | None:
    """The key now."""
    return next((item for item in etcd.items if item.key == key), None)


@cache
def listing(etcd: Etcd) -> Listing:
    """Everything."""
    return Listing(revision=etcd.revision, items=etcd.items)


@cache
def txn(etcd: Etcd, compares: tuple[Unchanged, ...], effects: tuple[Put | Delete, ...]) -> Etcd | None:
    """etcd after the transaction; None if a compare does not hold."""
    revision = etcd.revision
    held = {item.key: item for item in etcd.items}
    for compare in compares:
        item = held.get(compare.key)
        if (0 if item is None else item.mod_revision) != compare.mod_revision:
            return None
    named = (keys.lease(CLUSTER), keys.postgres_leader(CLUSTER), keys.membership(CLUSTER))
    if any(effect.key in named for effect in effects):
        revision += 1
    for effect in effects:
        if isinstance(effect, Put):
            held[effect.key] = KeyValue(effect.key, effect.value, revision, 1)
        else:
            held.pop(effect.key, None)
    this_round = keys.votes(CLUSTER, held[keys.lease(CLUSTER)].mod_revision)
    kept = [key for key in sorted(held) if key.startswith(this_round) or "/votes/" not in key]
    return etcd_of(revision, tuple(held[key] for key in kept))


class Said(NamedTuple):
    """etcd, read."""

    lease: Lease
    lease_revision: int
    leader: PostgresLeader
    votes: tuple[Vote, ...]  # on the lease as it is
    membership: Membership


@cache
def read(etcd: Etcd) -> Said:
    """What etcd says."""
    lease, leader = get(etcd, keys.lease(CLUSTER)), get(etcd, keys.postgres_leader(CLUSTER))
    membership = get(etcd, keys.membership(CLUSTER))
    assert lease is not None
    assert leader is not None
    assert membership is not None
    prefix = keys.votes(CLUSTER, lease.mod_revision)
    votes = tuple(decode(item.value, Vote) for item in etcd.items if item.key.startswith(prefix))
    return Said(
        decode(lease.value, Lease),
        lease.mod_revision,
        decode(leader.value, PostgresLeader),
        votes,
        decode(membership.value, Membership),
    )


# --------------------------------------------------------------------------- Postgres


def timeline(wal: Wal) -> int:
    """Of the last entry."""
    return wal[-1].timeline


def began(wal: Wal) -> int:
    """Where its timeline left its parent."""
    return next(n for n, entry in enumerate(wal) if entry.timeline == timeline(wal))


def position(wal: Wal) -> tuple[int, int]:
    """What votes are compared by."""
    return timeline(wal), len(wal)


def shared(ours: Wal, theirs: Wal) -> int:
    """Where two histories part."""
    both = zip(ours, theirs, strict=False)
    return next((n for n, (a, b) in enumerate(both) if a != b), min(len(ours), len(theirs)))


def accepts(sender: Wal, standby: Wal) -> bool:
    """Whether the sender streams to it, judged as Postgres does: by the timelines' ends, not by content."""
    if len(standby) > len(sender):
        return False
    ends = [n + 1 for n, entry in enumerate(sender) if entry.timeline == timeline(standby)]
    return bool(ends) and len(standby) <= ends[-1]


def acks_needed(member: Member) -> int:
    """How many others its Postgres waits for."""
    return member.synchronous.acks


def counts(member: Member, number: int, other: int) -> bool:
    """Whether this primary takes the other's word."""
    return number != other and NODES[other] in member.synchronous.names


def acknowledgeable(member: Member, number: int) -> list[Entry]:
    """The rows of its own timeline that this primary may tell its clients of."""
    mine = timeline(member.wal)
    others = sorted((r for n, r in enumerate(member.reports) if counts(member, number, n)), reverse=True)
    needed = acks_needed(member)
    safe = others[needed - 1] if needed else len(member.wal)
    return [entry for entry in member.wal[:safe] if entry.timeline == mine and entry.row]


def settled(world: World) -> World:
    """The world with everything acknowledged that may be, and without what makes no difference any more."""
    revision = read(world.etcd).lease_revision
    for number, member in enumerate(world.members):
        if member.primary():
            rows = {(e.timeline, e.row) for e in acknowledgeable(member, number)}
            if not rows.issubset(world.acknowledged):
                world = world._replace(acknowledged=tuple(sorted(rows.union(world.acknowledged))))
        if 0 < member.promised < revision:
            world = put(world, number, member._replace(promised=0))
    return world


def put(world: World, number: int, member: Member) -> World:
    """The world with this member changed."""
    members = world.members
    return world._replace(members=(*members[:number], member, *members[number + 1 :]))
