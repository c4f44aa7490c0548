"""Tiny images made of bytes: no engine needed."""

from __future__ import annotations

import gzip
import io
import json
import platform
import tarfile
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path

from flyd.errors import NotFound, Unavailable
from flyd.images.archive import MACHINES
from flyd.images.layers import digest_of
from flyd.model import BlobNeed, BlobPart, HeldImage, ImageMove, ImagePlan

ARCHITECTURE = MACHINES.get(platform.machine(), platform.machine())


def tar_of(files: dict[str, bytes]) -> bytes:
    into = io.BytesIO()
    with tarfile.open(fileobj=into, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return into.getvalue()


class TinyImage:
    """An image whose layers are given; knows its blobs and how archives show it."""

    def __init__(self, *layers: bytes) -> None:
        self.contents = layers
        self.layers = tuple(digest_of(layer) for layer in layers)
        self.config = json.dumps(
            {
                "architecture": ARCHITECTURE,
                "os": "linux",
                "config": {"Cmd": ["/none"]},
                "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer}" for layer in self.layers]},
            }
        ).encode()
        self.id = digest_of(self.config)
        self.blobs = {self.id: self.config, **dict(zip(self.layers, layers, strict=True))}

    def docker_archive(self, into: Path) -> Path:
        names = [f"{n}/layer.tar" for n in range(len(self.layers))]
        manifest = [{"Config": f"{self.id}.json", "RepoTags": None, "Layers": names}]
        files = {
            **dict(zip(names, self.contents, strict=True)),
            f"{self.id}.json": self.config,
            "manifest.json": json.dumps(manifest).encode(),
        }
        into.write_bytes(tar_of(files))
        return into

    def oci_archive(self, into: Path, *, nested: bool = False) -> Path:
        """With gzipped layers, as containerd's store saves them."""
        blobs: dict[str, bytes] = {}

        def put(data: bytes) -> str:
            blobs[f"blobs/sha256/{digest_of(data)}"] = data
            return f"sha256:{digest_of(data)}"

        layers = [{"digest": put(gzip.compress(layer))} for layer in self.contents]
        manifest = put(json.dumps({"config": {"digest": put(self.config)}, "layers": layers}).encode())
        entries = [
            {"digest": "sha256:" + "0" * 64, "platform": {"os": "linux", "architecture": "s390x"}},
            {"digest": manifest, "platform": {"os": "linux", "architecture": ARCHITECTURE}},
        ]
        if nested:
            entries = [{"digest": put(json.dumps({"manifests": entries}).encode())}]
        into.write_bytes(tar_of({**blobs, "index.json": json.dumps({"manifests": entries}).encode()}))
        return into

    def parts(self, needs: Sequence[BlobNeed], piece_bytes: int = 1000) -> list[BlobPart]:
        found: list[BlobPart] = []
        for need in needs:
            whole = self.blobs[need.digest]
            for offset in range(need.offset_bytes, len(whole), piece_bytes):
                data = whole[offset : offset + piece_bytes]
                found.append(
                    BlobPart(digest=need.digest, offset_bytes=offset, size_bytes=len(whole), data=data)
                )
        return found


async def streamed(parts: Iterable[BlobPart]) -> AsyncIterator[BlobPart]:
    for part in parts:
        yield part


class FakeEngine:
    """A Docker engine's images as far as moving them goes; it verifies layers as dockerd does."""

    def __init__(self) -> None:
        self.images: dict[str, TinyImage] = {}
        self.marks: dict[str, float] = {}
        self.in_use: list[str] = []
        self.loads: list[list[str]] = []  # the members of each archive that was loaded
        self.saves = 0
        self.clock_s = 0.0

    def inspect(self, image_id: str) -> tuple[tuple[str, ...], int] | None:
        image = self.images.get(image_id)
        return (image.layers, sum(map(len, image.contents))) if image else None

    def all_layers(self) -> tuple[tuple[str, ...], ...]:
        return tuple(image.layers for image in self.images.values())

    def load(self, image_id: str, archive: Iterable[bytes]) -> None:
        with tarfile.open(fileobj=io.BytesIO(b"".join(archive))) as tar:
            files = {m.name: f.read() for m in tar if (f := tar.extractfile(m))}
        self.loads.append(sorted(files))
        entry = json.loads(files["manifest.json"])[0]
        config = json.loads(files[entry["Config"]])
        contents: list[bytes] = []
        wanted = [d.removeprefix("sha256:") for d in config["rootfs"]["diff_ids"]]
        for n, (digest, name) in enumerate(zip(wanted, entry["Layers"], strict=True)):
            known = next(
                (i for i in self.images.values() if list(i.layers[: n + 1]) == wanted[: n + 1]), None
            )
            contents.append(known.contents[n] if known else files[name])
            assert digest_of(contents[-1]) == digest
        image = TinyImage(*contents)
        assert image.config == files[entry["Config"]]
        self.images[image.id] = image

    def save(self, image_id: str, path: Path) -> None:
        self.saves += 1
        self.images[image_id].docker_archive(path)

    def mark(self, image_id: str) -> None:
        self.marks[image_id] = self.clock_s

    def marked(self) -> tuple[HeldImage, ...]:
        return tuple(HeldImage(image_id=i, since_s=self.marks[i]) for i in sorted(self.marks))

    def remove(self, image_id: str) -> bool:
        if image_id in self.in_use:
            return False
        self.marks.pop(image_id, None)
        self.images.pop(image_id, None)
        return True


class FakeImages:
    """ports.ImageStore for loops: images are names; `elsewhere` is what other hosts have."""

    def __init__(self, *elsewhere: str) -> None:
        self.elsewhere = [*elsewhere]
        self.here: dict[str, float] = {}
        self.removed: list[str] = []
        self.tidied: list[float] = []
        self.fails = 0

    async def has(self, image_id: str) -> bool:
        return image_id in self.here

    async def ensure(self, image_id: str) -> ImageMove:
        if self.fails:
            self.fails -= 1
            raise Unavailable("no host that answers has it")
        if image_id in self.here:
            return ImageMove(image_bytes=10)
        if image_id not in self.elsewhere:
            raise NotFound(f"image {image_id[:12]} is on no host")
        self.here[image_id] = 0.0
        return ImageMove(image_bytes=10, moved_bytes=10)

    async def plan(self, image_id: str, layers: Sequence[str]) -> ImagePlan:
        return ImagePlan(present=image_id in self.here)

    async def receive(self, image_id: str, parts: AsyncIterator[BlobPart]) -> ImageMove:
        moved_bytes = sum([len(part.data) async for part in parts])
        self.here[image_id] = 0.0
        return ImageMove(image_bytes=moved_bytes, moved_bytes=moved_bytes)

    async def layers(self, image_id: str) -> tuple[str, ...]:
        return ()

    async def open(self, image_id: str, needs: Sequence[BlobNeed]) -> AsyncIterator[BlobPart]:
        for need in needs:
            yield BlobPart(digest=need.digest, offset_bytes=0, size_bytes=1, data=b"x")

    async def held(self) -> tuple[HeldImage, ...]:
        return tuple(HeldImage(image_id=i, since_s=self.here[i]) for i in sorted(self.here))

    async def remove(self, image_id: str) -> None:
        if self.fails:
            self.fails -= 1
            raise Unavailable("the engine does not answer")
        self.removed.append(image_id)
        self.here.pop(image_id, None)

    async def tidy(self, now_s: float) -> None:
        self.tidied.append(now_s)
