"""Bugs put in on purpose, each by replacing one function: the checkers must find them.

Used by test_simulation.py. Nothing in flyd or pgha knows of these.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from unittest import mock

import msgspec

import pgha.agent
import pgha.decide
import pgha.extension
import pgha.membership
import pgha.model
import pgha.term
from flyd.machines import checks, leases, updates
from flyd.machines import decide as decisions
from flyd.machines.decide import Decision, Nothing, Record, Retire, View, decide
from flyd.machines.halts import Halts
from flyd.model import Machine, MachineState, Reservations, Volume
from flyd.placement import loss
from flyd.placement.index import Snapshot
from flyd.placement.loss import Silence, track
from flyd.placement.scheduler import Placement, Refusal, Request, schedule
from flyd.ports import KV, Delete, Put, TxnResult, Unchanged, WatchBatch
from flyd.storage.moving import VolumeMover
from flyd.store import keys
from flyd.store.leader import CONTROLLER
from flyd.store.mirror import Mirror
from pgha.model import Position
from tests.simulation.disk import SimulatedVolumes
from tests.simulation.network import SimulatedKV
from tests.simulation.postgres import SimulatedPostgres


def _forgetful(request: Request, snapshot: Snapshot) -> Placement | Refusal:
    """As if no machine had been promised anything yet."""
    forgotten = {
        host: Reservations(host=host, volumes_gb=promised.volumes_gb, addresses=promised.addresses)
        for host, promised in snapshot.reservations.items()
    }
    blind = Snapshot(
        hosts=snapshot.hosts,
        alive=snapshot.alive,
        reservations=forgotten,
        volumes=snapshot.volumes,
        machines=snapshot.machines,
    )
    return schedule(request, blind)


@contextmanager
def placer_over_capacity() -> Generator[None]:
    """A placer that promises more than a host has."""
    with mock.patch("flyd.placement.draft.schedule", _forgetful):
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


def _without_compares(*prefixes: str) -> mock._patch[object]:  # pyright: ignore[reportPrivateUsage]
    """Every transaction without its compares of keys under these prefixes."""
    compared = SimulatedKV.txn

    async def blind(
        self: SimulatedKV, compares: Sequence[Unchanged], effects: Sequence[Put | Delete]
    ) -> TxnResult:
        kept = [c for c in compares if not c.key.startswith(prefixes)]
        return await compared(self, kept, effects)

    return mock.patch.object(SimulatedKV, "txn", blind)


@contextmanager
def placer_without_compare() -> Generator[None]:
    """A placer that does not look whether somebody else promised the same capacity meanwhile."""
    with _without_compares(keys.RESERVATIONS):
        yield


def _never_forgets(
    before: Mapping[str, Silence], hosts: Mapping[str, int], alive: Collection[str], now_s: float
) -> dict[str, Silence]:
    """As if a host that was lost once had never come back."""
    return {**track({}, hosts, alive, now_s), **before}


@contextmanager
def double_placement() -> Generator[None]:
    """A repairer that goes by what it once saw, and does not compare whether the host is back."""
    with mock.patch.object(loss, "track", _never_forgets), _without_compares(keys.ALIVE, keys.HOSTS):
        yield


@contextmanager
def stale_leader() -> Generator[None]:
    """A repairer whose writes do not carry its leader's guard."""
    with _without_compares(keys.leader(CONTROLLER)):
        yield


@contextmanager
def lost_event() -> Generator[None]:
    """A watch that, once in a while, passes over a change of a claim."""
    whole = SimulatedKV.watch

    async def watch(self: SimulatedKV, prefix: str, from_revision: int) -> AsyncIterator[WatchBatch]:
        async for batch in whole(self, prefix, from_revision):
            claims = [c for c in batch.changes if c.key.startswith(keys.MACHINES)]
            if claims and claims[0].mod_revision % 20 == 0:
                kept = tuple(c for c in batch.changes if c not in claims)
                batch = WatchBatch(revision=batch.revision, changes=kept)
            yield batch

    with mock.patch.object(SimulatedKV, "watch", watch):
        yield


def _as_remembered(view: View) -> Decision:
    """As if a machine that the host remembers were always its own."""
    if view.record is not None and view.claim is not None and view.claim.host != view.host:
        view = msgspec.structs.replace(view, claim=view.record.assignment.claim)
    return decide(view)


@contextmanager
def resurrected_machine() -> Generator[None]:
    """A host that comes back and goes on with what it remembers."""
    with mock.patch("flyd.machines.host.decide", _as_remembered):
        yield


@contextmanager
def leaked_reservation() -> Generator[None]:
    """A host that keeps the room of a machine which was placed elsewhere meanwhile."""

    async def keep(kv: KV, mirror: Mirror, host: str, here: Collection[str]) -> tuple[str, ...]:
        return ()

    with mock.patch("flyd.machines.host.free_leftovers", keep):
        yield


@contextmanager
def checks_that_restart_nothing() -> Generator[None]:
    """A host that sees a check fail, and lets the machine run on."""
    with mock.patch.object(checks, "condemns", return_value=False):
        yield


def _staying(view: View) -> Decision:
    """As if no machine were to go by itself."""
    decision = decide(view)
    return Nothing() if isinstance(decision, Retire) else decision


@contextmanager
def machine_that_does_not_go() -> Generator[None]:
    """A host that keeps what was to be destroyed once it had ended."""
    with mock.patch("flyd.machines.host.decide", _staying):
        yield


def _hasty(view: View) -> Decision:
    """As if every machine that was stopped were to go."""
    decision = decide(view)
    stopped = view.record is not None and view.record.state is MachineState.STOPPED
    at_rest = isinstance(decision, Nothing) and view.observed is not None and not view.observed.running
    return Retire() if at_rest and stopped else decision


