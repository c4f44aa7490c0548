"""Breadth first through every state of the model, and what must hold in each.

Two kinds of promises: what a client can see (lost rows, two primaries, an epoch with two owners, a standby on
top of other WAL), by which a mutant must be found; and how that is kept (I1-I6 of the issue).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

from flyd.model import decode
from pgha import keys
from pgha.model import Lineage
from tests.simulation.model.steps import Bounds, successors
from tests.simulation.model.world import (
    CLUSTER,
    NOBODY,
    NODES,
    Said,
    World,
    counts,
    first_world,
    get,
    read,
    timeline,
)

# Of three: not asked of pgha, where a mutant may have changed it.
ACKS = 1
VOTES = 2

Promise = Callable[[World, World], str]  # what is wrong with this step, or nothing


class Found(NamedTuple):
    """How an exploration ended."""

    states: int
    steps: int
    broken: str  # nothing: every state that can be reached was
    trace: tuple[str, ...]  # to the broken one
    kinds: frozenset[str]  # every step that was taken, by its label

    def told(self) -> str:
        """For a person."""
        size = f"{self.states} states, {self.steps} steps"
        if not self.broken:
            return f"{size}, every promise kept"
        return "\n  ".join((f"{size}, {self.broken}, after", *self.trace))


def explore(bounds: Bounds, promises: Sequence[Promise]) -> Found:
    """Every state within the bounds, or the shortest way to one that breaks a promise."""
    first = first_world(bounds.budget(), bounds.members)
    came: dict[World, tuple[World, str] | None] = {first: None}
    level, steps = [first], 0
    kinds: set[str] = set()
    while level:
        following: list[World] = []
        for world in level:
            for label, after in successors(world, bounds):
                steps += 1
                kinds.add(label)
                if after not in came:
                    came[after] = (world, label)
                    following.append(after)
                broken = next((b for promise in promises if (b := promise(world, after))), "")
                if broken:
                    return Found(len(came), steps, broken, (*_way(came, world), label), frozenset(kinds))
        level = following
    return Found(len(came), steps, "", (), frozenset(kinds))


def _way(came: dict[World, tuple[World, str] | None], world: World) -> tuple[str, ...]:
    labels: list[str] = []
    while (step := came[world]) is not None:
        world, label = step
        labels.append(label)
    return tuple(reversed(labels))


# --------------------------------------------------------------------------- what a client can see


def nothing_lost(before: World, after: World) -> str:
    """Whoever leads a newer epoch, or was elected to, has every row acknowledged in an older one."""
    leader = read(after.etcd).leader
    changed = before.acknowledged != after.acknowledged or before.owners != after.owners
    if not changed and read(before.etcd).leader == leader:
        return ""
    for number, member in enumerate(after.members):
        elected = NODES[number] == leader.node
        if not elected and not member.primary():
            continue
        epoch = leader.epoch if elected else timeline(member.wal)
        there = {(entry.timeline, entry.row) for entry in member.wal}
        for said in after.acknowledged:
            if said[0] < epoch and said not in there:
                row = f"row {said[1]}, acknowledged in {said[0]}"
                return f"lost: {NODES[number]} of epoch {epoch} lacks {row}"
    return ""


def one_primary(before: World, after: World) -> str:
    """No row is acknowledged that was written when a newer epoch had begun."""
    if before.acknowledged == after.acknowledged:
        return ""
    late = {(e.timeline, e.row) for m in after.members for e in m.wal if e.late}
    wrong = late.intersection(after.acknowledged)
    return f"two primaries: {sorted(wrong)}" if wrong else ""


def one_owner(before: World, after: World) -> str:
    """I1: no timeline is begun twice, and only by who won it."""
    if before.owners == after.owners:
        return ""
    timelines = [line for line, _ in after.owners]
    if len(set(timelines)) < len(timelines):
        return f"one owner: {after.owners}"
    for line, number in after.owners:
        item = get(after.etcd, keys.history(CLUSTER, line))
        if item is None or decode(item.value, Lineage).node != NODES[number]:
            return f"one owner: {NODES[number]} began timeline {line} and did not win it"
    return ""


def one_history(before: World, after: World) -> str:
    """A standby streams on top of nothing but its sender's own WAL."""
    for number, (was, member) in enumerate(zip(before.members, after.members, strict=True)):
        if was.wal is not member.wal and member.upstream != NOBODY and len(member.wal) > len(was.wal):
            sender = after.members[member.upstream].wal
            if sender[: len(member.wal)] != member.wal:
                return f"one history: {NODES[number]} streams from {NODES[member.upstream]} over other WAL"
    return ""


