"""Each rule by example."""

from __future__ import annotations

import msgspec
import pytest

from pgha.decide import RULES, decide
from pgha.model import (
    LATCH_S,
    OVERDUE_S,
    REFUSED_S,
    SILENT_S,
    Action,
    Bootstrap,
    Data,
    DataState,
    Decision,
    Doubt,
    Lease,
    Sighting,
    Status,
    Switchover,
    View,
)
from tests.support.pgha_views import (
    CALM,
    EMPTY,
    FENCED,
    HISTORY,
    LEADING,
    LONG_AGO,
    NEW,
    NOW,
    OLD,
    PROMISED,
    ROUND,
    STANDBY,
    but,
    leader,
    vote,
)
from tests.unit.pgha import test_change as members


def doubt(node: str) -> Doubt:
    return Doubt(node=node, revision=50, evidence="refused")


def refused(for_s: float, epoch: int = 4) -> Sighting:
    return Sighting(epoch=epoch, refused_since_s=NOW - for_s)


def silent(for_s: float) -> Sighting:
    return Sighting(epoch=4, silent_since_s=NOW - for_s)


def but_fenced(timeline: int) -> Status:
    return msgspec.structs.replace(FENCED, timeline=timeline)


# A replica whose stream has ended, and whose primary's host says that nobody listens.
CUT = but(CALM, status=msgspec.structs.replace(STANDBY, streaming=False), sighting=refused(REFUSED_S + 0.01))
LATE = but(CALM, lease_seen_s=NOW - OVERDUE_S - 0.01, sighting=silent(SILENT_S + 0.01))
DOUBT = Decision(rule="doubt", action=Action.DOUBT, revision=50)
VOTE = Decision(rule="vote", action=Action.VOTE, revision=50)
FOLLOWING = Decision(rule="following")

