"""What one member does next: an ordered tuple of small named rules, the first that matches wins.

Pure: a frozen View in, a Decision out. Called by pgha/agent.py at each turn, by the
simulator and by the tests; it reads no clock (`now` is given) and does nothing.

What the rules keep (README.md has the argument):
- Only a node that won its epoch in this very process may be out of recovery.
- A member that promised itself to a round follows nobody until it sees a newer lease revision.
- A take-over needs as many votes of one lease revision as elect, none of them past the winner's.
- Nobody leaves recovery before its Postgres waits for those whose word counts by etcd's record.
- A member that told the holder to go on without etcd does not vote against it for as long as it said.
- A round opens before the lease has run out only on the word of as many voters as it takes to elect.
"""

from __future__ import annotations

from collections.abc import Callable

from flyd.model import PostgresLeader
from pgha.change import acknowledging, onlooker, quorum_of, reconfigure, removed, synchronise, votes
from pgha.model import (
    ANY_EPOCH,
    FIRST_TIMELINE,
    LATCH_S,
    OVERDUE_S,
    REFUSED_S,
    SILENT_S,
    TTL_S,
    YIELD_S,
    Action,
    DataState,
    Decision,
    Quorum,
    View,
    Vote,
)
from pgha.pause import held_back

Rule = Callable[[View, str, float], Decision | None]


def decide(view: View, me: str, now: float) -> Decision:
    """The first rule that matches."""
    for rule in RULES:
        decision = rule(view, me, now)
        if decision is not None:
            return held_back(view, decision)
    return Decision(rule="no_rule", detail="nothing to do")


def extended(view: View, now: float) -> bool:
    """We told the holder that we would not vote against its epoch yet; giving the lease back ends it."""
    lease, given = view.lease, view.extension
    if lease is None or lease.released or now >= given.until_s:
        return False
    return given.epoch in (lease.epoch, ANY_EPOCH)


def lease_alive(view: View, now: float) -> bool:
    """Whether the holder must be taken as alive, by this agent's own clock and its own word."""
    lease = view.lease
    if lease is None or lease.released:
        return False
    return now - view.lease_seen_s < TTL_S or extended(view, now)


def doubts_needed(quorum: Quorum) -> int:
    """How many voters must say that the holder is gone: without them no commit can be acknowledged."""
    return quorum.votes


def doubted(view: View) -> bool:
    """Enough voters, other than the holder, say of this very lease revision that its holder is gone."""
    lease, quorum = view.lease, quorum_of(view)
    if lease is None:
        return False
    doubters = [n for n in quorum.voters if n != lease.node and any(d.node == n for d in view.doubts)]
    return len(doubters) >= doubts_needed(quorum)


def round_open(view: View, now: float) -> bool:
    """Voters may close themselves: the lease ran out or was given back, or a quorum saw its holder gone."""
    return not lease_alive(view, now) or doubted(view)


def evidence(view: View, me: str, now: float) -> str:
    """What this voter itself has against the holder: "refused", "silent", or nothing.

    Refused: our stream has ended and the primary's host says that nobody listens, for REFUSED_S. The
    end of a primary's Postgres is the end of its epoch, so somebody must succeed it; in that time its
    agent, if it lives, gives the lease back, which is the better way. Silent: the primary leaves our
    questions unanswered for SILENT_S *and* two renewals of the lease are missing.

    Nothing counts while it is not serving: it is beginning its term, or handing over.
    """
    leader, lease, seen = view.leader, view.lease, view.sighting
    if leader is None or lease is None or lease.released or me in (leader.node, lease.node):
        return ""
    if not leader.serving or not leader.epoch == lease.epoch == seen.epoch:
        return ""
    if seen.refused_since_s and now - seen.refused_since_s >= REFUSED_S and not view.status.streaming:
        return "refused"
    overdue = now - view.lease_seen_s >= OVERDUE_S
    if overdue and seen.silent_since_s and now - seen.silent_since_s >= SILENT_S:
        return "silent"
    return ""


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


def other_history(view: View, me: str, now: float) -> Decision | None:
    """Our data is no part of what etcd knows (I10): promoted by hand, or etcd is older than our data.

    A newer timeline than any epoch, or one of the same number that began elsewhere: no vote on
    it, no streaming over it. (Alike in number and beginning, they cannot be told apart.)
    """
    mine, leader = view.status, view.leader
    if leader is not None and mine.timeline > leader.epoch:
        why = "an older etcd was restored, or it was promoted by hand"
        detail = f"our timeline {mine.timeline} is ahead of epoch {leader.epoch}: {why}"
        return Decision(rule="ahead_of_history", detail=detail)
    line = next((h for h in view.history if h.epoch == mine.timeline), None)
    if line is not None and line.switch_lsn and mine.began_lsn not in (0, line.switch_lsn):
        detail = f"our timeline {line.epoch} began at {mine.began_lsn}, {line.node}'s at {line.switch_lsn}"
        return Decision(rule="other_history", detail=detail)
    return None


# --------------------------------------------------------------------------- getting data, getting up


