"""A change of members as each of them sees it, by example; and that any primary can carry it on."""

from __future__ import annotations

import msgspec
import pytest

from pgha.change import enough
from pgha.decide import decide
from pgha.membership import next_step, resting, retargeted, settled, walk, whole
from pgha.model import Action, Decision, Membership, Quorum, Replica, Synchronous, View
from tests.support.pgha_views import CALM, LEADING, NODES, NOW, ROUND, but, leader, vote

THREE = settled(NODES)
FOUR = settled((*NODES, "d"))
HALF, _ = walk(THREE, FOUR.voters)  # 2 of 3 elect, the primary and 2 others of 4 acknowledge
AT = 100  # where flushed WAL ended when d was added


def record(quorum: Quorum, target: tuple[str, ...], lsn: int = AT) -> Membership:
    return Membership(quorum=quorum, target=target, added_lsn=lsn)


def leading(membership: Membership | None, *, complete: bool = True, **flushed: int) -> View:
    """The primary a, with these replicas; its Postgres goes by the record."""
    quorum = THREE if membership is None else membership.quorum
    status = msgspec.structs.replace(LEADING.status, synchronous=quorum.synchronous)
    replicas = tuple(Replica(name=name, flushed_lsn=lsn) for name, lsn in flushed.items())
    return but(LEADING, membership=membership, status=status, replicas=replicas, complete=complete)


def writes(rule: str, membership: Membership) -> Decision:
    return Decision(rule=rule, action=Action.RECONFIGURE, membership=membership)


WAIT = Decision(rule="members_wait")
WITHOUT_A = Quorum(voters=NODES, votes=2, synchronous=Synchronous(names=("b", "c"), acks=1))
ADDING = record(THREE, FOUR.voters)
ACKS_FIRST = record(HALF, FOUR.voters)
EXAMPLES: list[tuple[str, View, str, Decision]] = [
    (
        "the first record",
        leading(None, b=100, c=100),
        "a",
        writes("record_members", Membership(quorum=THREE, target=NODES)),
    ),
    ("nothing to do", leading(record(THREE, NODES), b=100, c=100), "a", Decision(rule="leading")),
    (
        "where the new one must come to is noted first",
        leading(record(THREE, FOUR.voters, 0), b=100, c=100),
        "a",
        writes("members_change", ADDING),
    ),
    ("the new one is not there", leading(ADDING, b=200, c=200), "a", WAIT),
    ("the new one is behind", leading(ADDING, b=200, c=200, d=AT - 1), "a", WAIT),
    ("more acknowledge first", leading(ADDING, b=200, c=200, d=AT), "a", writes("members_step", ACKS_FIRST)),
    (
        "a dead one is no reason to wait with another's help",
        leading(ADDING, b=200, d=AT),
        "a",
        writes("members_step", ACKS_FIRST),
    ),
    (
        "Postgres follows the record",
        but(leading(ACKS_FIRST), status=LEADING.status),
        "a",
        Decision(rule="synchronise", action=Action.SYNCHRONISE),
    ),
    (
        "so it does at a replica",
        but(CALM, membership=ACKS_FIRST),
        "b",
        Decision(rule="synchronise", action=Action.SYNCHRONISE),
    ),
    (
        "and only when a quorum has what was acknowledged before, voters change",
        leading(ACKS_FIRST, complete=False, b=200, c=200, d=200),
        "a",
        WAIT,
    ),
    (
        "the voters",
        leading(ACKS_FIRST, b=200, c=200, d=200),
        "a",
        writes("members_step", record(FOUR, FOUR.voters)),
    ),
    (
        "the wish was taken back half-way",
        leading(record(HALF, NODES), b=200, c=200),
        "a",
        writes("members_step", Membership(quorum=THREE, target=NODES, added_lsn=AT, retired=("d",))),
    ),
    (
        "not while commits would hang",
        leading(record(THREE, ("a", "b")), c=200),
        "a",
        WAIT,
    ),
    (
        "not while nobody could succeed us",
        leading(record(FOUR, NODES), b=200, d=200),
        "a",
        WAIT,
    ),
    (
        "the primary itself is to go: it hands over to one that stays",
        leading(record(FOUR, ("b", "c", "d")), b=199, c=200, d=198),
        "a",
        Decision(rule="members_step_aside", action=Action.STEP_DOWN, target="c"),
    ),
    (
        "whose removal was taken back, and who is primary by now, has what there is",
        leading(record(WITHOUT_A, NODES), b=200, c=200),
        "a",
        writes("members_step", record(THREE, NODES)),
    ),
    ("... if there is one", leading(record(FOUR, ("b", "c", "d"))), "a", WAIT),
    (
        "no vote before the voters have changed",
        but(
            ROUND,
            membership=ACKS_FIRST,
            status=msgspec.structs.replace(ROUND.status, synchronous=HALF.synchronous),
        ),
        "d",
        Decision(rule="no_vote"),
    ),
    (
        "and a vote of one who has none does not count",
        but(ROUND, votes=(vote("d"), vote("b"))),
        "b",
        Decision(rule="await_votes"),
    ),
    (
        "who was removed",
        but(CALM, membership=Membership(quorum=THREE, target=NODES, retired=("d",))),
        "d",
        Decision(rule="removed"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("view", "me", "expected"), [e[1:] for e in EXAMPLES], ids=[e[0] for e in EXAMPLES])
def test_examples(view: View, me: str, expected: Decision) -> None:
    decision = decide(view, me, NOW)
    assert msgspec.structs.replace(decision, detail="") == expected


def test_what_is_enough() -> None:
    view = but(leading(ACKS_FIRST, complete=False, b=89, c=90, d=90), complete_lsn=90)
    assert enough(view, "a")
    assert not enough(but(view, complete_lsn=91), "a")
    assert not enough(but(view, complete_lsn=0), "a")  # nothing is known yet
    assert not enough(but(view, status=LEADING.status), "a")  # Postgres still goes by 1 of 3
    stranger = but(leading(ADDING, complete=False, d=90), complete_lsn=90)
    assert not enough(stranger, "a")  # d has no word yet


def test_from_three_to_two_by_four_and_every_primary_may_be_another() -> None:
    """Whoever is asked for the next decision needs nothing but the record."""
    now = record(THREE, THREE.voters)
    for target in (FOUR.voters, ("b", "c", "d"), ("b", "c")):
        now = retargeted(now, target)
        for turn in range(20):
            me = next(n for n in target[turn % 2 :] if n in now.quorum.voters)
            others = {n: 500 for n in FOUR.voters if n != me}
            view = leading(now, complete=True, **others)
            view = but(view, leader=leader(me))
            decision = decide(view, me, NOW)
            if decision.membership is None:
                break
            now = decision.membership
        assert resting(now)
        assert now.quorum.voters == target
        assert whole(now.quorum)
        assert next_step(now.quorum, target) is None
    assert now.retired == ("a", "d")