EXAMPLES: list[tuple[str, View, str, Decision]] = [
    ("first voter claims", NEW, "a", Decision(rule="bootstrap_claim", action=Action.CLAIM_BOOTSTRAP)),
    ("others wait", NEW, "b", Decision(rule="bootstrap_wait")),
    (
        "the claimer initialises",
        but(NEW, bootstrap=Bootstrap(node="a")),
        "a",
        Decision(rule="bootstrap_initialise", action=Action.INITIALISE),
    ),
    (
        "and leads first",
        but(NEW, bootstrap=Bootstrap(node="a"), data=PROMISED, status=but_fenced(1)),
        "a",
        Decision(rule="first_term", action=Action.TAKE_OVER, epoch=2),
    ),
    (
        "with restored data on a later timeline",
        but(NEW, bootstrap=Bootstrap(node="a"), data=PROMISED, status=but_fenced(7)),
        "a",
        Decision(rule="first_term", action=Action.TAKE_OVER, epoch=8),
    ),
    ("data but no cluster", but(NEW, data=PROMISED), "a", Decision(rule="lost_store")),
    (
        "etcd is older than our promise",
        but(CALM, data=Data(state=DataState.READY, system_id="7", promised=51)),
        "b",
        Decision(rule="store_went_back"),
    ),
    (
        "another system's data",
        but(CALM, data=Data(state=DataState.READY, system_id="8")),
        "b",
        Decision(rule="foreign_data"),
    ),
    ("a replica follows", CALM, "b", Decision(rule="following")),
    ("a leader leads", LEADING, "a", Decision(rule="leading")),
    (
        "primary of an older epoch",
        but(LEADING, leader=leader("b", 5)),
        "a",
        Decision(rule="old_primary", action=Action.DEMOTE, epoch=5),
    ),
    (
        "primary that did not win in this process",
        but(LEADING, won_epoch=0),
        "a",
        Decision(rule="old_primary", action=Action.DEMOTE, epoch=4),
    ),
    (
        "restarted holder",
        but(CALM, status=Status()),
        "a",
        Decision(rule="dead_term", action=Action.RELEASE, revision=50),
    ),
    (
        "holder whose Postgres died",
        but(LEADING, status=Status()),
        "a",
        Decision(rule="dead_term", action=Action.RELEASE, revision=50),
    ),
    (
        "empty member copies",
        EMPTY,
        "b",
        Decision(rule="copy_leader", action=Action.COPY, address=leader().address, epoch=4),
    ),
    ("but not from one whose lease ran out", but(EMPTY, lease_seen_s=OLD), "b", Decision(rule="copy_wait")),
    ("nor from one not promoted", but(EMPTY, history=HISTORY[:1]), "b", Decision(rule="copy_wait")),
    (
        "damaged member copies",
        but(EMPTY, data=Data(state=DataState.DAMAGED)),
        "b",
        Decision(rule="copy_leader", action=Action.COPY, address=leader().address, epoch=4),
    ),
    (
        "damaged member never votes",
        but(ROUND, data=Data(state=DataState.DAMAGED)),
        "b",
        Decision(rule="copy_wait"),
    ),
    ("down", but(CALM, status=Status()), "b", Decision(rule="start", action=Action.START)),
    ("starting", but(CALM, status=Status(running=True)), "b", Decision(rule="starting")),
    (
        "winner promotes",
        but(LEADING, status=FENCED),
        "a",
        Decision(rule="promote", action=Action.PROMOTE, epoch=4),
    ),
    (
        "promoted, but its lineage is not recorded",
        but(LEADING, history=HISTORY[:1]),
        "a",
        Decision(rule="promote", action=Action.PROMOTE, epoch=4),
    ),
    (
        "a quorum is complete",
        but(LEADING, leader=leader(serving=False)),
        "a",
        Decision(rule="serve", action=Action.SERVE, epoch=4),
    ),
    (
        "no quorum is complete",
        but(LEADING, leader=leader(serving=False), complete_lsn=96),
        "a",
        Decision(rule="await_quorum"),
    ),
    (
        "completeness is not known",
        but(LEADING, leader=leader(serving=False), complete_lsn=0),
        "a",
        Decision(rule="await_quorum"),
    ),
    (
        "switchover",
        but(LEADING, switchover=Switchover(target="c")),
        "a",
        Decision(rule="switchover", action=Action.STEP_DOWN, target="c"),
    ),
    (
        "switchover to nobody",
        but(LEADING, switchover=Switchover(target="z")),
        "a",
        Decision(rule="switchover_impossible", action=Action.REFUSE_SWITCHOVER),
    ),
    (
        "follow",
        but(CALM, status=FENCED),
        "b",
        Decision(rule="follow", action=Action.FOLLOW, address=leader().address, epoch=4),
    ),
    (
        "follow from an ancestor, before the fork",
        but(CALM, status=msgspec.structs.replace(FENCED, timeline=2, replayed_lsn=80)),
        "b",
        Decision(rule="follow", action=Action.FOLLOW, address=leader().address, epoch=4),
    ),
    (
        "past the fork",
        but(CALM, status=msgspec.structs.replace(FENCED, timeline=2, replayed_lsn=81)),
        "b",
        Decision(rule="diverged", action=Action.REWIND, address=leader().address, epoch=4),
    ),
    (
        "a timeline that is no ancestor",
        but(CALM, status=msgspec.structs.replace(FENCED, timeline=3, replayed_lsn=5)),
        "b",
        Decision(rule="diverged", action=Action.REWIND, address=leader().address, epoch=4),
    ),
    (
        "not replayed yet",
        but(CALM, status=msgspec.structs.replace(FENCED, timeline=2, idle=False)),
        "b",
        Decision(rule="replaying"),
    ),
    (
        "cannot stream for long",
        but(CALM, unlatched_s=NOW - LATCH_S),
        "b",
        Decision(rule="cannot_stream", action=Action.REWIND, address=leader().address, epoch=4),
    ),
    (
        "leader not promoted",
        but(CALM, status=FENCED, history=HISTORY[:1]),
        "b",
        Decision(rule="await_promotion"),
    ),
    (
        "lease ran out",
        but(CALM, lease_seen_s=OLD),
        "b",
        Decision(rule="vote", action=Action.VOTE, revision=50),
    ),
    (
        "lease given back",
        but(CALM, lease=Lease(epoch=4, node="a", released=True)),
        "b",
        Decision(rule="vote", action=Action.VOTE, revision=50),
    ),
    (
        "promised, restarted: stays closed although the lease looks fresh",
        but(CALM, data=PROMISED, status=FENCED),
        "b",
        Decision(rule="vote", action=Action.VOTE, revision=50),
    ),
    (
        "voted, lost the promise with its disk: follows nobody",
        but(CALM, status=FENCED, votes=(vote("b"),)),
        "b",
        Decision(rule="await_votes"),
    ),
    (
        "renewed: the round is void",
        but(CALM, status=FENCED, votes=()),
        "b",
        Decision(rule="follow", action=Action.FOLLOW, address=leader().address, epoch=4),
    ),
    ("refused: doubt", CUT, "b", DOUBT),
    ("refused a moment ago: its agent may yet hand over", but(CUT, sighting=refused(0.05)), "b", FOLLOWING),
    ("refused, but our stream lives", but(CUT, status=STANDBY), "b", FOLLOWING),
    ("refused by the primary of another epoch", but(CUT, sighting=refused(1.0, epoch=3)), "b", FOLLOWING),
    ("refused, not serving: it begins or hands over", but(CUT, leader=leader(serving=False)), "b", FOLLOWING),
    ("said so already", but(CUT, doubts=(doubt("b"),)), "b", FOLLOWING),
    ("silent: doubt", LATE, "b", DOUBT),
    ("silent, but only one renewal is missing", but(LATE, lease_seen_s=NOW - 0.6), "b", FOLLOWING),
    ("a blip", but(LATE, sighting=silent(SILENT_S - 0.01)), "b", FOLLOWING),
    ("no renewals, but the primary answers", but(LATE, sighting=Sighting(epoch=4)), "b", FOLLOWING),
    ("one voter's word is not enough", but(CALM, doubts=(doubt("c"),)), "b", FOLLOWING),
    ("nor with the holder's own", but(CALM, doubts=(doubt("a"), doubt("c"))), "b", FOLLOWING),
    ("nor with a stranger's", but(CALM, doubts=(doubt("z"), doubt("c"))), "b", FOLLOWING),
    ("a quorum's word opens a round", but(CALM, doubts=(doubt("b"), doubt("c"))), "b", VOTE),
    (
        "in which votes count as ever",
        but(ROUND, lease_seen_s=NOW - 0.3, doubts=(doubt("b"), doubt("c")), votes=(vote("b"),)),
        "b",
        Decision(rule="await_votes"),
    ),
    (
        "and elect as ever",
        but(ROUND, lease_seen_s=NOW - 0.3, doubts=(doubt("b"), doubt("c")), votes=(vote("b"), vote("c"))),
        "b",
        Decision(rule="take_over", action=Action.TAKE_OVER, epoch=5, revision=50),
    ),
    ("one vote is not enough", but(ROUND, votes=(vote("b"),)), "b", Decision(rule="await_votes")),
    (
        "one is, of who won the newest epoch: it has everything",
        but(ROUND, votes=(vote("a"),), lease=Lease(epoch=4, node="a", released=True)),
        "a",
        Decision(rule="take_over", action=Action.TAKE_OVER, epoch=5, revision=50),
    ),
    (
        "best of two",
        but(ROUND, votes=(vote("b", lsn=101), vote("c"))),
        "b",
        Decision(rule="take_over", action=Action.TAKE_OVER, epoch=5, revision=50),
    ),
    ("second of two", but(ROUND, votes=(vote("b", lsn=101), vote("c"))), "c", Decision(rule="await_votes")),
    (
        "of equals the first",
        but(ROUND, votes=(vote("b"), vote("c"))),
        "b",
        Decision(rule="take_over", action=Action.TAKE_OVER, epoch=5, revision=50),
    ),
    (
        "data that is newer than etcd: no vote",
        but(ROUND, status=msgspec.structs.replace(FENCED, timeline=5)),
        "b",
        Decision(rule="ahead_of_history"),
    ),
    (
        "a timeline of the same number that began elsewhere: nothing is streamed over it",
        but(CALM, status=msgspec.structs.replace(FENCED, timeline=4, began_lsn=79)),
        "b",
        Decision(rule="other_history"),
    ),
    (
        "one that began where the cluster's did",
        but(CALM, status=msgspec.structs.replace(STANDBY, began_lsn=80)),
        "b",
        Decision(rule="following"),
    ),
    ("of equals the second yields", but(ROUND, votes=(vote("b"), vote("c"))), "c", Decision(rule="yield")),
    (
        "but not for ever",
        but(ROUND, votes=(vote("b"), vote("c")), lease_seen_s=LONG_AGO),
        "c",
        Decision(rule="take_over", action=Action.TAKE_OVER, epoch=5, revision=50),
    ),
    (
        "a longer log of an older epoch loses",
        but(ROUND, votes=(vote("b", epoch=2, lsn=900), vote("c"))),
        "c",
        Decision(rule="take_over", action=Action.TAKE_OVER, epoch=5, revision=50),
    ),
    (
        "the best is silent, two others agree without it",
        but(ROUND, votes=(vote("a", lsn=300), vote("b"), vote("c")), lease_seen_s=LONG_AGO),
        "b",
        Decision(rule="take_over", action=Action.TAKE_OVER, epoch=5, revision=50),
    ),
    (
        "the target of a switchover goes first",
        but(
            ROUND,
            lease=Lease(epoch=4, node="a", released=True, target="c"),
            lease_seen_s=NOW,
            votes=(vote("b"), vote("c")),
        ),
        "c",
        Decision(rule="take_over", action=Action.TAKE_OVER, epoch=5, revision=50),
    ),
    (
        "the others give it time to vote",
        but(
            ROUND,
            lease=Lease(epoch=4, node="a", released=True, target="c"),
            lease_seen_s=NOW,
            votes=(vote("a"), vote("b")),
        ),
        "a",
        Decision(rule="yield"),
    ),
]


@pytest.mark.parametrize(("view", "me", "expected"), [e[1:] for e in EXAMPLES], ids=[e[0] for e in EXAMPLES])
def test_examples(view: View, me: str, expected: Decision) -> None:
    decision = decide(view, me, NOW)
    assert msgspec.structs.replace(decision, detail="") == expected


def test_every_rule_has_an_example() -> None:
    for rule in RULES:
        examples = (*EXAMPLES, *members.EXAMPLES)
        assert any(rule(view, me, NOW) is not None for _, view, me, _ in examples), rule.__name__