def bootstrap(view: View, me: str, now: float) -> Decision | None:
    """A cluster that never had a leader: the first voter makes it, once."""
    if view.leader is not None or view.data.state is not DataState.EMPTY:
        return None
    if view.bootstrap is None and me == view.founders[0]:
        return Decision(rule="bootstrap_claim", action=Action.CLAIM_BOOTSTRAP)
    if view.bootstrap is not None and view.bootstrap.node == me:
        return Decision(rule="bootstrap_initialise", action=Action.INITIALISE)
    return Decision(rule="bootstrap_wait", detail=f"waiting for {view.founders[0]} to make the cluster")


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
    needed = quorum_of(view).synchronous.acks
    if view.complete_lsn > 0 and acknowledging(view, me, view.complete_lsn) >= needed:
        return Decision(rule="serve", action=Action.SERVE, epoch=leader.epoch)
    return Decision(rule="await_quorum", detail="no quorum of replicas has everything yet")


def lead(view: View, me: str, now: float) -> Decision | None:
    """Open: carry on, hand over when asked to, or change the members by a step."""
    if not own_term(view, me):
        return None
    wish = view.switchover
    if wish is None:
        return reconfigure(view, me) or Decision(rule="leading")
    streaming = [r.name for r in view.replicas if r.streaming and votes(view, r.name)]
    if wish.target == me or (wish.target not in streaming if wish.target else not streaming):
        detail = f"{wish.target or 'no replica'} is not a replica that streams"
        return Decision(rule="switchover_impossible", action=Action.REFUSE_SWITCHOVER, detail=detail)
    return Decision(rule="switchover", action=Action.STEP_DOWN, target=wish.target)


def first_term(view: View, me: str, now: float) -> Decision | None:
    """The cluster was made here and nobody ever led it."""
    if view.leader is not None:
        return None
    if view.bootstrap is not None and view.bootstrap.node == me:
        epoch = max(FIRST_TIMELINE, view.status.timeline) + 1  # restored data is on a later timeline
        return Decision(rule="first_term", action=Action.TAKE_OVER, epoch=epoch)
    return Decision(rule="no_leader", detail="data here, but etcd names no leader and another was to begin")


# --------------------------------------------------------------------------- somebody else's term


def doubt(view: View, me: str, now: float) -> Decision | None:
    """We saw that the holder is gone: say so once for this lease revision, and go on as before."""
    if round_open(view, now) or not votes(view, me) or any(d.node == me for d in view.doubts):
        return None
    saw = evidence(view, me, now)
    if not saw:
        return None
    return Decision(rule="doubt", action=Action.DOUBT, revision=view.lease_revision, detail=saw)


def follow(view: View, me: str, now: float) -> Decision | None:
    """The holder lives and we are not promised to a round against this lease: be its replica."""
    leader = view.leader
    if leader is None or leader.node == me or round_open(view, now):
        return None
    if view.data.promised >= view.lease_revision or any(v.node == me for v in view.votes):
        return None
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
    """A round is open: close ourselves and say what we have."""
    if view.lease is None or any(v.node == me for v in view.votes):
        return None
    if not round_open(view, now) and view.data.promised < view.lease_revision:
        return None
    if extended(view, now):
        return Decision(rule="extended", detail=f"told {view.lease.node} that it may go on for a while")
    return Decision(rule="vote", action=Action.VOTE, revision=view.lease_revision)


def may_win(cast: tuple[Vote, ...], mine: Vote, quorum: Quorum) -> bool:
    """Enough voters are not past us (so what is past us was never acknowledged)."""
    behind = [v for v in cast if v.node in quorum.voters and v.position() <= mine.position()]
    return len(behind) >= quorum.votes


def own_succession(leader: PostgresLeader, me: str) -> bool:
    """The newest epoch is ours already: our data had everything when we won it, and is still here.

    Nothing can have been acknowledged without us since (the voters of that round are closed to
    older epochs, and in ours we flush first). So we may succeed ourselves alone, for instance
    when we fell before any replica had its first copy and nobody else has anything to vote with.
    """
    return leader.node == me


def elect(view: View, me: str, now: float) -> Decision | None:
    """Take over if we are the preferred one, or if the preferred one let its chance pass."""
    lease, leader, quorum = view.lease, view.leader, quorum_of(view)
    cast = tuple(v for v in view.votes if v.node in quorum.voters)
    mine = next((v for v in cast if v.node == me), None)
    if lease is None or leader is None or mine is None:
        return Decision(rule="no_lease", detail="etcd names a leader but has no lease: its keys were damaged")
    if not may_win(cast, mine, quorum) and not own_succession(leader, me):
        return Decision(rule="await_votes", detail=f"{len(cast)} votes, not enough for us")
    opened_s = view.lease_seen_s + (0.0 if lease.released else TTL_S)
    patient = now - opened_s < YIELD_S
    order = sorted(cast, key=lambda v: (v.node != lease.target, quorum.voters.index(v.node)))
    preferred = max(order, key=lambda v: v.position())  # of equals the first
    absent = lease.target in quorum.voters and all(v.node != lease.target for v in cast)
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
    other_history,
    removed,
    bootstrap,
    no_usable_data,
    down,
    synchronise,
    complete_term,
    lead,
    first_term,
    doubt,
    follow,
    onlooker,
    cast_vote,
    elect,
)
