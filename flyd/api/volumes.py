"""VolumesService: records of volumes; the data is made by the host at the first attach."""

from __future__ import annotations

from typing import Any

from flyd.api import views
from flyd.api.apps import check_regions
from flyd.api.context import ApiContext
from flyd.errors import InvalidInput
from flyd.model import Volume
from flyd.placement.volumes import create_volume, destroy_volume
from flyd.store import keys
from flyd.v1 import volumes_pb2, volumes_pb2_grpc

MAX_SIZE_GB = 500


class VolumesServicer(volumes_pb2_grpc.VolumesServiceServicer):
    """Volumes over gRPC."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def CreateVolume(
        self, request: volumes_pb2.CreateVolumeRequest, context: Any
    ) -> volumes_pb2.CreateVolumeResponse:
        """Reserve the disk on a host of the region."""
        ctx = self._context
        ctx.app(request.app_name)
        check_regions(ctx, [request.region])
        if not request.name.replace("_", "").isalnum() or len(request.name) > 30:
            raise InvalidInput(
                f"{request.name!r} can not be a volume's name",
                hint="Use 1-30 letters, digits and underscores.",
            )
        if not 1 <= request.size_gb <= MAX_SIZE_GB:
            raise InvalidInput(f"a volume of {request.size_gb} GB: it must be 1 to {MAX_SIZE_GB} GB")
        volume = await create_volume(
            ctx.kv,
            request.app_name,
            request.name,
            request.region,
            request.size_gb,
            clock=ctx.clock,
            entropy=ctx.entropy,
        )
        return volumes_pb2.CreateVolumeResponse(volume=views.volume(volume))

    async def ListVolumes(
        self, request: volumes_pb2.ListVolumesRequest, context: Any
    ) -> volumes_pb2.ListVolumesResponse:
        """From the mirror."""
        prefix = keys.VOLUMES
        if request.app_name:
            prefix += f"{self._context.app(request.app_name).name}/"
        items = self._context.mirror.list(prefix, Volume)
        return volumes_pb2.ListVolumesResponse(volumes=[views.volume(i.value) for i in items])

    async def DestroyVolume(
        self, request: volumes_pb2.DestroyVolumeRequest, context: Any
    ) -> volumes_pb2.DestroyVolumeResponse:
        """Refused while attached."""
        ctx = self._context
        await destroy_volume(ctx.kv, request.app_name, request.volume_id, entropy=ctx.entropy)
        return volumes_pb2.DestroyVolumeResponse()
