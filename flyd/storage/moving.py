"""Moving a volume with its machine to another host while the machine runs: the record, and its steps.

    volume_moves/<app>/<volume>   VolumeMove

    copying    the volume is copied while the machine runs, again until little is left
    stopping   the machine is stopped; from here on counts as downtime
    last       what was written since is copied
    switching  the new host makes a volume of the copy and takes the machine over: one transaction
    failed     the machine is wanted as it was; nothing else has changed

Each step is taken by the volume's host and can be repeated: a flyd that dies goes on with the record's phase.
The last transaction compares that the claim is the very one that was stopped, so a machine that
somebody has started meanwhile has lost nothing: the move fails. The old volume is given up, and kept as
long as any destroyed one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol

import structlog
from msgspec.structs import replace

from flyd.errors import Conflict, FlydError, NotFound, Unavailable
from flyd.machines.commands import set_desired
from flyd.model import Desired, Machine, MachineState, MachineStatus, Value, Volume, decode, encode
from flyd.ports import KV, Clock, Put, Unchanged
from flyd.storage.copier import VolumeCopier
from flyd.storage.relocation import check_relocatable
from flyd.store import keys
from flyd.store.mirror import Mirror

log = structlog.get_logger(__name__)

COPYING, STOPPING, LAST, SWITCHING, FAILED = "copying", "stopping", "last copy", "switching", "failed"
LITTLE_S = 2.0  # a pass that takes no longer leaves little to copy while the machine stands
MAX_PASSES = 5
STOP_MORE_S = 30.0  # beyond the machine's own time to stop
LOOK_S = 0.5
TRIES = 20  # of a step that fails for want of a host or of etcd, AGAIN_S apart
AGAIN_S = 3.0


class VolumeMove(Value, frozen=True, kw_only=True):
    """A move under way, or one that failed."""

    volume: Volume  # as the last step saw it
    target: str
    new_id: str
    begun_at_s: float
    phase: str = COPYING
    was: Desired | None = None  # what was wanted of the machine; None: no machine has the volume
    claim_revision: int = 0  # of the machine's claim once it was stopped
    snapshot: str = ""  # the last copy
    moved_bytes: int = 0
    error: str = ""


class MovePeers(Protocol):
    """The other hosts' flyds."""

    async def adopt(self, host: str, app: str, volume_id: str) -> None:
        """Have a host take over a volume that is at `switching`."""
        ...


