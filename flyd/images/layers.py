"""Which blobs of an image a host lacks, and when an image may go. Pure.

An engine knows a layer only together with all layers below it, so what it has of an image is the
longest run of lowest layers that some image on it begins with too. Called by store.py (plan, load)
and prune.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from flyd.errors import InvalidInput
from flyd.model import BlobNeed, HeldImage, Value
from flyd.model.image import image_id

CONFIG_MAX_BYTES = 1024 * 1024
LAYERS_MAX = 500  # engines stop at 127
KEPT_RELEASES = 3
ORPHAN_AGE_S = 24 * 3600.0  # an image of no release may be one whose deploy is about to begin

_DIGEST = re.compile(r"[0-9a-f]{64}")


def checked(digest: str) -> str:
    """The digest, if it is one: it becomes a file's name."""
    if not _DIGEST.fullmatch(digest):
        raise InvalidInput(f"{digest[:80]!r} is no digest", hint="a digest is 64 hex digits (sha256)")
    return digest


def bare(digest: str) -> str:
    """`sha256:<hex>` as bare hex."""
    return checked(digest.removeprefix("sha256:"))


def layers_of(config: bytes) -> tuple[str, ...]:
    """The layers that an image's configuration names, the lowest first."""
    try:
        read = msgspec.json.decode(config, type=_Config)
    except msgspec.DecodeError as error:
        raise InvalidInput(f"this is no image configuration: {error}") from error
    if len(read.rootfs.diff_ids) > LAYERS_MAX:
        raise InvalidInput(
            f"an image of {len(read.rootfs.diff_ids)} layers; no engine takes more than {LAYERS_MAX}"
        )
    return tuple(bare(digest) for digest in read.rootfs.diff_ids)


class _RootFs(Value, frozen=True, kw_only=True):
    diff_ids: tuple[str, ...] = ()


class _Config(Value, frozen=True, kw_only=True):
    rootfs: _RootFs


def known_layers(layers: Sequence[str], images: Collection[Sequence[str]]) -> int:
    """How many of the lowest layers an engine with these images has."""
    best = 0
    for image in images:
        shared = 0
        for mine, theirs in zip(layers, image, strict=False):
            if mine != theirs:
                break
            shared += 1
        best = max(best, shared)
    return best


def lacking(layers: Sequence[str], images: Collection[Sequence[str]]) -> tuple[str, ...]:
    """The layers that such an engine must be given, each once."""
    return tuple(dict.fromkeys(layers[known_layers(layers, images) :]))


def needs(
    image: str,
    layers: Sequence[str],
    images: Collection[Sequence[str]],
    received_bytes: Mapping[str, int | None],
) -> tuple[BlobNeed, ...]:
    """What must be sent. `received_bytes`: blobs that are here already, None: whole, else so much of it."""
    wanted = (image, *lacking(layers, images))
    return tuple(
        BlobNeed(digest=digest, offset_bytes=received_bytes.get(digest, 0) or 0)
        for digest in wanted
        if received_bytes.get(digest, 0) is not None
    )


def manifest(image: str, layers: Sequence[str]) -> bytes:
    """manifest.json of an archive whose members are named by `member_name`."""
    entry: dict[str, Any] = {
        "Config": f"{image}.json",
        "RepoTags": None,
        "Layers": [member_name(layer) for layer in layers],
    }
    return msgspec.json.encode([entry])


def member_name(layer: str) -> str:
    """A layer's name in an archive for the engine."""
    return f"{layer}.tar"


def digest_of(data: bytes) -> str:
    """The name of a blob."""
    return hashlib.sha256(data).hexdigest()


class Deployed(Value, frozen=True, kw_only=True):
    """One release, as far as images matter."""

    app: str
    version: int
    image: str  # as the release names it
    complete: bool


def expendable(
    held: Sequence[HeldImage],
    releases: Sequence[Deployed],
    in_use: Collection[str],
    now_s: float,
) -> tuple[str, ...]:
    """The images that may go from a host; `in_use`: image references of all machines' claims.

    Kept are the images of each app's last KEPT_RELEASES releases and of its last complete one, those
    of machines, and for ORPHAN_AGE_S those that no release names: a deploy may be about to.
    """
    kept = {image_id(reference) for reference in in_use}
    by_app: dict[str, list[Deployed]] = {}
    for release in sorted(releases, key=lambda r: (r.app, -r.version)):
        by_app.setdefault(release.app, []).append(release)
    for newest_first in by_app.values():
        kept |= {image_id(release.image) for release in newest_first[:KEPT_RELEASES]}
        complete = [image_id(release.image) for release in newest_first if release.complete]
        kept |= set(complete[:1])
    named = {image_id(release.image) for release in releases}
    return tuple(
        image.image_id
        for image in held
        if image.image_id not in kept and (image.image_id in named or now_s - image.since_s > ORPHAN_AGE_S)
    )
