"""A host's volumes with what is in them: snapshots, forks, streams; and the calls between hosts about these.

What a volume holds is the list of what was written to it, in order (mounts.py writes). Owned by
volumes_world.py. A call between hosts runs in the called flyd's own process, so a crash there ends it; an
answer that does not come within CALL_S is Unavailable, and what was asked for may happen all the same.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import msgspec

from flyd.errors import FlydError, NotFound, Refused, Unavailable
from flyd.storage.copier import CopyOrder
from flyd.storage.local import StreamPiece
from flyd.storage.receiver import CopyReceiver
from flyd.storage.recovery import Recovery
from tests.simulation.disk import Attachment, KeptSnapshot, SimulatedVolumes
from tests.simulation.driver import Hardware
from tests.simulation.loop import current
from tests.simulation.network import Network
from volumes.contract import StreamPart

CALL_S = 5.0


class CopiedVolumes(SimulatedVolumes):
    """flyd.storage.local.LocalVolumes on one host's disk."""

    async def snapshots(self, volume_id: str) -> tuple[KeptSnapshot, ...]:
        await self._work()
        found = self._there(volume_id).snapshots.values()
        return tuple(sorted(found, key=lambda s: (s.made_at_s, s.id)))

    async def snapshot(
        self, volume_id: str, snapshot_id: str, at_s: float, *, scheduled: bool = False
    ) -> KeptSnapshot:
        await self._work()
        volume = self._live(volume_id)
        made = KeptSnapshot(snapshot_id, at_s, 1, volume.content, scheduled=scheduled)
        made = volume.snapshots.setdefault(snapshot_id, made)
        await self._work()
        return made

    async def delete_snapshot(self, volume_id: str, snapshot_id: str) -> None:
        await self._work()
        self._there(volume_id).snapshots.pop(snapshot_id, None)

    async def fork(self, volume_id: str, new_id: str, size_gb: int, snapshot_id: str = "") -> None:
        await self._work()
        content = self._kept(volume_id, snapshot_id).content
        self._volumes.setdefault(new_id, Attachment(content=content))
        await self._work()

    async def send(
        self, volume_id: str, snapshot_id: str, parent_id: str = "", skip_bytes: int = 0
    ) -> AsyncGenerator[StreamPart]:
        content = self._kept(volume_id, snapshot_id).content
        before = self._kept(volume_id, parent_id).content if parent_id else ()
        data = json.dumps(content[len(before) :]).encode()
        middle = max(skip_bytes, len(data) // 2)
        for begin, end in ((skip_bytes, middle), (middle, len(data))):
            await self._work()
            if begin < end:
                yield StreamPart(offset_bytes=begin, data=data[begin:end])
        yield StreamPart(offset_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    async def arrived_bytes(self, volume_id: str, snapshot_id: str, parent_id: str = "") -> int:
        await self._work()
        return len(self._there(volume_id).arrived.get(f"{snapshot_id}-{parent_id}", b""))

    async def receive(
        self,
        volume_id: str,
        snapshot_id: str,
        parts: AsyncIterator[StreamPiece],
        *,
        parent_id: str = "",
        made_at_s: float,
        size_gb: int,
        consistent: bool = True,
    ) -> KeptSnapshot:
        volume = self._live(volume_id)
        if snapshot_id in volume.snapshots:
            return volume.snapshots[snapshot_id]
        name, told = f"{snapshot_id}-{parent_id}", ""
        volume.arrived = {n: data for n, data in volume.arrived.items() if n == name}
        async for part in parts:
            have = volume.arrived.setdefault(name, b"")
            told = part.sha256
            if part.offset_bytes != len(have):
                del volume.arrived[name]
                raise Refused(f"a piece at {part.offset_bytes} came, {len(have)} was next")
            volume.arrived[name] = have + part.data
        if not told:
            raise Unavailable("the stream was cut short")
        data = volume.arrived.pop(name)
        if hashlib.sha256(data).hexdigest() != told:
            raise Refused("its checksum is wrong")
        before = self._kept(volume_id, parent_id).content if parent_id else ()
        made = KeptSnapshot(snapshot_id, made_at_s, size_gb, (*before, *json.loads(data)))
        volume.snapshots[snapshot_id] = made
        await self._work()
        return made

    def _kept(self, volume_id: str, snapshot_id: str) -> KeptSnapshot:
        found = self._there(volume_id).snapshots.get(snapshot_id)
        if found is None:
            raise NotFound(f"volume {volume_id} has no snapshot {snapshot_id}")
        return found


class Office(msgspec.Struct, frozen=True):
    """What one flyd does about volumes when another asks it, and the process that does it."""

    recovery: Recovery
    receiver: CopyReceiver
    context: contextvars.Context


class SimulatedPeers:
    """storage.copier.CopyPeers and storage.moving.MovePeers: one place's calls to the hosts."""

    def __init__(
        self, place: str, network: Network, hardware: Mapping[str, Hardware], offices: Mapping[str, Office]
    ) -> None:
        self._place = place
        self._network = network
        self._hardware = hardware
        self._offices = offices

    async def keep_copy(self, host: str, order: CopyOrder) -> int:
        return await self._call(host, lambda office: office.receiver.keep(order))

    async def adopt(self, host: str, app: str, volume_id: str) -> None:
        await self._call(host, lambda office: office.recovery.adopt(app, volume_id))

    async def recover(self, host: str, app: str, volume_id: str) -> None:
        """As RecoverVolume does it on the host with the copy."""
        await self._call(host, lambda office: office.recovery.recover(app, volume_id))

    async def fetch(self, order: CopyOrder, parent: str, skip_bytes: int) -> AsyncIterator[StreamPiece]:
        source = self._hardware[order.source]
        pieces = CopiedVolumes(source.volumes, source.purged, source.work).send(
            order.volume, order.snapshot, parent, skip_bytes
        )
        async for piece in pieces:
            await asyncio.sleep(self._network.delay_s())
            if not self._hears(order.source):
                raise Unavailable(f"{order.source} does not answer any more")
            yield piece

    def _hears(self, host: str) -> bool:
        return current().runs(f"{host}/flyd") and self._network.reaches(self._place, host)

    async def _call(self, host: str, work: Callable[[Office], Awaitable[Any]]) -> Any:
        await asyncio.sleep(self._network.delay_s())
        if not self._hears(host) or host not in self._offices:
            raise Unavailable(f"{host} does not answer")
        reply: asyncio.Future[Any] = current().create_future()

        def answer(deliver: Callable[[], None]) -> None:
            self._network.send(host, self._place, lambda: None if reply.done() else deliver())

        async def serve() -> None:
            try:
                result = await work(self._offices[host])
            except FlydError as error:
                refused = error
                answer(lambda: reply.set_exception(refused))
            else:
                answer(lambda: reply.set_result(result))

        current().create_task(serve(), name=f"call to {host}", context=self._offices[host].context.copy())
        try:
            async with asyncio.timeout(CALL_S):
                return await reply
        except TimeoutError:
            raise Unavailable(f"{host} did not answer within {CALL_S:g} s") from None
