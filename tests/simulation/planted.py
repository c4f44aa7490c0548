"""Bugs put in on purpose, each by replacing one function: the checkers must find them.

Used by test_simulation.py. Nothing in flyd or pgha knows of these.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from unittest import mock

import msgspec

import pgha.decide
import pgha.term
from flyd.model import Reservations, Volume
from flyd.placement import placer
from flyd.placement.scheduler import Placement, Refusal, Request, Snapshot, schedule
from flyd.ports import Delete, Put, TxnResult, Unchanged
from flyd.store import keys
from pgha.model import Position
from tests.simulation.network import SimulatedKV
from tests.simulation.postgres import SimulatedPostgres


def _forgetful(request: Request, snapshot: Snapshot) -> Placement | Refusal:
    """As if no machine had been promised anything yet."""
    forgotten = {
        host: Reservations(host=host, volumes_gb=promised.volumes_gb, addresses=promised.addresses)
        for host, promised in snapshot.reservations.items()
    }
    return schedule(request, msgspec.structs.replace(snapshot, reservations=forgotten))


@contextmanager
def placer_over_capacity() -> Generator[None]:
    """A placer that promises more than a host has."""
    with mock.patch.object(placer, "schedule", _forgetful):
        yield


def _held_too(
    name: str, request: Request, volumes: tuple[Volume, ...], taken: tuple[str, ...]
) -> tuple[Volume, ...]:
    """As if no volume were attached to a machine."""
    if request.guest is None:
        return ()
    here = (v for v in volumes if request.region in (None, v.region))
    return tuple(v for v in here if v.name == name and v.id not in taken)


@contextmanager
def placer_that_shares_volumes() -> Generator[None]:
    """A placer that gives a volume to a second machine."""
    with mock.patch("flyd.placement.scheduler._free_volumes", _held_too):
        yield


@contextmanager
def placer_without_compare() -> Generator[None]:
    """A placer that does not look whether somebody else promised the same capacity meanwhile."""
    compared = SimulatedKV.txn

    async def blind(
        self: SimulatedKV, compares: Sequence[Unchanged], effects: Sequence[Put | Delete]
    ) -> TxnResult:
        kept = [c for c in compares if not c.key.startswith(keys.RESERVATIONS)]
        return await compared(self, kept, effects)

    with mock.patch.object(SimulatedKV, "txn", blind):
        yield


@contextmanager
def take_over_without_votes() -> Generator[None]:
    """A voter that takes over as soon as it has voted itself."""
    with mock.patch.object(pgha.decide, "may_win", return_value=True):
        yield


@contextmanager
def take_over_without_closing() -> Generator[None]:
    """A voter that says what it has and goes on streaming from the old primary."""

    async def look(self: SimulatedPostgres) -> Position:
        disk = self._host.disk  # pyright: ignore[reportPrivateUsage]
        return Position(timeline=disk.timeline(), lsn=disk.flushed)

    with mock.patch.object(SimulatedPostgres, "fence", look):
        yield


@contextmanager
def primary_that_never_ends() -> Generator[None]:
    """A holder that neither dies nor is killed when it cannot renew its lease."""
    with mock.patch.object(pgha.term.Term, "deadline_s", property(lambda _: math.inf)):
        yield
