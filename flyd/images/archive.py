"""Image archives: reading what `docker save` and its kin write, writing what `docker load` takes.

Read are both layouts: `manifest.json` (docker save, every version) and OCI (`index.json`). A layer
may be stored gzipped; a blob is always the uncompressed tar, since its sha256 is the diff id.
Written is the first layout without the layers that the engine has: its loader never opens those
(true of the engine's own image store; one that uses containerd's wants all of them).

Blocking. Called by the `fly deploy` command and by store.py. Verifies the configuration's digest;
the layers' are verified by whoever stores them (blobs.py).
"""

from __future__ import annotations

import gzip
import platform
import tarfile
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import msgspec

from flyd.errors import InvalidInput
from flyd.images.blobs import PART_BYTES, parts
from flyd.images.layers import CONFIG_MAX_BYTES, bare, digest_of, layers_of, manifest, member_name
from flyd.model import BlobNeed, BlobPart

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
INDEX_DEPTH = 3


class Archive:
    """One image in an archive. Made by `open_archive`."""

    def __init__(self, tar: tarfile.TarFile, name: str) -> None:
        self._tar = tar
        self._name = name
        config, members = self._find()
        self.config = self._read(config)
        self.image_id = digest_of(self.config)
        self.layers = layers_of(self.config)
        if len(members) != len(self.layers):
            raise InvalidInput(f"{name}: {len(self.layers)} layers are named, {len(members)} are there")
        self._members = dict(zip(self.layers, members, strict=True))

    def blob(self, need: BlobNeed) -> Iterator[BlobPart]:
        """The configuration or a layer, from an offset on, in pieces of PART_BYTES."""
        digest = need.digest
        if digest == self.image_id:
            size_bytes, content = len(self.config), iter((self.config,))
        elif digest in self._members:
            member = self._members[digest]
            size_bytes, content = self._size_bytes(member), self._content(member)
        else:
            raise InvalidInput(f"{self._name}: image {self.image_id[:12]} has no blob {digest[:12]}")
        return parts(need, size_bytes, content)

    def _find(self) -> tuple[str, list[str]]:
        """The members that are the configuration and the layers."""
        names = frozenset(self._tar.getnames())
        if "manifest.json" in names:
            entries = self._json("manifest.json")
            if len(entries) != 1:
                raise InvalidInput(
                    f"{self._name} holds {len(entries)} images", hint="Save one image: docker save NAME."
                )
            return entries[0]["Config"], list(entries[0]["Layers"] or [])
        if "index.json" not in names:
            raise InvalidInput(
                f"{self._name} is no image archive: neither manifest.json nor index.json is in it",
                hint="`docker save NAME -o FILE.tar` makes one.",
            )
        chosen = self._choose(self._json("index.json"), INDEX_DEPTH)
        return _blob_name(chosen["config"]), [_blob_name(layer) for layer in chosen["layers"]]

    def _choose(self, index: dict[str, Any], depth: int) -> dict[str, Any]:
        """The manifest for this machine's kind of processor, also through an index in an index."""
        machine = MACHINES.get(platform.machine(), platform.machine())
        for entry in cast("list[dict[str, Any]]", index.get("manifests") or []):
            wanted: dict[str, str] = entry.get("platform") or {}
            if wanted.get("architecture", machine) != machine or wanted.get("os", "linux") != "linux":
                continue
            found = self._json(_blob_name(entry))
            if "layers" in found:
                return found
            if depth:
                return self._choose(found, depth - 1)
        raise InvalidInput(f"{self._name} holds no image for linux/{machine}")

    def _json(self, name: str) -> Any:
        try:
            return msgspec.json.decode(self._read(name))
        except msgspec.DecodeError as error:
            raise InvalidInput(f"{self._name}: {name} is not JSON: {error}") from error

    def _read(self, name: str) -> bytes:
        with self._open(name) as file:
            data = file.read(CONFIG_MAX_BYTES + 1)
        if len(data) > CONFIG_MAX_BYTES:
            raise InvalidInput(f"{self._name}: {name} is larger than {CONFIG_MAX_BYTES} bytes")
        return data

    def _open(self, name: str) -> IO[bytes]:
        try:
            file = self._tar.extractfile(name)
        except KeyError:
            file = None
        if file is None:
            raise InvalidInput(
                f"{self._name}: {name} is named in it and missing", hint="Save the image again."
            )
        return file

    def _size_bytes(self, name: str) -> int:
        """Of the uncompressed layer; reads it through if it is compressed."""
        with self._open(name) as file:
            if not file.read(len(GZIP_MAGIC)).startswith(GZIP_MAGIC):
                return file.seek(0, 2)
        return sum(len(data) for data in self._content(name))

    def _content(self, name: str) -> Iterator[bytes]:
        """A layer's uncompressed bytes."""
        with self._open(name) as file:
            start = file.read(len(ZSTD_MAGIC))
            file.seek(0)
            if start == ZSTD_MAGIC:
                raise InvalidInput(
                    f"{self._name}: a layer is compressed with zstd",
                    hint="Build with gzip, or load it into an engine and save it from there.",
                )
            plain = gzip.GzipFile(fileobj=file) if start.startswith(GZIP_MAGIC) else file
            while data := plain.read(PART_BYTES):
                yield data


def _blob_name(descriptor: dict[str, Any]) -> str:
    return f"blobs/sha256/{bare(str(descriptor['digest']))}"


@contextmanager
def open_archive(path: Path) -> Generator[Archive]:
    """The image in a file."""
    try:
        tar = tarfile.open(path, "r:*")  # noqa: SIM115 - closed below; only the opening is guarded here
    except (OSError, tarfile.TarError) as error:
        raise InvalidInput(f"{path} can not be read as an image archive: {error}") from error
    with tar:
        try:
            yield Archive(tar, path.name)
        except (tarfile.TarError, zlib.error, EOFError, KeyError, TypeError) as error:
            raise InvalidInput(f"{path} is damaged: {type(error).__name__} {error}") from error


def load_stream(
    image_id: str, config: bytes, layers: Sequence[str], given: Sequence[tuple[str, Path]]
) -> Iterator[bytes]:
    """The archive that makes an engine with the other layers have the image; `given`: layer -> its file."""
    yield from _member(f"{image_id}.json", len(config), iter((config,)))
    for layer, path in given:
        yield from _member(member_name(layer), path.stat().st_size, _file(path))
    listed = manifest(image_id, layers)
    yield from _member("manifest.json", len(listed), iter((listed,)))
    yield bytes(2 * tarfile.BLOCKSIZE)


def _member(name: str, size_bytes: int, content: Iterator[bytes]) -> Iterator[bytes]:
    info = tarfile.TarInfo(name)
    info.size = size_bytes
    yield info.tobuf(tarfile.PAX_FORMAT)
    yield from content
    if size_bytes % tarfile.BLOCKSIZE:
        yield bytes(tarfile.BLOCKSIZE - size_bytes % tarfile.BLOCKSIZE)


def _file(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(PART_BYTES):
            yield data
