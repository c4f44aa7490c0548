"""The protocol with one of its three supports removed. The model must find each of them.

Each also forgets what was remembered of the real protocol, before and after.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from unittest import mock

import pgha.decide
import pgha.membership
from flyd.ports import Delete, Put, Unchanged
from pgha import keys
from pgha.model import Quorum, Vote
from tests.simulation.model import acts, steps
from tests.simulation.model.world import CLUSTER, Etcd, Member, txn


def _still_streaming(member: Member) -> Member:
    return member


@contextmanager
def no_fence() -> Generator[None]:
    """A voter says what it has and goes on streaming from the old primary."""
    with mock.patch.object(steps, "fence", _still_streaming):
        yield


def _blind_txn(etcd: Etcd, compares: tuple[Unchanged, ...], effects: tuple[Put | Delete, ...]) -> Etcd | None:
    leader = keys.postgres_leader(CLUSTER)
    if any(effect.key == leader for effect in effects):
        compares = tuple(c for c in compares if c.key != keys.lease(CLUSTER))
    return txn(etcd, compares, effects)


@contextmanager
def no_revision_compare() -> Generator[None]:
    """A take-over does not look whether the lease still is at the revision that was voted on."""
    with mock.patch.object(steps, "txn", _blind_txn):
        yield


def _on_one_vote(cast: tuple[Vote, ...], mine: Vote, quorum: Quorum) -> bool:
    return True


@contextmanager
def no_quorum_overlap() -> Generator[None]:
    """One vote elects: a quorum of acknowledgements and the voters need not share a member."""
    acts.forget()
    with mock.patch.object(pgha.decide, "may_win", _on_one_vote):
        yield
    acts.forget()


@contextmanager
def acknowledged_by_nobody_else() -> Generator[None]:
    """A commit waits for no replica: the same overlap, removed at its other end."""
    with mock.patch("tests.simulation.model.world.acks_needed", return_value=0):
        yield


@contextmanager
def steps_in_any_order() -> Generator[None]:
    """A change of members takes its two steps without a look at the overlap: the synchronous ones first."""
    acts.forget()
    with mock.patch.object(pgha.membership, "overlap", return_value=True):
        yield
    acts.forget()


@contextmanager
def voters_change_at_once() -> Generator[None]:
    """... does not wait until what was acknowledged before is with a quorum of the new ones."""
    acts.forget()
    with mock.patch.object(acts, "enough", return_value=True):
        yield
    acts.forget()


# Each found while c is added to two, or taken from three.
CHANGE_MUTANTS = ((steps_in_any_order, 2), (voters_change_at_once, 3))
MUTANTS = (no_fence, no_revision_compare, no_quorum_overlap, acknowledged_by_nobody_else)
