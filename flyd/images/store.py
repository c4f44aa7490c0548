"""ports.ImageStore over a host's Docker engine and a directory of blobs.

    <root>/blobs/     what comes and goes between hosts (blobs.py)
    <root>/tmp/       archives that the engine writes, emptied when the daemon starts

Invariants: an image is loaded only from blobs whose sha256 is right, and marked as flyd's once the
engine has it; a cut transfer goes on where it was; one image is loaded, or saved, once at a time.
Layers that were moved stay for a while as blobs, so that a host that has just got a small change
passes it on without asking its engine for the whole image.

Called by the operations (ensure), the API (all else) and prune.py. Which host to ask for an image is
`fetch`'s matter; what is lacking and what may go is decided in layers.py.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import structlog

from flyd.drivers.locks import Locks
from flyd.errors import Conflict, InvalidInput, NotFound, Refused, Unavailable
from flyd.images.archive import load_stream, open_archive
from flyd.images.blobs import Blobs
from flyd.images.engine import ImageEngine
from flyd.images.layers import checked, lacking, layers_of, needs
from flyd.model import BlobNeed, BlobPart, HeldImage, ImageMove, ImagePlan

Planner = Callable[[Sequence[str]], Awaitable[ImagePlan]]
Fetch = Callable[[str, Planner], AsyncIterator[BlobPart]]
"""The parts of an image from a host that has it; asks the planner, told the layers, what is needed."""

log = structlog.get_logger(__name__)


class EngineImages:
    """The images of one host."""

    def __init__(self, root: Path, engine: ImageEngine, fetch: Fetch) -> None:
        self._engine = engine
        self._fetch = fetch
        self._blobs = Blobs(root / "blobs")
        self._tmp = root / "tmp"
        if self._tmp.exists():
            shutil.rmtree(self._tmp)
        self._tmp.mkdir(parents=True)
        self._fetching = Locks()
        self._loading = Locks()

    async def has(self, image_id: str) -> bool:
        """Whether the engine has the image."""
        return await asyncio.to_thread(self._engine.inspect, checked(image_id)) is not None

    async def ensure(self, image_id: str) -> ImageMove:
        """Fetch, load and mark what is missing; marks also what was here without flyd's doing."""
        async with self._fetching.of(checked(image_id)):
            if (here := await self._take(image_id)) is not None:
                return here

            async def plan(layers: Sequence[str]) -> ImagePlan:
                return await self.plan(image_id, layers)

            return await self.receive(image_id, self._fetch(image_id, plan))

    async def plan(self, image_id: str, layers: Sequence[str]) -> ImagePlan:
        """What the engine and the blobs leave to be sent."""
        for digest in (image_id, *layers):
            checked(digest)
        if await self._take(image_id) is not None:
            return ImagePlan(present=True)

        def look() -> tuple[BlobNeed, ...]:
            received = self._blobs.received_bytes((image_id, *layers))
            return needs(image_id, layers, self._engine.all_layers(), received)

        return ImagePlan(needs=await asyncio.to_thread(look))

    async def receive(self, image_id: str, parts: AsyncIterator[BlobPart]) -> ImageMove:
        """Store the parts, then have the engine load the image from what it lacks."""
        checked(image_id)
        moved_bytes = 0
        welcome = await asyncio.to_thread(self._welcome, image_id)
        async for part in parts:
            if part.digest not in welcome:
                raise InvalidInput(
                    f"blob {part.digest[:12]} is none of image {image_id[:12]}'s, "
                    "or came before its configuration"
                )
            moved_bytes += await asyncio.to_thread(self._blobs.append, part)
            if part.digest == image_id:
                welcome = await asyncio.to_thread(self._welcome, image_id)
        async with self._loading.of(image_id):
            if await self._take(image_id) is None:
                await asyncio.to_thread(self._load, image_id)
            here = await self._take(image_id)
        if here is None:
            raise Refused(
                f"the engine has loaded image {image_id[:12]}, but knows it by another id",
                hint="It keeps images in containerd's store: set `features.containerd-snapshotter` to false "
                "in /etc/docker/daemon.json on that host.",
            )
        # The engine counts files, not the tars around them: a whole image moved is no more than itself.
        move = ImageMove(image_bytes=max(here.image_bytes, moved_bytes), moved_bytes=moved_bytes)
        log.info("image.loaded", image=image_id[:12], moved_bytes=moved_bytes, image_bytes=move.image_bytes)
        return move

    def _welcome(self, image_id: str) -> frozenset[str]:
        """The blobs that an image may consist of, as far as is known: its configuration first."""
        config = self._blobs.path(image_id)
        layers = layers_of(config.read_bytes()) if config.exists() else ()
        return frozenset((image_id, *layers))

    async def _take(self, image_id: str) -> ImageMove | None:
        """Mark the image if the engine has it."""

        def take() -> ImageMove | None:
            found = self._engine.inspect(image_id)
            if found is None:
                return None
            self._engine.mark(image_id)
            return ImageMove(image_bytes=found[1])

        return await asyncio.to_thread(take)

    def _load(self, image_id: str) -> None:
        config_path = self._blobs.path(image_id)
        if not config_path.exists():
            raise Conflict(f"image {image_id[:12]}: its configuration did not come", hint="Send it again.")
        config = config_path.read_bytes()
        layers = layers_of(config)
        wanted = lacking(layers, self._engine.all_layers())
        missing = [layer for layer in wanted if not self._blobs.path(layer).exists()]
        if missing:
            raise Conflict(
                f"image {image_id[:12]}: {len(missing)} of its layers did not come whole, "
                f"{missing[0][:12]} the first",
                hint="Ask what is lacking, and go on from there.",
            )
        given = [(layer, self._blobs.path(layer)) for layer in wanted]
        self._engine.load(image_id, load_stream(image_id, config, layers, given))

    async def layers(self, image_id: str) -> tuple[str, ...]:
        """What the engine says of the image."""
        found = await asyncio.to_thread(self._engine.inspect, checked(image_id))
        if found is None:
            raise NotFound(f"image {image_id[:12]} is not on this host")
        return found[0]

    async def open(self, image_id: str, needs: Sequence[BlobNeed]) -> AsyncIterator[BlobPart]:
        """From the blobs that are here; others are first taken out of what the engine saves."""
        async with self._loading.of(checked(image_id)):
            await asyncio.to_thread(self._extract, image_id, [need.digest for need in needs])
        for need in needs:
            parts = self._blobs.read(need)
            while (part := await asyncio.to_thread(next, parts, None)) is not None:
                yield part

    def _extract(self, image_id: str, digests: Sequence[str]) -> None:
        missing = [digest for digest in digests if not self._blobs.path(digest).exists()]
        if not missing:
            return
        if self._engine.inspect(image_id) is None:
            raise NotFound(f"image {image_id[:12]} is not on this host")
        try:
            with tempfile.NamedTemporaryFile(dir=self._tmp, suffix=".tar") as saved:
                self._engine.save(image_id, Path(saved.name))
                with open_archive(Path(saved.name)) as archive:
                    for digest in missing:
                        for part in archive.blob(BlobNeed(digest=digest)):
                            self._blobs.append(part)
        except OSError as error:
            raise Unavailable(
                f"image {image_id[:12]} could not be saved: {error}", hint="Is the host's disk full?"
            ) from error

    async def held(self) -> tuple[HeldImage, ...]:
        """The images with flyd's mark."""
        return await asyncio.to_thread(self._engine.marked)

    async def remove(self, image_id: str) -> None:
        """Take flyd's mark away; the engine deletes what nothing else names."""
        async with self._loading.of(checked(image_id)):
            gone = await asyncio.to_thread(self._engine.remove, image_id)
        log.info("image.removed" if gone else "image.kept_in_use", image=image_id[:12])

    async def tidy(self, now_s: float) -> None:
        """Blobs that nobody needs any more."""
        try:
            await asyncio.to_thread(self._blobs.tidy, now_s)
        except OSError as error:
            raise Unavailable(f"old blobs could not be removed: {error}") from error
