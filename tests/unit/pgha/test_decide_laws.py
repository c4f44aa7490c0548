"""What must hold for every view."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgha.change import quorum_of
from pgha.decide import decide, doubted, doubts_needed, lease_alive, may_win
from pgha.membership import acks_needed, next_step, overlap, settled, votes_needed, whole
from pgha.model import (
    LATCH_S,
    Action,
    Bootstrap,
    Data,
    DataState,
    Doubt,
    Lease,
    Membership,
    Sighting,
    Status,
    Switchover,
    View,
)
from tests.support.pgha_views import (
    HISTORY,
    LEADING,
    LONG_AGO,
    NODES,
    NOW,
    OLD,
    SYNCHRONOUS,
    leader,
    vote,
)


@pytest.mark.parametrize("members", range(2, 10))
def test_every_ack_quorum_meets_every_vote_quorum(members: int) -> None:
    others = members - 1
    assert acks_needed(members) + votes_needed(members) > others  # without the old primary's vote
    assert 1 + acks_needed(members) + votes_needed(members) > members  # with it
    assert acks_needed(members) <= others


@pytest.mark.parametrize("members", range(2, 10))
def test_without_the_doubters_no_commit_is_acknowledged(members: int) -> None:
    assert members - 1 - doubts_needed(settled(tuple("abcdefghi"[:members]))) < acks_needed(members)


MORE = settled((*NODES, "d"))
HALF = next_step(settled(NODES), MORE.voters)
assert HALF is not None
memberships = st.builds(
    Membership,
    quorum=st.sampled_from([settled(NODES), HALF, MORE]),
    target=st.sampled_from([NODES, MORE.voters, NODES[:2], NODES[1:]]),
    added_lsn=st.integers(0, 3),
    retired=st.sampled_from([(), ("c",)]),
)
lsns = st.integers(0, 3)
statuses = st.builds(
    Status,
    running=st.booleans(),
    ready=st.booleans(),
    in_recovery=st.booleans(),
    timeline=st.integers(1, 5),
    flushed_lsn=lsns,
    replayed_lsn=lsns,
    idle=st.booleans(),
    upstream=st.sampled_from(["", "x:1", leader().address]),
    streaming=st.booleans(),
    synchronous=st.sampled_from([SYNCHRONOUS, SYNCHRONOUS, MORE.synchronous]),
)
views = st.builds(
    View,
    founders=st.just(NODES),
    membership=st.none() | memberships,
    bootstrap=st.sampled_from([None, Bootstrap(node="a")]),
    leader=st.none() | st.builds(leader, st.sampled_from(NODES), st.integers(2, 5), serving=st.booleans()),
    lease=st.none()
    | st.builds(Lease, epoch=st.integers(2, 5), node=st.sampled_from(NODES), released=st.booleans()),
    lease_revision=st.integers(49, 50),
    lease_seen_s=st.sampled_from([NOW, OLD, LONG_AGO]),
    votes=st.lists(
        st.builds(vote, st.sampled_from(NODES), st.integers(2, 4), lsns), unique_by=lambda v: v.node
    ).map(tuple),
    doubts=st.lists(
        st.builds(Doubt, node=st.sampled_from(NODES), revision=st.just(50), evidence=st.just("silent")),
        unique_by=lambda d: d.node,
    ).map(tuple),
    sighting=st.builds(
        Sighting,
        epoch=st.integers(2, 5),
        refused_since_s=st.sampled_from([0.0, NOW, NOW - 1]),
        silent_since_s=st.sampled_from([0.0, NOW, NOW - 1]),
    ),
    history=st.sampled_from([(), HISTORY[:1], HISTORY]),
    switchover=st.sampled_from([None, Switchover(), Switchover(target="b")]),
    data=st.builds(
        Data, state=st.sampled_from(DataState), system_id=st.just("7"), promised=st.integers(48, 51)
    ),
    status=statuses,
    replicas=st.sampled_from([(), LEADING.replicas]),
    won_epoch=st.sampled_from([0, 2, 3, 4, 5]),
    complete_lsn=st.sampled_from([0, 90, 96]),
    complete=st.booleans(),
    unlatched_s=st.sampled_from([0.0, NOW - 1, NOW - LATCH_S]),
)


@settings(max_examples=400, deadline=None)
@given(view=views, me=st.sampled_from(NODES))
def test_what_holds_for_every_view(view: View, me: str) -> None:
    decision = decide(view, me, NOW)
    assert decision.rule != "no_rule"
    mine = [v for v in view.votes if v.node == me]
    if decision.action is Action.TAKE_OVER and view.leader is not None:
        assert mine
        assert may_win(view.votes, mine[0], quorum_of(view)) or view.leader.node == me
        assert decision.revision == view.lease_revision
        assert decision.epoch == view.leader.epoch + 1
    if decision.action in (Action.DOUBT, Action.VOTE, Action.TAKE_OVER) and view.leader is not None:
        assert me in quorum_of(view).voters
    if decision.action in (Action.PROMOTE, Action.SERVE, Action.RECONFIGURE):
        assert view.status.synchronous == quorum_of(view).synchronous
    if decision.action is Action.RECONFIGURE:
        assert decision.membership is not None
        now, then = quorum_of(view), decision.membership.quorum
        assert overlap(then)
        assert whole(now) or whole(then)
        assert now.voters == then.voters or (view.complete and now.synchronous == then.synchronous)
    if decision.action in (Action.FOLLOW, Action.REWIND):
        assert view.data.promised < view.lease_revision
        assert not mine
    if decision.action in (Action.PROMOTE, Action.SERVE, Action.STEP_DOWN) or decision.rule == "leading":
        assert view.leader is not None
        assert (view.leader.node, view.leader.epoch) == (me, view.won_epoch)
    if view.status.primary() and view.won_epoch == 0:
        assert decision.action is Action.DEMOTE or decision.rule in (
            "lost_store",
            "store_went_back",
            "foreign_data",
        )
    if decision.action is Action.VOTE and lease_alive(view, NOW) and view.data.promised < view.lease_revision:
        assert doubted(view)
    if decision.action is Action.DOUBT:
        assert view.leader is not None
        assert view.leader.serving
        assert view.leader.node != me
        assert lease_alive(view, NOW)
        assert view.sighting.refused_since_s or view.sighting.silent_since_s
    if decision.action in (Action.DOUBT, Action.VOTE, Action.TAKE_OVER):
        assert view.data.state is DataState.READY
    if decision.action is Action.COPY:
        assert view.data.state is not DataState.READY
