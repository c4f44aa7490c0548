"""What one member does next: an ordered tuple of small named rules, the first that matches wins.

Pure: a frozen View in, a Decision out. Called by pgha/agent.py at each turn, by the
simulator and by the tests; it reads no clock (`now` is given) and does nothing.

What the rules keep (README.md has the argument):
- Only a node that won its epoch in this very process may be out of recovery.
- A member that promised itself to a round follows nobody until it sees a newer lease revision.
- A take-over needs `votes_needed` votes of one lease revision, none of them past the winner's.
"""

from __future__ import annotations

from collections.abc import Callable

from flyd.model import PostgresLeader
from pgha.model import (
    FIRST_TIMELINE,
    LATCH_S,
    TTL_S,
    YIELD_S,
    Action,
    DataState,
    Decision,
    View,
    Vote,
)

Rule = Callable[[View, str, float], Decision | None]


def acks_needed(members: int) -> int:
    """How many replicas must have flushed a commit before it is acknowledged (ANY k)."""
    return members // 2


def votes_needed(members: int) -> int:
    """How many votes elect: with `acks_needed` more than there are members, so any two meet in one."""
    return members - acks_needed(members)


def decide(view: View, me: str, now: float) -> Decision:
    """The first rule that matches."""
    for rule in RULES:
        decision = rule(view, me, now)
        if decision is not None:
            return decision
    return Decision(rule="no_rule", detail="nothing to do")


def lease_alive(view: View, now: float) -> bool:
    """Whether the holder must be taken as alive, by this agent's own clock."""
    return view.lease is not None and not view.lease.released and now - view.lease_seen_s < TTL_S


def own_term(view: View, me: str) -> bool:
    """This very process won the present epoch."""
    return view.leader is not None and view.leader.node == me and view.leader.epoch == view.won_epoch


def promoted(view: View) -> bool:
    """The present leader has left recovery (so its timeline can be followed)."""
    leader = view.leader
    return leader is not None and any(h.epoch == leader.epoch and h.switch_lsn for h in view.history)


def fork_lsn(view: View, timeline: int) -> int | None:
    """Where the leader's history left `timeline`; None if `timeline` is no ancestor of it."""
    by_epoch = {h.epoch: h for h in view.history}
    step = by_epoch.get(view.leader.epoch) if view.leader is not None else None
    while step is not None:
        if step.parent == timeline:
            return step.switch_lsn
        step = by_epoch.get(step.parent)
    return None


def diverged(view: View, leader: PostgresLeader) -> bool:
    """We have replayed WAL that is not part of the leader's history.

    Where an epoch began is unknown (0) if its primary died before it could record it. Then
    Postgres has the last word: it refuses to stream to us, and LATCH_S later we rewind.
    """
    if view.status.timeline == leader.epoch:
        return False
    fork = fork_lsn(view, view.status.timeline)
    return fork is None or 0 < fork < view.status.replayed_lsn


# --------------------------------------------------------------------------- a human is needed


def lost_store(view: View, me: str, now: float) -> Decision | None:
    """Data, but etcd knows of no cluster: the wrong etcd or a lost one (I14)."""
    if view.bootstrap is None and view.data.state is not DataState.EMPTY:
        detail = "etcd knows nothing of this cluster but here is data: wrong endpoints, or etcd was lost"
        return Decision(rule="lost_store", detail=detail)
    return None


def store_went_back(view: View, me: str, now: float) -> Decision | None:
    """We promised ourselves to a revision that etcd has not reached: an older etcd was restored."""
    if view.lease is not None and view.data.promised > view.lease_revision:
        detail = f"promised lease revision {view.data.promised}, etcd is at {view.lease_revision}: restored?"
        return Decision(rule="store_went_back", detail=detail)
    return None


def foreign_data(view: View, me: str, now: float) -> Decision | None:
    """The data directory belongs to another cluster."""
    known = {h.system_id for h in view.history}
    if view.data.state is DataState.READY and known and view.data.system_id not in known:
        detail = f"data of system {view.data.system_id}, the cluster is {', '.join(sorted(known))}"
        return Decision(rule="foreign_data", detail=detail)
    return None


