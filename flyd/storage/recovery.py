"""Makes a volume of a copy, on the host that has it: of a lost host's volume, or of one that is moved here.

Nothing of the lost host is touched: its volume stays on its disk and in the records, aside, under another
name, and whoever wants it looks into it once the host is back. The transaction compares that the host has
still no sign of life; one that was only cut off ends its copy of the machine as soon as it sees etcd again.
Called by the API of the copy's host.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

from msgspec.structs import replace

from flyd.errors import Conflict, FlydError, NotFound, Refused, Unavailable
from flyd.model import Host, Machine, Value, Volume, decode
from flyd.placement.ids import new_volume_id
from flyd.placement.snapshot import read_snapshot
from flyd.ports import KV, Clock, Delete, Entropy, Unchanged
from flyd.storage import records
from flyd.storage.copies import copy_id
from flyd.storage.local import LocalVolumes, VolumeSnapshot
from flyd.storage.moving import SWITCHING, VolumeMove
from flyd.storage.relocation import Relocation, check_relocatable, place, relocate
from flyd.store import keys

VOLUME_RECOVERED = "volume.recovered"
VOLUME_MOVED = "volume.moved"
NAME_PART = 20  # of the old name that stays in the new one


class Recovered(Value, frozen=True, kw_only=True):
    """What came back."""

    volume: Volume
    aside: Volume
    data_at_s: float


class Recovery:
    """One host's."""

    def __init__(self, host: Host, kv: KV, volumes: LocalVolumes, *, clock: Clock, entropy: Entropy) -> None:
        self._host = host
        self._kv = kv
        self._volumes = volumes
        self._clock = clock
        self._entropy = entropy

    async def recover(self, app: str, volume_id: str) -> Recovered:
        """Bring it back here; if anything is in the way, nothing is changed."""
        old = await self._lost_volume(app, volume_id)
        machine = await check_relocatable(self._kv, old)
        snapshot = await self._newest(old)
        if machine is not None:  # before anything is made: is there room?
            place(await read_snapshot(self._kv, app), machine, self._host.name)
        new = self._new(old, new_volume_id(self._entropy))
        reserved = records.Destroyed(volume=new, at_s=self._clock.wall_s())
        async with self._made(old, reserved, snapshot.id):
            return await self._tell(old, new, machine, reserved, snapshot)

    async def adopt(self, app: str, volume_id: str) -> None:
        """Take over a volume that is being moved here, with its machine: the move's last step.

        Conflict if anything was changed since the machine was stopped for it; then nothing is.
        """
        key = keys.volume_move(app, volume_id)
        record = await self._kv.get(key)
        move = decode(record.value, VolumeMove) if record else None
        if record is None or move is None:
            return  # done, and the answer was lost
        if move.target != self._host.name or move.phase != SWITCHING:
            raise Conflict(f"volume {volume_id} is not to be taken over by {self._host.name} now")
        guards = [Unchanged(key, record.mod_revision)]
        machine: Machine | None = None
        if move.was is not None:
            claim = await self._kv.get(keys.machine(app, move.volume.attached_machine))
            if claim is None or claim.mod_revision != move.claim_revision:
                raise Conflict(f"machine {move.volume.attached_machine} is not as it was stopped")
            machine = decode(claim.value, Machine)
            guards.append(Unchanged(claim.key, claim.mod_revision))
        new = replace(self._new(move.volume, move.new_id), created_at_s=move.begun_at_s)
        reserved = records.Destroyed(volume=new, at_s=move.begun_at_s)
        wanted = Relocation(
            old=move.volume,
            new=new,
            reserved=reserved,
            machine=machine,
            desired=move.was,
            kind=VOLUME_MOVED,
            why=f"moved, {move.moved_bytes} bytes; the old one is kept for a while",
        )
        async with self._made(move.volume, reserved, move.snapshot):
            await relocate(
                self._kv,
                wanted,
                guards=guards,
                also=(Delete(key),),
                clock=self._clock,
                entropy=self._entropy,
            )

    def _new(self, old: Volume, new_id: str) -> Volume:
        return replace(
            old,
            id=new_id,
            host=self._host.name,
            region=self._host.region,
            attached_machine="",
            epoch=0,
            created_at_s=self._clock.wall_s(),
        )

    @asynccontextmanager
    async def _made(self, old: Volume, reserved: records.Destroyed, snapshot_id: str) -> AsyncGenerator[None]:
        """The data of the new volume, for as long as it takes to tell of it; given back if that fails."""
        new = reserved.volume
        await records.reserve_copy(self._kv, new, reserved.at_s, entropy=self._entropy)
        try:
            await self._volumes.fork(copy_id(old.id), new.id, new.size_gb, snapshot_id)
            yield
        except FlydError:
            with suppress(FlydError):  # else it is given back in KEPT_S
                await records.forget(self._kv, reserved, entropy=self._entropy)
            raise
        with suppress(NotFound):  # the keeper may have seen it in between, as one that is given up
            await self._volumes.undestroy(new.id)

    async def _tell(
        self,
        old: Volume,
        new: Volume,
        machine: Machine | None,
        reserved: records.Destroyed,
        snapshot: VolumeSnapshot,
    ) -> Recovered:
        aside = replace(
            old,
            name=f"{old.name[:NAME_PART]}_aside_{self._entropy.token(2)}",
            attached_machine="",
            epoch=old.epoch + 1,
            replicas=0,
            recover_max_age_s=0.0,  # what came back has the rule now
        )
        age_s = max(0.0, self._clock.wall_s() - snapshot.made_at_s)
        wanted = Relocation(
            old=old,
            new=new,
            reserved=reserved,
            machine=machine,
            aside=aside,
            kind=VOLUME_RECOVERED,
            why=f"from the copy {snapshot.id}, {age_s:.0f} s old; the lost host's is kept as {aside.name}",
        )
        silent = Unchanged(keys.alive(old.host), 0)
        volume = await relocate(self._kv, wanted, guards=(silent,), clock=self._clock, entropy=self._entropy)
        return Recovered(volume=volume, aside=aside, data_at_s=snapshot.made_at_s)

    async def _lost_volume(self, app: str, volume_id: str) -> Volume:
        record = await self._kv.get(keys.volume(app, volume_id))
        if record is None:
            raise NotFound(f"volume {volume_id} does not exist in app {app}", hint="See `fly volumes list`.")
        volume = decode(record.value, Volume)
        if await self._kv.get(keys.alive(volume.host)) is not None:
            raise Refused(
                f"host {volume.host} of volume {volume_id} is alive: what it has is newer than any copy",
                hint=f"`fly volumes move {volume_id}` brings it to another host without a loss.",
            )
        return volume

    async def _newest(self, old: Volume) -> VolumeSnapshot:
        with suppress(NotFound):
            if found := await self._volumes.snapshots(copy_id(old.id)):
                return found[-1]
        raise Unavailable(
            f"host {self._host.name} has no copy of volume {old.id}",
            hint="`fly volumes list` shows the newest copy of each volume and where it is.",
        )