# --------------------------------------------------------------------------- how that is kept


def quorums_are_closed(before: World, after: World) -> str:
    """I2: too few follow a primary whose epoch is over for it to acknowledge anything."""
    epoch = read(after.etcd).leader.epoch
    for number, member in enumerate(after.members):
        if member.primary() and timeline(member.wal) < epoch:
            follow = [n for n, m in enumerate(after.members) if m.up and m.upstream == number]
            open_still = [n for n in follow if counts(member, number, n)]
            if len(open_still) >= max(ACKS, member.synchronous.acks):
                return f"I2: {open_still} still follow {NODES[number]} of epoch {timeline(member.wal)}"
    return ""


def quorums_overlap(before: World, after: World) -> str:
    """I2: each set that acknowledges meets each that elects, whatever the primary of the epoch goes by."""
    quorum, epoch = read(after.etcd).membership.quorum, read(after.etcd).leader.epoch
    for number, member in enumerate(after.members):
        if not member.primary() or timeline(member.wal) != epoch:
            continue
        others = [NODES[n] for n in range(len(NODES)) if counts(member, number, n)]
        for acks in combinations(others, member.synchronous.acks):
            for votes in combinations(quorum.voters, quorum.votes):
                if not {NODES[number], *acks} & set(votes):
                    return f"I2: {NODES[number]} and {acks} acknowledge, {votes} elect"
    return ""


def voters_are_closed(before: World, after: World) -> str:
    """I3: who has a vote in the present round streams from nobody and still is where it said."""
    for vote in read(after.etcd).votes:
        member = after.members[NODES.index(vote.node)]
        if member.upstream != NOBODY or member.promised < vote.revision or member.primary():
            return f"I3: {vote.node} is not closed although it voted on {vote.revision}"
        if (timeline(member.wal), len(member.wal)) != vote.position():
            return f"I3: {vote.node} is not where its vote says: {vote}"
    return ""


def take_over_is_covered(before: World, after: World) -> str:
    """I4, I5: won on enough votes of the lease as it was, none of them past what the winner has flushed."""
    was, now = read(before.etcd), read(after.etcd)
    if was.leader.epoch == now.leader.epoch:
        return ""
    mine = next((v for v in was.votes if v.node == now.leader.node), None)
    if mine is None or now.leader.epoch != was.leader.epoch + 1:
        return f"I4: {now.leader.node} took over without a vote of this round"
    quorum = was.membership.quorum
    behind = [v for v in was.votes if v.node in quorum.voters and v.position() <= mine.position()]
    needed = VOTES if quorum.voters == NODES else quorum.votes
    if len(behind) < needed and was.leader.node != now.leader.node:
        return f"I5: {now.leader.node} took over on {_names(was)}"
    wal = after.members[NODES.index(mine.node)].wal
    if (timeline(wal), len(wal)) != mine.position():
        return f"I5: {mine.node} has not flushed what it voted with"
    return ""


def _names(said: Said) -> str:
    return ", ".join(f"{v.node} at {v.position()}" for v in said.votes)


def quorum_of_acks(before: World, after: World) -> str:
    """I6: what is acknowledged was flushed by the primary and by a quorum of the others."""
    for line, row in set(after.acknowledged).difference(before.acknowledged):
        for number, member in enumerate(after.members):
            rows = [n + 1 for n, e in enumerate(member.wal) if (e.timeline, e.row) == (line, row)]
            if not rows or not member.primary() or timeline(member.wal) != line:
                continue
            reports = enumerate(member.reports)
            have = [n for n, r in reports if counts(member, number, n) and r >= rows[0]]
            if len(have) < ACKS:
                return f"I6: {NODES[number]} acknowledged row {row} that only {have} have"
    return ""


CLIENTS: tuple[Promise, ...] = (nothing_lost, one_primary, one_owner, one_history)
EVERY: tuple[Promise, ...] = (
    *CLIENTS,
    quorums_are_closed,
    quorums_overlap,
    voters_are_closed,
    take_over_is_covered,
    quorum_of_acks,
)
