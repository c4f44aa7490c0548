"""Who acknowledges, who elects, and how both change without ever losing sight of each other. Pure.

A commit is acknowledged by the primary and any `acks` others of the synchronous members; a primary is elected
by any `votes` of the voters. What makes a take-over safe is that each set of the first kind shares a member
with each of the second: `overlap`. A change of the members is a walk of single steps, each of which changes
one of the two sides only, and after each of which they overlap. One member more or less takes two steps;
exactly one of their two orders keeps the overlap, and `next_step` takes that one. 3 -> 4: acknowledgements
first (any 2 of the others, not any 1); 4 -> 5: voters first. The way back is the same steps backwards.

The record in etcd is changed before Postgres (acts.py), so for a while the old and the new synchronous set
may both acknowledge; the voters change only once no process of Postgres goes by the old one, and what that
acknowledged is with a quorum of the new one (change.py waits for that: `View.complete`).

Called by pgha/decide.py, change.py, changes.py, extension.py, postgres.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from pgha.model import Membership, Quorum, Synchronous


def acks_needed(members: int) -> int:
    """How many replicas must have flushed a commit before it is acknowledged (ANY k)."""
    return members // 2


def votes_needed(members: int) -> int:
    """How many votes elect: with `acks_needed` more than there are members, so any two meet in one."""
    return members - acks_needed(members)


def settled(members: tuple[str, ...]) -> Quorum:
    """The quorums of these members when no change is under way."""
    return Quorum(
        voters=members,
        votes=votes_needed(len(members)),
        synchronous=Synchronous(names=members, acks=acks_needed(len(members))),
    )


def everybody(quorum: Quorum) -> tuple[str, ...]:
    """Whose word counts for anything, voters first."""
    return quorum.voters + tuple(n for n in quorum.synchronous.names if n not in quorum.voters)


def in_flux(membership: Membership) -> tuple[str, ...]:
    """Who is not yet, or no longer, a member in every respect."""
    quorum = membership.quorum
    sides = (quorum.voters, quorum.synchronous.names, membership.target)
    return tuple(
        n for n in dict.fromkeys(everybody(quorum) + membership.target) if any(n not in s for s in sides)
    )


def resting(membership: Membership) -> bool:
    """No change is under way."""
    return not in_flux(membership)


def whole(quorum: Quorum) -> bool:
    """Not half-way: both sides have the same members."""
    return quorum == settled(quorum.voters)


def overlap(quorum: Quorum) -> bool:
    """Whether every set that may acknowledge meets every set that may elect, whichever voter is primary.

    The worst acknowledging set keeps out of the voters' way as far as it can: the primary, and others
    that have no vote. The voters that are left must be too few to elect.
    """
    names, acks = quorum.synchronous.names, quorum.synchronous.acks
    without_vote = sum(1 for name in names if name not in quorum.voters)
    left = len(quorum.voters) - 1 - max(0, acks - without_vote)
    return left < quorum.votes


def next_step(quorum: Quorum, target: tuple[str, ...]) -> Quorum | None:
    """The next quorums on the way to these members; None: arrived. Additions come before removals."""
    if not whole(quorum):
        return _finished(quorum, target)
    wanted = _towards(quorum.voters, target)
    if wanted is None:
        return None
    after = settled(wanted)
    orders = (
        Quorum(voters=quorum.voters, votes=quorum.votes, synchronous=after.synchronous),
        Quorum(voters=after.voters, votes=after.votes, synchronous=quorum.synchronous),
    )
    return next(step for step in orders if overlap(step))


def _finished(quorum: Quorum, target: tuple[str, ...]) -> Quorum:
    """Half-way between two memberships that differ by one: to the one that is nearer to the target."""
    sides = (quorum.voters, quorum.synchronous.names)
    return settled(min(sides, key=lambda members: len(set(members) ^ set(target))))


def _towards(members: tuple[str, ...], target: tuple[str, ...]) -> tuple[str, ...] | None:
    """One member more or less."""
    for name in target:
        if name not in members:
            return (*members, name)
    for name in members:
        if name not in target:
            return tuple(n for n in members if n != name)
    return None


def walk(quorum: Quorum, target: tuple[str, ...]) -> Iterator[Quorum]:
    """Every step from here to these members."""
    while (step := next_step(quorum, target)) is not None:
        yield step
        quorum = step


def newcomers(before: Quorum, after: Quorum) -> tuple[str, ...]:
    """Whose word counts for more after this step than before it."""
    grown = (
        *(n for n in after.voters if n not in before.voters),
        *(n for n in after.synchronous.names if n not in before.synchronous.names),
    )
    return tuple(dict.fromkeys(grown))


def stepped(membership: Membership, step: Quorum) -> Membership:
    """The record after this step; who is out for good is remembered."""
    return _retiring(membership, step, membership.target, membership.added_lsn)


def retargeted(membership: Membership, target: tuple[str, ...]) -> Membership:
    """The record with another aim; a member that was not let in yet is out at once."""
    return _retiring(membership, membership.quorum, target, 0)


def _retiring(membership: Membership, quorum: Quorum, target: tuple[str, ...], added_lsn: int) -> Membership:
    here = (*everybody(quorum), *target)
    before = (*everybody(membership.quorum), *membership.target)
    gone = tuple(n for n in dict.fromkeys(before) if n not in here)
    return Membership(quorum=quorum, target=target, added_lsn=added_lsn, retired=(*membership.retired, *gone))


def words_needed(membership: Membership) -> int:
    """How many voters must bear with a holder that etcd does not answer, so that the others cannot elect.

    Half a step ahead: the record may have moved on by a transaction whose answer never came.
    """
    now = membership.quorum
    after = next_step(now, membership.target) or now
    return max(len(q.voters) - q.votes for q in (now, after))