@contextmanager
def host_that_gives_machines_up() -> Generator[None]:
    """A host that wants gone whatever rests."""
    with mock.patch("flyd.machines.host.decide", _hasty):
        yield


@contextmanager
def schedule_that_never_comes() -> Generator[None]:
    """A host whose next start is always a while away."""
    with mock.patch.object(decisions, "wait_s", return_value=60.0):
        yield


async def _whoever_asks(kv: KV, app: str, machine_id: str, nonce: str) -> Unchanged:
    """As if every lease were the caller's."""
    record = await kv.get(leases.lease_key(app, machine_id))
    return Unchanged(leases.lease_key(app, machine_id), record.mod_revision if record is not None else 0)


@contextmanager
def lease_that_binds_nobody() -> Generator[None]:
    """A command that does not ask whose the lease is."""
    with mock.patch.object(leases, "guard", _whoever_asks):
        yield


async def _as_it_was(
    kv: KV, before: Machine, after: Machine
) -> tuple[tuple[Unchanged, ...], tuple[Put, ...]]:
    return (), ()


@contextmanager
def update_without_room() -> Generator[None]:
    """An update that gives a machine a new size and promises none."""
    with mock.patch.object(updates, "_resized", _as_it_was):
        yield


@contextmanager
def stop_that_can_not_be_hurried() -> Generator[None]:
    """A stop under way that takes its hours, whatever is asked meanwhile."""
    with mock.patch.object(Halts, "hurry"):
        yield


def _still_running(view: View, record: Record, claim: Machine) -> bool:
    return False


@contextmanager
def update_that_is_forgotten() -> Generator[None]:
    """A host that does not look which version it runs."""
    with mock.patch.object(decisions, "_to_replace", _still_running):
        yield


def _as_last_known(view: View) -> Decision:
    """As if what was last known of a machine were always enough."""
    return decide(msgspec.structs.replace(view, learned=True))


@contextmanager
def mount_before_learning() -> Generator[None]:
    """A host that was away and mounts, by what it remembers, before it has heard whose the volume is now."""
    with (
        mock.patch("flyd.machines.host.decide", _as_last_known),
        mock.patch("flyd.machines.host.why_abandoned", return_value=""),
    ):
        yield


async def _at_once(self: VolumeMover, app: str, machine_id: str, claim_revision: int) -> None:
    """In place of waiting until the machine has stopped."""


@contextmanager
def move_without_stopping() -> Generator[None]:
    """A move that makes its last copy while the machine may still write."""
    with mock.patch.object(VolumeMover, "_wait_stopped", _at_once):
        yield


async def _whoever_asks_first(self: SimulatedVolumes, volume_id: str, machine_id: str, epoch: int) -> str:
    """In place of comparing the epochs of two claims."""
    await self._work()  # pyright: ignore[reportPrivateUsage]
    volume = self._live(volume_id)  # pyright: ignore[reportPrivateUsage]
    volume.claimant, volume.epoch, volume.held = machine_id, epoch, True
    return f"/volumes/{volume_id}"


@contextmanager
def mount_without_epochs() -> Generator[None]:
    """A placer that gives a volume to a second machine, and a host that mounts it for whoever asks."""
    with (
        mock.patch("flyd.placement.scheduler._free_volumes", _held_too),
        mock.patch.object(SimulatedVolumes, "attach", _whoever_asks_first),
    ):
        yield


@contextmanager
def take_over_without_votes() -> Generator[None]:
    """A voter that takes over as soon as it has voted itself."""
    with mock.patch.object(pgha.decide, "may_win", return_value=True):
        yield


async def _only_look(self: SimulatedPostgres) -> Position:
    """In place of closing itself: goes on streaming from the old primary."""
    disk = self._host.disk  # pyright: ignore[reportPrivateUsage]
    return Position(timeline=disk.timeline(), lsn=disk.flushed)


@contextmanager
def take_over_without_closing() -> Generator[None]:
    """A voter that says what it has and goes on streaming from the old primary."""
    with mock.patch.object(SimulatedPostgres, "fence", _only_look):
        yield


@contextmanager
def take_over_on_one_word() -> Generator[None]:
    """One voter that believes the primary gone takes over at once, and nobody closes itself."""
    with (
        mock.patch.object(pgha.decide, "doubts_needed", return_value=1),
        mock.patch.object(pgha.decide, "may_win", return_value=True),
        mock.patch.object(SimulatedPostgres, "fence", _only_look),
    ):
        yield


@contextmanager
def round_on_one_word() -> Generator[None]:
    """A round opens as soon as one voter believes the primary gone; all else is as it should be."""
    with mock.patch.object(pgha.decide, "doubts_needed", return_value=1):
        yield


@contextmanager
def primary_that_never_ends() -> Generator[None]:
    """A holder that neither dies nor is killed when it cannot renew its lease."""
    with mock.patch.object(pgha.term.Term, "deadline_s", property(lambda _: math.inf)):
        yield


def _never(view: pgha.model.View, now: float) -> bool:
    return False


@contextmanager
def voter_that_breaks_its_word() -> Generator[None]:
    """A voter that tells the holder to go on, and votes against it as soon as etcd is back."""
    with (
        mock.patch.object(pgha.decide, "extended", _never),
        mock.patch.object(pgha.extension.Extensions, "close", return_value=True),
    ):
        yield


@contextmanager
def members_in_any_order() -> Generator[None]:
    """A change of members that does not look whether the quorums still overlap after its next step."""
    with mock.patch.object(pgha.membership, "overlap", return_value=True):
        yield


@contextmanager
def voters_that_do_not_wait() -> Generator[None]:
    """Voters change although what was acknowledged before is with no quorum of the new members."""
    with mock.patch.object(pgha.agent, "enough", return_value=True):
        yield
