"""Images from the other hosts' flyds: the `fetch` of flyd/images/store.py."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import grpc.aio

from flyd.api.images import DRIVER, blob_part
from flyd.api.peers import Peers
from flyd.api.status import from_rpc
from flyd.errors import NotFound, Unavailable
from flyd.model import BlobPart, ImagePlan
from flyd.v1 import images_pb2, images_pb2_grpc

GET_TIMEOUT_S = 30.0


async def fetch_image(
    peers: Peers, image_id: str, plan: Callable[[Sequence[str]], Awaitable[ImagePlan]]
) -> AsyncIterator[BlobPart]:
    """What is lacking of an image, from the living hosts that have it.

    If one fails in the middle the next one goes on from there: `plan` is asked anew for each.
    """
    tried: list[str] = []
    absent = True
    for host in peers.living():
        if host.driver != DRIVER:
            continue
        stub = images_pb2_grpc.ImagesServiceStub(peers.channel(host))
        try:
            get = images_pb2.GetImageRequest(image_id=image_id)
            layers = (await stub.GetImage(get, timeout=GET_TIMEOUT_S)).layers
            needs = [
                images_pb2.BlobNeed(digest=n.digest, offset_bytes=n.offset_bytes)
                for n in (await plan(layers)).needs
            ]
            request = images_pb2.DownloadImageRequest(image_id=image_id, needs=needs)
            async for response in stub.DownloadImage(request):
                yield blob_part(response.part)
        except grpc.aio.AioRpcError as rpc_error:
            error = from_rpc(rpc_error, host.api_address)
            absent = absent and isinstance(error, NotFound)
            tried.append(f"{host.name}: {error.message}")
        else:
            return
    raise (NotFound if absent else Unavailable)(
        f"image {image_id[:12]} is on no host that answers ({'; '.join(tried) or 'no other host is up'})",
        hint="Deploy again: `fly deploy` moves it anew.",
    )