class VolumeMover:
    """The moves off one host."""

    def __init__(
        self,
        host: str,
        kv: KV,
        mirror: Mirror,
        copier: VolumeCopier,
        peers: MovePeers,
        *,
        clock: Clock,
    ) -> None:
        self._host = host
        self._kv = kv
        self._mirror = mirror
        self._copier = copier
        self._peers = peers
        self._clock = clock

    async def keep_moving(self) -> None:
        """For ever: every move off this host, one after the other."""
        await self._mirror.wait_synced()
        while True:
            await self.round()
            await asyncio.sleep(LOOK_S)

    async def round(self) -> None:
        """Bring each open move to its end, good or bad."""
        for item in self._mirror.list(keys.VOLUME_MOVES, VolumeMove):
            move = item.value
            if move.volume.host == self._host and move.phase != FAILED:
                try:
                    await self._go_on(keys.volume_move(move.volume.app, move.volume.id))
                except FlydError as error:
                    log.warning("volumes.move_interrupted", volume=move.volume.id, error=error.message)

    async def _go_on(self, key: str) -> None:
        """Step by step, by the record as etcd has it, until it is gone or failed."""
        steps: dict[str, Callable[[VolumeMove], Awaitable[VolumeMove | None]]] = {
            COPYING: self._copy,
            STOPPING: self._stop,
            LAST: self._copy_last,
            SWITCHING: self._switch,
        }
        failures = 0
        while (record := await self._kv.get(key)) is not None:
            move = decode(record.value, VolumeMove)
            if move.phase not in steps:
                return
            log.info("volumes.moving", volume=move.volume.id, to=move.target, phase=move.phase)
            try:
                after = await steps[move.phase](move)
            except Unavailable as error:
                failures += 1
                if failures < TRIES:
                    await asyncio.sleep(AGAIN_S)
                    continue
                after = await self._failed(move, error)
            except FlydError as error:
                after = await self._failed(move, error)
            if after is not None:
                unchanged = Unchanged(key, record.mod_revision)
                await self._kv.txn((unchanged,), (Put(key, encode(after)),))

    async def _copy(self, move: VolumeMove) -> VolumeMove:
        for _ in range(MAX_PASSES):
            began_s = self._clock.monotonic_s()
            moved = await self._copier.copy_to(move.volume, move.target)
            move = replace(move, moved_bytes=move.moved_bytes + moved)
            if self._clock.monotonic_s() - began_s <= LITTLE_S:
                break
        return replace(move, phase=STOPPING if move.was is not None else LAST)

    async def _stop(self, move: VolumeMove) -> VolumeMove:
        app, machine_id = move.volume.app, move.volume.attached_machine
        machine = await set_desired(self._kv, app, machine_id, Desired.STOPPED)
        record = await self._kv.get(keys.machine(app, machine_id))
        if record is None or decode(record.value, Machine).desired is not Desired.STOPPED:
            raise Conflict(f"somebody wanted something else of machine {machine_id} meanwhile")
        deadline_s = machine.config.stop.timeout_s + STOP_MORE_S
        try:
            async with asyncio.timeout(deadline_s):
                await self._wait_stopped(app, machine_id, record.mod_revision)
        except TimeoutError:
            raise Conflict(f"machine {machine_id} did not stop within {deadline_s:g} s") from None
        return replace(move, phase=LAST, claim_revision=record.mod_revision)

    async def _wait_stopped(self, app: str, machine_id: str, claim_revision: int) -> None:
        """Return once it has stopped; Conflict as soon as somebody wants something else of it."""
        while True:
            claim = await self._kv.get(keys.machine(app, machine_id))
            if claim is None or claim.mod_revision != claim_revision:
                raise Conflict(
                    f"somebody wanted something of machine {machine_id} while it was being stopped"
                )
            record = await self._kv.get(keys.status(app, machine_id))
            state = decode(record.value, MachineStatus).state if record else None
            if state in (MachineState.STOPPED, MachineState.CREATED, MachineState.FAILED):
                return
            await asyncio.sleep(LOOK_S / 5)

    async def _copy_last(self, move: VolumeMove) -> VolumeMove:
        record = await self._kv.get(keys.volume(move.volume.app, move.volume.id))
        if record is None:
            raise Conflict(f"volume {move.volume.id} is gone")
        volume = decode(record.value, Volume)
        if volume.attached_machine != move.volume.attached_machine:
            raise Conflict(f"volume {volume.id} was given to another machine meanwhile")
        await self._check_claim(move)
        snapshot, moved = await self._copier.copy_now(volume, move.target)
        return replace(
            move,
            phase=SWITCHING,
            volume=volume,
            snapshot=snapshot,
            moved_bytes=move.moved_bytes + moved,
        )

    async def _check_claim(self, move: VolumeMove) -> None:
        if move.was is None:
            return
        record = await self._kv.get(keys.machine(move.volume.app, move.volume.attached_machine))
        if record is None or record.mod_revision != move.claim_revision:
            raise Conflict(f"somebody wanted something of machine {move.volume.attached_machine} meanwhile")

    async def _switch(self, move: VolumeMove) -> None:
        await self._peers.adopt(move.target, move.volume.app, move.volume.id)

    async def _failed(self, move: VolumeMove, error: FlydError) -> VolumeMove:
        """The machine as it was wanted, unless somebody has wanted something else since."""
        log.warning("volumes.move_failed", volume=move.volume.id, phase=move.phase, error=error.message)
        if move.was is Desired.STARTED and move.phase in (STOPPING, LAST, SWITCHING):
            record = await self._kv.get(keys.machine(move.volume.app, move.volume.attached_machine))
            if record is not None and move.claim_revision in (0, record.mod_revision):
                with suppress(Conflict, NotFound):  # somebody destroys it: then that is what is wanted of it
                    await set_desired(
                        self._kv, move.volume.app, move.volume.attached_machine, Desired.STARTED
                    )
        return replace(move, phase=FAILED, error=f"{error.message} (while {move.phase})")


async def begin_move(kv: KV, volume: Volume, target: str, new_id: str, *, clock: Clock) -> VolumeMove:
    """Write the record; one that is open already is answered as it is. Refused where it can not be."""
    machine = await check_relocatable(kv, volume)
    key = keys.volume_move(volume.app, volume.id)
    known = await kv.get(key)
    if known is not None and (open_move := decode(known.value, VolumeMove)).phase != FAILED:
        return open_move
    move = VolumeMove(
        volume=volume,
        target=target,
        new_id=new_id,
        begun_at_s=clock.wall_s(),
        was=machine.desired if machine is not None else None,
    )
    compares = (Unchanged(key, known.mod_revision if known else 0),)
    if not (await kv.txn(compares, (Put(key, encode(move)),))).succeeded:
        raise Conflict(f"somebody else moves volume {volume.id}", hint="Try again: it is told of then.")
    return move
