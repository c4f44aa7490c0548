"""The steps by which members change: written out, and the law that each of them keeps."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgha import membership
from pgha.membership import (
    newcomers,
    next_step,
    overlap,
    resting,
    retargeted,
    settled,
    stepped,
    walk,
    whole,
    words_needed,
)
from pgha.model import Membership, Quorum, Synchronous

NAMES = "abcdefgh"


def told(quorum: Quorum) -> str:
    """As "2 of abc elect, 1 of abcd acknowledges"."""
    voters, names = "".join(quorum.voters), "".join(quorum.synchronous.names)
    return f"{quorum.votes} of {voters}, {quorum.synchronous.acks} of {names}"


@pytest.mark.parametrize(
    ("begin", "target", "steps"),
    [
        ("abc", "abc", []),
        ("ab", "abc", ["2 of abc, 1 of ab", "2 of abc, 1 of abc"]),
        ("abc", "abcd", ["2 of abc, 2 of abcd", "2 of abcd, 2 of abcd"]),
        ("abcd", "abcde", ["3 of abcde, 2 of abcd", "3 of abcde, 2 of abcde"]),
        ("abc", "ab", ["2 of abc, 1 of ab", "1 of ab, 1 of ab"]),
        ("abcd", "abc", ["2 of abc, 2 of abcd", "2 of abc, 1 of abc"]),
        (
            "abc",  # a dead one is replaced: first more, then less
            "abd",
            [
                "2 of abc, 2 of abcd",
                "2 of abcd, 2 of abcd",
                "2 of abd, 2 of abcd",
                "2 of abd, 1 of abd",
            ],
        ),
    ],
)
def test_the_steps(begin: str, target: str, steps: list[str]) -> None:
    assert [told(step) for step in walk(settled(tuple(begin)), tuple(target))] == steps


def meet(quorum: Quorum) -> bool:
    """`overlap`, by trying every pair of sets."""
    for primary in quorum.voters:
        others = [n for n in quorum.synchronous.names if n != primary]
        for acks in itertools.combinations(others, quorum.synchronous.acks):
            for votes in itertools.combinations(quorum.voters, quorum.votes):
                if not {primary, *acks} & set(votes):
                    return False
    return True


def possible(quorum: Quorum) -> bool:
    """Commits can be acknowledged, and with any one member lost somebody can be elected."""
    acks = all(
        len([n for n in quorum.synchronous.names if n != primary]) >= quorum.synchronous.acks
        for primary in quorum.voters
    )
    return acks and len(quorum.voters) - 1 >= quorum.votes


memberships = st.lists(st.sampled_from(NAMES), min_size=2, max_size=7, unique=True).map(tuple)


@settings(deadline=None)
@given(voters=memberships, names=memberships, data=st.data())
def test_overlap_is_what_it_says(
    voters: tuple[str, ...], names: tuple[str, ...], data: st.DataObject
) -> None:
    votes = data.draw(st.integers(1, len(voters)))
    acks = data.draw(st.integers(0, len(names) - 1))
    quorum = Quorum(voters=voters, votes=votes, synchronous=Synchronous(names=names, acks=acks))
    assert overlap(quorum) == meet(quorum)


@settings(max_examples=200, deadline=None)
@given(begin=memberships, targets=st.lists(memberships, min_size=1, max_size=4), data=st.data())
def test_every_step_of_every_walk_is_safe_wherever_it_is_interrupted(
    begin: tuple[str, ...], targets: list[tuple[str, ...]], data: st.DataObject
) -> None:
    """However often the aim changes on the way: from anywhere it goes on, and back."""
    quorum = settled(begin)
    for target in targets:
        steps = list(walk(quorum, target))
        assert set(steps[-1].voters if steps else quorum.voters) == set(target)
        assert len(steps) <= 2 * len(set(quorum.voters) ^ set(target)) + 2
        for step in steps[: data.draw(st.integers(0, len(steps)))]:
            assert meet(step)
            assert possible(step)
            # One side at a time, so that no crash falls between two changes.
            sides = ((quorum.voters, quorum.votes), quorum.synchronous)
            assert ((step.voters, step.votes) == sides[0]) != (step.synchronous == sides[1])
            assert len(set(step.voters) ^ set(step.synchronous.names)) <= 1
            quorum = step


@settings(deadline=None)
@given(begin=memberships, target=memberships)
def test_the_way_back_is_the_same_steps(begin: tuple[str, ...], target: tuple[str, ...]) -> None:
    steps = [settled(begin), *walk(settled(begin), target)]
    for n, half_way in enumerate(steps):
        if not whole(half_way):
            back = next_step(half_way, steps[n - 1].voters if whole(steps[n - 1]) else begin)
            assert back is not None
            assert meet(back)
            assert whole(back)


def test_the_wrong_order_is_seen_by_the_law() -> None:
    """3 -> 4 with the voters first, 4 -> 5 with the acknowledgements first."""
    three, four, five = (settled(tuple("abcde"[:n])) for n in (3, 4, 5))
    wrong = (
        Quorum(voters=four.voters, votes=four.votes, synchronous=three.synchronous),
        Quorum(voters=four.voters, votes=four.votes, synchronous=five.synchronous),
    )
    for quorum in wrong:
        assert not meet(quorum)
        assert not overlap(quorum)
    with mock.patch.object(membership, "overlap", return_value=True):  # as if the check were not there
        assert next_step(four, five.voters) == wrong[1]


def test_who_is_new_and_who_is_out() -> None:
    record = Membership(quorum=settled(("a", "b", "c")), target=("a", "b", "c"))
    assert resting(record)
    more = retargeted(record, ("a", "b", "c", "d"))
    assert not resting(more)
    step = next_step(more.quorum, more.target)
    assert step is not None
    assert newcomers(more.quorum, step) == ("d",)
    half = stepped(more, step)
    back = retargeted(half, ("a", "b", "c"))
    assert back.retired == ()  # d still acknowledges
    step = next_step(back.quorum, back.target)
    assert step is not None
    assert step == settled(("a", "b", "c"))
    out = stepped(back, step)
    assert out.retired == ("d",)
    assert resting(out)
    assert retargeted(more, ("a", "b", "c")).retired == ("d",)  # it had no word yet


def test_a_holder_without_etcd_needs_the_words_of_the_next_step_too() -> None:
    assert words_needed(Membership(quorum=settled(("a", "b", "c")), target=("a", "b", "c"))) == 1
    half = Membership(
        quorum=Quorum(
            voters=("a", "b", "c"), votes=2, synchronous=Synchronous(names=("a", "b", "c", "d"), acks=2)
        ),
        target=("a", "b", "c", "d"),
    )
    assert words_needed(half) == 2
