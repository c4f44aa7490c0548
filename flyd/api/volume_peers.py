"""The other hosts' flyds, as volumes' ways need them: storage.copier.CopyPeers, storage.moving.MovePeers."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc.aio

from flyd.api.peers import Peers
from flyd.api.status import from_rpc
from flyd.storage.copier import CopyOrder
from flyd.storage.local import StreamPiece
from flyd.v1 import volumes_pb2 as pb
from flyd.v1 import volumes_pb2_grpc

COPY_TIMEOUT_S = 6 * 3600.0  # the first copy of a large volume through a thin line


class VolumePeers:
    """Calls between hosts that move volumes' data."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    async def keep_copy(self, host: str, order: CopyOrder) -> int:
        """Have a host fetch a snapshot and keep it; how many bytes that moved."""
        target = self._peers.host(host)
        stub = volumes_pb2_grpc.VolumesServiceStub(self._peers.channel(target))
        try:
            answer = await stub.KeepVolumeCopy(order_request(order), timeout=COPY_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, f"{host} ({target.api_address})") from error
        return answer.moved_bytes

    async def adopt(self, host: str, app: str, volume_id: str) -> None:
        """Have a host take over a volume that is being moved to it."""
        target = self._peers.host(host)
        stub = volumes_pb2_grpc.VolumesServiceStub(self._peers.channel(target))
        request = pb.AdoptVolumeRequest(app_name=app, volume_id=volume_id)
        try:
            await stub.AdoptVolume(request, timeout=COPY_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, f"{host} ({target.api_address})") from error

    async def recover(self, host: str, app: str, volume_id: str) -> None:
        """Have a host bring a lost host's volume back from its copy."""
        target = self._peers.host(host)
        stub = volumes_pb2_grpc.VolumesServiceStub(self._peers.channel(target))
        request = pb.RecoverVolumeRequest(app_name=app, volume_id=volume_id)
        try:
            await stub.RecoverVolume(request, timeout=COPY_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, f"{host} ({target.api_address})") from error

    async def digest(self, host: str, volume_id: str, snapshot_id: str) -> str:
        """The checksum of a snapshot on a host."""
        target = self._peers.host(host)
        stub = volumes_pb2_grpc.VolumesServiceStub(self._peers.channel(target))
        request = pb.DigestVolumeSnapshotRequest(volume_id=volume_id, snapshot_id=snapshot_id)
        try:
            return (await stub.DigestVolumeSnapshot(request, timeout=COPY_TIMEOUT_S)).sha256
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, f"{host} ({target.api_address})") from error

    async def fetch(self, order: CopyOrder, parent: str, skip_bytes: int) -> AsyncIterator[StreamPiece]:
        """The stream of an order's snapshot, from its source."""
        source = self._peers.host(order.source)
        stub = volumes_pb2_grpc.VolumesServiceStub(self._peers.channel(source))
        request = pb.SendVolumeSnapshotRequest(
            volume_id=order.volume,
            snapshot_id=order.snapshot,
            parent_snapshot_id=parent,
            skip_bytes=skip_bytes,
            max_bytes_per_s=order.max_bytes_per_s,
        )
        try:
            async for piece in stub.SendVolumeSnapshot(request):
                yield piece
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, f"{order.source} ({source.api_address})") from error


def order_request(order: CopyOrder) -> pb.KeepVolumeCopyRequest:
    """An order on its way."""
    snapshot = pb.VolumeSnapshot(
        id=order.snapshot,
        volume_id=order.volume,
        created_at=order.made_at_s,
        size_gb=order.size_gb,
        consistent=order.consistent,
    )
    return pb.KeepVolumeCopyRequest(
        app_name=order.app,
        volume_id=order.volume,
        source_host=order.source,
        snapshot=snapshot,
        parent_snapshot_ids=order.parents,
        max_bytes_per_s=order.max_bytes_per_s,
    )


def order_of(request: pb.KeepVolumeCopyRequest) -> CopyOrder:
    """An order that has come."""
    return CopyOrder(
        app=request.app_name,
        volume=request.volume_id,
        source=request.source_host,
        snapshot=request.snapshot.id,
        made_at_s=request.snapshot.created_at,
        size_gb=request.snapshot.size_gb,
        consistent=request.snapshot.consistent,
        parents=tuple(request.parent_snapshot_ids),
        max_bytes_per_s=request.max_bytes_per_s,
    )
