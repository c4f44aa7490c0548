"""ImagesService: images in and out of this host, and spread over the others.

Only hosts whose driver is Docker have an image store; the others refuse. Spreading asks every host on
which a deploy may put machines to fetch the image itself: a host that does not answer now gets it
when it is to make a machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from flyd.api.context import ApiContext
from flyd.api.status import from_rpc
from flyd.deploy import appconfig
from flyd.errors import FlydError, InvalidInput, Refused
from flyd.model import BlobNeed, BlobPart, Host, ImageMove
from flyd.model.image import IMAGE_PREFIX
from flyd.ports import ImageStore
from flyd.store import keys
from flyd.v1 import images_pb2, images_pb2_grpc

DRIVER = "docker"
ENSURE_TIMEOUT_S = 1800.0


class ImagesServicer(images_pb2_grpc.ImagesServiceServicer):
    """Images over gRPC."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    @property
    def _images(self) -> ImageStore:
        if self._context.images is None:
            raise Refused(
                f"host {self._context.host.name} runs no container images: "
                f"its driver is {self._context.host.driver!r}",
                hint='Its /etc/flyd.toml would say `driver = "docker"`; `fly hosts list` shows the drivers.',
            )
        return self._context.images

    async def PlanImage(
        self, request: images_pb2.PlanImageRequest, context: Any
    ) -> images_pb2.PlanImageResponse:
        """What this host lacks."""
        plan = await self._images.plan(request.image_id, tuple(request.layers))
        needs = [images_pb2.BlobNeed(digest=n.digest, offset_bytes=n.offset_bytes) for n in plan.needs]
        return images_pb2.PlanImageResponse(present=plan.present, needs=needs)

    async def UploadImage(
        self, request_iterator: AsyncIterator[images_pb2.UploadImageRequest], context: Any
    ) -> images_pb2.UploadImageResponse:
        """Store what comes and load the image; the other hosts fetch it from here."""
        first = await anext(aiter(request_iterator), None)
        if first is None or not first.image_id:
            raise InvalidInput("an upload begins with the image's id")

        async def parts() -> AsyncIterator[BlobPart]:
            if first.HasField("part"):
                yield blob_part(first.part)
            async for request in request_iterator:
                yield blob_part(request.part)

        move = await self._images.receive(first.image_id, parts())
        return images_pb2.UploadImageResponse(
            image_ref=IMAGE_PREFIX + first.image_id, move=_move(self._context.host.name, move)
        )

    async def GetImage(
        self, request: images_pb2.GetImageRequest, context: Any
    ) -> images_pb2.GetImageResponse:
        """Of this host only."""
        return images_pb2.GetImageResponse(layers=await self._images.layers(request.image_id))

    async def DownloadImage(
        self, request: images_pb2.DownloadImageRequest, context: Any
    ) -> AsyncIterator[images_pb2.DownloadImageResponse]:
        """Only what is on this host: a flyd never asks others on behalf of others."""
        needs = [BlobNeed(digest=n.digest, offset_bytes=n.offset_bytes) for n in request.needs]
        async for part in self._images.open(request.image_id, needs):
            yield images_pb2.DownloadImageResponse(
                part=images_pb2.BlobPart(
                    digest=part.digest,
                    offset_bytes=part.offset_bytes,
                    size_bytes=part.size_bytes,
                    data=part.data,
                )
            )

    async def EnsureImage(
        self, request: images_pb2.EnsureImageRequest, context: Any
    ) -> images_pb2.EnsureImageResponse:
        """Have it here."""
        move = await self._images.ensure(request.image_id)
        return images_pb2.EnsureImageResponse(move=_move(self._context.host.name, move))

    async def SpreadImage(
        self, request: images_pb2.SpreadImageRequest, context: Any
    ) -> AsyncIterator[images_pb2.SpreadImageResponse]:
        """All hosts at once, each told of as it is done; a host's failure is its line, not the call's end."""
        hosts = self._hosts(request)
        done: asyncio.Queue[images_pb2.ImageMove] = asyncio.Queue()

        async def bring(host: Host) -> None:
            try:
                done.put_nowait(await self._bring(host, request.image_id))
            except FlydError as error:
                done.put_nowait(images_pb2.ImageMove(host=host.name, error=error.message))

        async with asyncio.TaskGroup() as group:
            for host in hosts:
                group.create_task(bring(host), name=host.name)
            for _ in hosts:
                yield images_pb2.SpreadImageResponse(move=await done.get())

    def _hosts(self, request: images_pb2.SpreadImageRequest) -> list[Host]:
        """The living Docker hosts of the regions that a deploy of this app would use."""
        ctx = self._context
        app = ctx.app(request.app_name)
        config = appconfig.parse(request.config, "fly.toml")
        regions = list(request.regions) or list(app.regions or config.regions)
        hosts = [item.value for item in ctx.mirror.list(keys.HOSTS, Host)]
        return [h for h in hosts if h.region in regions and h.driver == DRIVER and ctx.alive(h.name)]

    async def _bring(self, host: Host, image_id: str) -> images_pb2.ImageMove:
        if host.name == self._context.host.name:
            return _move(host.name, await self._images.ensure(image_id))
        stub = images_pb2_grpc.ImagesServiceStub(self._context.peers.channel(host))
        try:
            request = images_pb2.EnsureImageRequest(image_id=image_id)
            return (await stub.EnsureImage(request, timeout=ENSURE_TIMEOUT_S)).move
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, host.api_address) from error


def blob_part(part: images_pb2.BlobPart) -> BlobPart:
    """A piece as the store takes it."""
    return BlobPart(
        digest=part.digest, offset_bytes=part.offset_bytes, size_bytes=part.size_bytes, data=part.data
    )


def _move(host: str, move: ImageMove) -> images_pb2.ImageMove:
    return images_pb2.ImageMove(host=host, image_bytes=move.image_bytes, moved_bytes=move.moved_bytes)
