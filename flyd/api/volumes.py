"""VolumesService: records of volumes, and what their hosts do with the data.

Whatever needs the data is answered by the volume's own host: any other flyd hands the call on. The data
itself is made by the host at the first attach, or as a copy of another volume's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

import grpc.aio
from msgspec.structs import replace

from flyd.api import views, volume_moves
from flyd.api.apps import check_regions
from flyd.api.context import ApiContext
from flyd.api.status import from_rpc
from flyd.api.volume_peers import VolumePeers, order_of
from flyd.api.volume_views import copied_view, destroyed_view, snapshot_view
from flyd.errors import FlydError, InvalidInput, NotFound, Refused, Unavailable
from flyd.model import AppKind, Volume
from flyd.placement.ids import new_volume_id
from flyd.placement.volumes import create_volume
from flyd.storage import records
from flyd.storage.copies import (
    VolumeCopy,
    check_policy,
    check_verifying,
    copies_prefix,
    copy_id,
    is_copy,
    newest,
    pause_s,
)
from flyd.storage.fullness import check_extending
from flyd.storage.local import LocalVolumes, VolumeSnapshot
from flyd.storage.receiver import CopyReceiver
from flyd.storage.recovery import Recovery
from flyd.storage.recovery_rule import check_rule
from flyd.storage.verification import Verification
from flyd.store import keys
from flyd.v1 import volumes_pb2 as pb
from flyd.v1 import volumes_pb2_grpc

MAX_SIZE_GB = 500
POLICY = (
    "replicas",
    "copy_every_s",
    "recover_max_age_s",
    "verify_every_s",
    "extend_percent",
    "extend_gb",
    "extend_limit_gb",
)
HOST_TIMEOUT_S = 600.0  # a back end that must copy
T = TypeVar("T")


class VolumesServicer(volumes_pb2_grpc.VolumesServiceServicer):
    """Volumes over gRPC."""

    def __init__(self, context: ApiContext, volumes: LocalVolumes | None = None) -> None:
        self._context = context
        self._volumes = volumes
        self._verifying = asyncio.Lock()  # they share a scratch volume's name
        self._receiver: CopyReceiver | None = None
        if volumes is not None:
            self._receiver = CopyReceiver(
                context.host.name,
                context.kv,
                volumes,
                VolumePeers(context.peers).fetch,
                clock=context.clock,
                entropy=context.entropy,
            )

    async def CreateVolume(self, request: pb.CreateVolumeRequest, context: Any) -> pb.CreateVolumeResponse:
        """Reserve the disk on a host of the region."""
        ctx = self._context
        ctx.app(request.app_name)
        check_regions(ctx, [request.region])
        check_name(request.name)
        check_size(request.size_gb)
        volume = await create_volume(
            ctx.kv,
            request.app_name,
            request.name,
            request.region,
            request.size_gb,
            clock=ctx.clock,
            entropy=ctx.entropy,
        )
        return pb.CreateVolumeResponse(volume=views.volume(volume))

    async def ListVolumes(self, request: pb.ListVolumesRequest, context: Any) -> pb.ListVolumesResponse:
        """From the mirror; those that are destroyed and kept, from etcd."""
        app = self._context.app(request.app_name).name if request.app_name else ""
        if request.destroyed:
            kept = await records.list_destroyed(self._context.kv)
            shown = [
                destroyed_view(d) for d in kept if app in ("", d.volume.app) and not is_copy(d.volume.id)
            ]
            return pb.ListVolumesResponse(volumes=shown)
        prefix = f"{keys.VOLUMES}{app}/" if app else keys.VOLUMES
        items = self._context.mirror.list(prefix, Volume)
        return pb.ListVolumesResponse(volumes=[self._shown(i.value) for i in items])

    async def DestroyVolume(self, request: pb.DestroyVolumeRequest, context: Any) -> pb.DestroyVolumeResponse:
        """Refused while attached. The host hears of it by the record, and removes the data when it is due."""
        ctx = self._context
        at_s = ctx.clock.wall_s()
        await records.destroy(ctx.kv, request.app_name, request.volume_id, at_s, entropy=ctx.entropy)
        return pb.DestroyVolumeResponse()

    async def UndestroyVolume(
        self, request: pb.UndestroyVolumeRequest, context: Any
    ) -> pb.UndestroyVolumeResponse:
        """The record at once; the data by its host, now or (should this fail) in its next round."""
        ctx = self._context
        if is_copy(request.volume_id):
            raise NotFound(f"{request.volume_id} is no volume", hint="It is copies of one that is gone.")
        kept = await records.list_destroyed(ctx.kv)
        host = next((d.volume.host for d in kept if d.volume.id == request.volume_id), ctx.host.name)

        async def here(local: LocalVolumes) -> pb.UndestroyVolumeResponse:
            app, volume_id = request.app_name, request.volume_id
            volume = await records.undestroy(ctx.kv, app, volume_id, entropy=ctx.entropy)
            with suppress(NotFound):  # it never was attached: there is no data yet
                await local.undestroy(volume.id)
            return pb.UndestroyVolumeResponse(volume=views.volume(volume))

        return await self._on(host, "UndestroyVolume", request, here)

    async def ExtendVolume(self, request: pb.ExtendVolumeRequest, context: Any) -> pb.ExtendVolumeResponse:
        """The promise first, then the limit: should the second fail, the host's next round does it."""
        check_size(request.size_gb)
        ctx = self._context
        source = self._volume(request.app_name, request.volume_id)

        async def here(local: LocalVolumes) -> pb.ExtendVolumeResponse:
            volume = await records.extend(ctx.kv, source.app, source.id, request.size_gb, entropy=ctx.entropy)
            with suppress(NotFound):  # it never was attached: it is made with this size
                await local.extend(volume.id, volume.size_gb)
            return pb.ExtendVolumeResponse(volume=views.volume(volume))

        return await self._on(source.host, "ExtendVolume", request, here)

    async def ForkVolume(self, request: pb.ForkVolumeRequest, context: Any) -> pb.ForkVolumeResponse:
        """Disk promised, data made, volume told of: in this order, so that no machine sees it half made."""
        source = self._volume(request.app_name, request.volume_id)
        copy = replace(
            source,
            id=new_volume_id(self._context.entropy),
            name=request.name or source.name,
            size_gb=request.size_gb or source.size_gb,
            attached_machine="",
            epoch=0,
            created_at_s=self._context.clock.wall_s(),
        )
        check_name(copy.name)
        check_size(copy.size_gb)

        async def here(local: LocalVolumes) -> pb.ForkVolumeResponse:
            ctx = self._context
            at_s = ctx.clock.wall_s()
            await records.reserve_copy(ctx.kv, copy, at_s, entropy=ctx.entropy)
            try:
                await local.fork(source.id, copy.id, copy.size_gb, request.snapshot_id)
            except FlydError:
                await self._give_back(records.Destroyed(volume=copy, at_s=at_s))
                raise
            made = await records.undestroy(ctx.kv, copy.app, copy.id, entropy=ctx.entropy)
            await local.undestroy(copy.id)  # the keeper may have seen it in between, as one that is given up
            return pb.ForkVolumeResponse(volume=views.volume(made))

        return await self._on(source.host, "ForkVolume", request, here)

    async def CreateVolumeSnapshot(
        self, request: pb.CreateVolumeSnapshotRequest, context: Any
    ) -> pb.CreateVolumeSnapshotResponse:
        """By the host."""
        volume = self._volume(request.app_name, request.volume_id)

        async def here(local: LocalVolumes) -> pb.CreateVolumeSnapshotResponse:
            snapshot_id = "snap-" + self._context.entropy.token(6)
            made = await local.snapshot(volume.id, snapshot_id, self._context.clock.wall_s())
            return pb.CreateVolumeSnapshotResponse(snapshot=snapshot_view(volume.id, made))

        return await self._on(volume.host, "CreateVolumeSnapshot", request, here)

    async def ListVolumeSnapshots(
        self, request: pb.ListVolumeSnapshotsRequest, context: Any
    ) -> pb.ListVolumeSnapshotsResponse:
        """By the host; none of a volume that never was attached."""
        volume = self._volume(request.app_name, request.volume_id)

        async def here(local: LocalVolumes) -> pb.ListVolumeSnapshotsResponse:
            found: list[VolumeSnapshot] = []
            with suppress(NotFound):
                found.extend(await local.snapshots(volume.id))
            return pb.ListVolumeSnapshotsResponse(snapshots=[snapshot_view(volume.id, s) for s in found])

        return await self._on(volume.host, "ListVolumeSnapshots", request, here)

    async def DestroyVolumeSnapshot(
        self, request: pb.DestroyVolumeSnapshotRequest, context: Any
    ) -> pb.DestroyVolumeSnapshotResponse:
        """By the host; NotFound for one that it does not have."""
        volume = self._volume(request.app_name, request.volume_id)

        async def here(local: LocalVolumes) -> pb.DestroyVolumeSnapshotResponse:
            if request.snapshot_id not in [s.id for s in await local.snapshots(volume.id)]:
                raise NotFound(
                    f"volume {volume.id} has no snapshot {request.snapshot_id!r}",
                    hint=f"`fly volumes snapshots list {volume.id}` shows them.",
                )
            await local.delete_snapshot(volume.id, request.snapshot_id)
            return pb.DestroyVolumeSnapshotResponse()

        return await self._on(volume.host, "DestroyVolumeSnapshot", request, here)

    # ------------------------------------------------------------------ copies on other hosts

    async def UpdateVolume(self, request: pb.UpdateVolumeRequest, context: Any) -> pb.UpdateVolumeResponse:
        """The record; the volume's host hears of it by its mirror."""
        ctx = self._context
        volume = self._volume(request.app_name, request.volume_id)
        if request.replicas and ctx.app(volume.app).kind is AppKind.POSTGRES:
            raise Refused(
                f"volume {volume.id} is a member of Postgres cluster {volume.app}",
                hint="The other members have what it has, newer than any copy: no copies are made.",
            )

        def policy(now: Volume) -> Volume:
            given = {name: getattr(request, name) for name in POLICY if request.HasField(name)}
            new = replace(now, **given)
            check_policy(new.replicas, new.copy_every_s)
            check_rule(new.recover_max_age_s, new.replicas)
            check_verifying(new.verify_every_s)
            check_extending(new.extend_percent, new.extend_gb, new.extend_limit_gb, new.size_gb, MAX_SIZE_GB)
            return new

        changed = await records.set_policy(ctx.kv, volume.app, volume.id, policy, entropy=ctx.entropy)
        return pb.UpdateVolumeResponse(volume=self._shown(changed))

    async def SendVolumeSnapshot(
        self, request: pb.SendVolumeSnapshotRequest, context: Any
    ) -> AsyncIterator[pb.SendVolumeSnapshotResponse]:
        """Of this host's disk; no faster than the one who asks wants it."""
        local, clock = self._local(), self._context.clock
        began_s, sent = clock.monotonic_s(), 0
        pieces = local.send(
            request.volume_id, request.snapshot_id, request.parent_snapshot_id, request.skip_bytes
        )
        async for piece in pieces:
            yield pb.SendVolumeSnapshotResponse(
                offset_bytes=piece.offset_bytes, data=piece.data, sha256=piece.sha256
            )
            sent += len(piece.data)
            await asyncio.sleep(pause_s(sent, clock.monotonic_s() - began_s, request.max_bytes_per_s))

    async def KeepVolumeCopy(
        self, request: pb.KeepVolumeCopyRequest, context: Any
    ) -> pb.KeepVolumeCopyResponse:
        """Onto this host's disk."""
        self._local()
        assert self._receiver is not None
        return pb.KeepVolumeCopyResponse(moved_bytes=await self._receiver.keep(order_of(request)))

    async def RecoverVolume(self, request: pb.RecoverVolumeRequest, context: Any) -> pb.RecoverVolumeResponse:
        """On the host with the newest copy, of those that live."""
        ctx = self._context
        volume = self._volume(request.app_name, request.volume_id)
        copies = [i.value for i in ctx.mirror.list(copies_prefix(volume), VolumeCopy)]
        copy = newest([c for c in copies if ctx.alive(c.host)])
        if copy is None and not ctx.alive(volume.host):
            on = ", ".join(sorted(c.host for c in copies))
            raise Unavailable(
                f"host {volume.host} is lost, and no host that lives has a copy of volume {volume.id}",
                hint=f"Copies are on {on}: bring one of these back."
                if on
                else f"Its data is on {volume.host}'s disk alone: bring that host back.",
            )

        async def here(local: LocalVolumes) -> pb.RecoverVolumeResponse:
            recovery = Recovery(ctx.host, ctx.kv, local, clock=ctx.clock, entropy=ctx.entropy)
            made = await recovery.recover(volume.app, volume.id)
            return pb.RecoverVolumeResponse(
                volume=self._shown(made.volume),
                aside=views.volume(made.aside),
                data_at=made.data_at_s,
                machine_id=made.volume.attached_machine,
            )

        where = copy.host if copy is not None else ctx.host.name
        return await self._on(where, "RecoverVolume", request, here)

    async def VerifyVolume(self, request: pb.VerifyVolumeRequest, context: Any) -> pb.VerifyVolumeResponse:
        """On the host with the newest copy; without one, on the volume's own."""
        ctx = self._context
        volume = self._volume(request.app_name, request.volume_id)
        copies = [i.value for i in ctx.mirror.list(copies_prefix(volume), VolumeCopy)]
        copy = newest([c for c in copies if ctx.alive(c.host)])

        async def here(local: LocalVolumes) -> pb.VerifyVolumeResponse:
            digest = VolumePeers(ctx.peers).digest
            verification = Verification(ctx.host.name, ctx.kv, local, digest, clock=ctx.clock)
            async with self._verifying:
                made = await verification.verify(volume, copy_id(volume.id) if copy else volume.id)
            return pb.VerifyVolumeResponse(
                host=made.host,
                snapshot_id=made.snapshot,
                data_at=made.data_at_s,
                sha256=made.sha256,
                compared_with=made.compared_with,
            )

        return await self._on(copy.host if copy else volume.host, "VerifyVolume", request, here)

    async def DigestVolumeSnapshot(
        self, request: pb.DigestVolumeSnapshotRequest, context: Any
    ) -> pb.DigestVolumeSnapshotResponse:
        """Of this host's disk."""
        found = await self._local().digest(request.volume_id, request.snapshot_id)
        return pb.DigestVolumeSnapshotResponse(sha256=found)

    async def MoveVolume(
        self, request: pb.MoveVolumeRequest, context: Any
    ) -> AsyncIterator[pb.MoveVolumeResponse]:
        """Begun here, done by the volume's host, watched here."""
        volume = self._volume(request.app_name, request.volume_id)
        move = await volume_moves.begin(self._context, volume, request.host)
        async for told in volume_moves.watch(self._context, move):
            yield told

    async def AdoptVolume(self, request: pb.AdoptVolumeRequest, context: Any) -> pb.AdoptVolumeResponse:
        """Onto this host."""
        ctx = self._context
        recovery = Recovery(ctx.host, ctx.kv, self._local(), clock=ctx.clock, entropy=ctx.entropy)
        await recovery.adopt(request.app_name, request.volume_id)
        return pb.AdoptVolumeResponse()

    def _shown(self, volume: Volume) -> pb.Volume:
        copies = [i.value for i in self._context.mirror.list(copies_prefix(volume), VolumeCopy)]
        return copied_view(volume, copies)

    # ------------------------------------------------------------------ where it is done

    def _local(self) -> LocalVolumes:
        if self._volumes is None:
            raise Unavailable("this flyd keeps no volumes", hint="Start it anew, with a data_dir.")
        return self._volumes

    async def _on(
        self, host_name: str, method: str, request: Any, here: Callable[[LocalVolumes], Awaitable[T]]
    ) -> T:
        """The answer of the volume's host: this one's, or that of its flyd to the same call."""
        ctx = self._context
        if host_name == ctx.host.name:
            return await here(self._local())
        host = ctx.peers.host(host_name)
        if not ctx.alive(host_name):
            raise Unavailable(
                f"host {host_name} ({host.region}) of the volume is lost",
                hint="`fly hosts list` shows the hosts; the call works once it is back.",
            )
        stub = volumes_pb2_grpc.VolumesServiceStub(ctx.peers.channel(host))
        try:
            return await getattr(stub, method)(request, timeout=HOST_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, f"{host_name} ({host.api_address})") from error

    async def _give_back(self, destroyed: records.Destroyed) -> None:
        """The disk of a copy that was not made; if that fails too, its host does it in KEPT_S."""
        with suppress(Unavailable):
            await records.forget(self._context.kv, destroyed, entropy=self._context.entropy)

    def _volume(self, app: str, volume_id: str) -> Volume:
        found = self._context.mirror.get(keys.volume(app, volume_id), Volume)
        if found is None:
            raise NotFound(f"volume {volume_id} does not exist in app {app}", hint="See `fly volumes list`.")
        return found.value


def check_name(name: str) -> None:
    """InvalidInput for what can not be a volume's name."""
    if not name.replace("_", "").isalnum() or len(name) > 30:
        raise InvalidInput(
            f"{name!r} can not be a volume's name", hint="Use 1-30 letters, digits and underscores."
        )


def check_size(size_gb: int) -> None:
    """InvalidInput for what can not be a volume's size."""
    if not 1 <= size_gb <= MAX_SIZE_GB:
        raise InvalidInput(f"a volume of {size_gb} GB: it must be 1 to {MAX_SIZE_GB} GB")
