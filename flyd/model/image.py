"""Container images as flyds move them: by content, in blobs, only what is lacking.

An image's id is the sha256 of its configuration, which names the sha256 of each layer (the
uncompressed tar: its diff id). So configuration and layers are all blobs, and a blob's name proves
its bytes. Digests are bare hex here; a reference is IMAGE_PREFIX and the id.
"""

from __future__ import annotations

from flyd.model.value import Value

IMAGE_PREFIX = "image:sha256:"


def image_id(reference: str) -> str:
    """The id that an image reference names; empty for what is no container image."""
    return reference.removeprefix(IMAGE_PREFIX) if reference.startswith(IMAGE_PREFIX) else ""


class BlobNeed(Value, frozen=True, kw_only=True):
    """A blob that is lacking, from this offset on: what came before a cut is not sent again."""

    digest: str
    offset_bytes: int = 0


class BlobPart(Value, frozen=True, kw_only=True):
    """A piece of a blob."""

    digest: str
    offset_bytes: int
    size_bytes: int  # of the whole blob
    data: bytes


class ImagePlan(Value, frozen=True, kw_only=True):
    """What a host still needs of an image; `present`: nothing, its engine has it."""

    present: bool = False
    needs: tuple[BlobNeed, ...] = ()


class ImageMove(Value, frozen=True, kw_only=True):
    """What moving an image to a host took."""

    image_bytes: int = 0
    moved_bytes: int = 0  # 0: the host had it


class HeldImage(Value, frozen=True, kw_only=True):
    """An image that flyd put on a host, or took as its own there."""

    image_id: str
    since_s: float  # when that was last so, by the engine's clock