# --------------------------------------------------------------------------- terms that are over


def old_primary(view: View, me: str, now: float) -> Decision | None:
    """Out of recovery without owning the present epoch: stop at once."""
    if view.status.primary() and not own_term(view, me):
        epoch = view.leader.epoch if view.leader is not None else 0
        return Decision(rule="old_primary", action=Action.DEMOTE, epoch=epoch)
    return None


def dead_term(view: View, me: str, now: float) -> Decision | None:
    """The lease is ours, but Postgres is down or the term was of an earlier process: give it back."""
    lease = view.lease
    if lease is None or lease.node != me or lease.released:
        return None
    if view.won_epoch == lease.epoch and view.status.running:
        return None
    return Decision(rule="dead_term", action=Action.RELEASE, revision=view.lease_revision)


# --------------------------------------------------------------------------- getting data, getting up


def bootstrap(view: View, me: str, now: float) -> Decision | None:
    """A cluster that never had a leader: the first voter makes it, once."""
    if view.leader is not None or view.data.state is not DataState.EMPTY:
        return None
    if view.bootstrap is None and me == view.voters[0]:
        return Decision(rule="bootstrap_claim", action=Action.CLAIM_BOOTSTRAP)
    if view.bootstrap is not None and view.bootstrap.node == me:
        return Decision(rule="bootstrap_initialise", action=Action.INITIALISE)
    return Decision(rule="bootstrap_wait", detail=f"waiting for {view.voters[0]} to make the cluster")


def no_usable_data(view: View, me: str, now: float) -> Decision | None:
    """Empty, or a copy or rewind was cut short: copy the leader's."""
    if view.data.state is DataState.READY:
        return None
    leader = view.leader
    if leader is not None and leader.node != me and promoted(view) and lease_alive(view, now):
        return Decision(rule="copy_leader", action=Action.COPY, address=leader.address, epoch=leader.epoch)
    return Decision(rule="copy_wait", detail="no usable data here, and no leader to copy from yet")


def down(view: View, me: str, now: float) -> Decision | None:
    """Postgres is not up."""
    if not view.status.running:
        return Decision(rule="start", action=Action.START)
    if not view.status.ready:
        return Decision(rule="starting", detail="Postgres takes no connections yet")
    return None


# --------------------------------------------------------------------------- our term


def complete_term(view: View, me: str, now: float) -> Decision | None:
    """Won but not open yet: promote, then wait until a quorum has all of it (I9)."""
    leader = view.leader
    if leader is None or not own_term(view, me):
        return None
    if view.status.in_recovery or not promoted(view):
        return Decision(rule="promote", action=Action.PROMOTE, epoch=leader.epoch)
    if leader.serving:
        return None
    complete = [r for r in view.replicas if r.flushed_lsn >= view.complete_lsn > 0]
    if len(complete) >= acks_needed(len(view.voters)):
        return Decision(rule="serve", action=Action.SERVE, epoch=leader.epoch)
    return Decision(rule="await_quorum", detail="no quorum of replicas has everything yet")


def lead(view: View, me: str, now: float) -> Decision | None:
    """Open: carry on, or hand over when asked to."""
    if not own_term(view, me):
        return None
    wish = view.switchover
    if wish is None:
        return Decision(rule="leading")
    streaming = [r.name for r in view.replicas if r.streaming]
    if wish.target == me or (wish.target not in streaming if wish.target else not streaming):
        detail = f"{wish.target or 'no replica'} is not a replica that streams"
        return Decision(rule="switchover_impossible", action=Action.REFUSE_SWITCHOVER, detail=detail)
    return Decision(rule="switchover", action=Action.STEP_DOWN, target=wish.target)


def first_term(view: View, me: str, now: float) -> Decision | None:
    """The cluster was made here and nobody ever led it."""
    if view.leader is not None:
        return None
    if view.bootstrap is not None and view.bootstrap.node == me:
        return Decision(rule="first_term", action=Action.TAKE_OVER, epoch=FIRST_TIMELINE + 1)
    return Decision(rule="no_leader", detail="data here, but etcd names no leader and another was to begin")


# --------------------------------------------------------------------------- somebody else's term


def follow(view: View, me: str, now: float) -> Decision | None:
    """The holder lives and we are not promised to a round against this lease: be its replica."""
    leader = view.leader
    if leader is None or leader.node == me or not lease_alive(view, now):
        return None
    if view.data.promised >= view.lease_revision or any(v.node == me for v in view.votes):
        return None
    if view.status.timeline > leader.epoch:
        detail = f"timeline {view.status.timeline} is ahead of epoch {leader.epoch}: this cannot be"
        return Decision(rule="ahead_of_history", detail=detail)
    if not promoted(view):
        return Decision(rule="await_promotion", detail=f"{leader.node} is not out of recovery yet")
    # Its copy of what was acknowledged is not given up before a quorum elsewhere has had all of it.
    latched = view.unlatched_s == 0 or now - view.unlatched_s < LATCH_S or not leader.serving
    if view.status.upstream == leader.address and latched:
        return Decision(rule="following")
    if not view.status.idle:
        return Decision(rule="replaying", detail="local WAL is not replayed yet")
    if diverged(view, leader) or not latched:
        rule = "diverged" if latched else "cannot_stream"
        return Decision(rule=rule, action=Action.REWIND, address=leader.address, epoch=leader.epoch)
    return Decision(rule="follow", action=Action.FOLLOW, address=leader.address, epoch=leader.epoch)


# --------------------------------------------------------------------------- a round


def cast_vote(view: View, me: str, now: float) -> Decision | None:
    """The lease ran out or was given back: close ourselves and say what we have."""
    if view.lease is None or any(v.node == me for v in view.votes):
        return None
    if lease_alive(view, now) and view.data.promised < view.lease_revision:
        return None
    return Decision(rule="vote", action=Action.VOTE, revision=view.lease_revision)


def may_win(votes: tuple[Vote, ...], mine: Vote, members: int) -> bool:
    """Enough votes are not past ours (so what is past ours was never acknowledged)."""
    return sum(1 for v in votes if v.position() <= mine.position()) >= votes_needed(members)


def own_succession(leader: PostgresLeader, me: str) -> bool:
    """The newest epoch is ours already: our data had everything when we won it, and is still here.

    Nothing can have been acknowledged without us since (the voters of that round are closed to
    older epochs, and in ours we flush first). So we may succeed ourselves alone, for instance
    when we fell before any replica had its first copy and nobody else has anything to vote with.
    """
    return leader.node == me


def elect(view: View, me: str, now: float) -> Decision | None:
    """Take over if we are the preferred one, or if the preferred one let its chance pass."""
    lease, leader = view.lease, view.leader
    mine = next((v for v in view.votes if v.node == me), None)
    if lease is None or leader is None or mine is None:
        return Decision(rule="no_lease", detail="etcd names a leader but has no lease: its keys were damaged")
    if not may_win(view.votes, mine, len(view.voters)) and not own_succession(leader, me):
        return Decision(rule="await_votes", detail=f"{len(view.votes)} votes, not enough for us")
    opened_s = view.lease_seen_s + (0.0 if lease.released else TTL_S)
    patient = now - opened_s < YIELD_S
    order = sorted(view.votes, key=lambda v: (v.node != lease.target, view.voters.index(v.node)))
    preferred = max(order, key=lambda v: v.position())  # of equals the first
    absent = lease.target in view.voters and all(v.node != lease.target for v in view.votes)
    if patient and (absent or preferred.node != me):
        return Decision(rule="yield", detail=f"leaving the first move to {lease.target or preferred.node}")
    return Decision(
        rule="take_over", action=Action.TAKE_OVER, epoch=leader.epoch + 1, revision=view.lease_revision
    )


RULES: tuple[Rule, ...] = (
    lost_store,
    store_went_back,
    foreign_data,
    old_primary,
    dead_term,
    bootstrap,
    no_usable_data,
    down,
    complete_term,
    lead,
    first_term,
    follow,
    cast_vote,
    elect,
)
