"""Reading what engines save, writing what they load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flyd.errors import InvalidInput
from flyd.images.archive import load_stream, open_archive
from flyd.images.blobs import PART_BYTES
from flyd.model import BlobNeed
from tests.support.images import FakeEngine, TinyImage, tar_of

BIG = tar_of({"big": b"0123456789abcdef" * (PART_BYTES // 10)})
IMAGE = TinyImage(BIG, tar_of({"small": b"x"}))


def docker(path: Path) -> Path:
    return IMAGE.docker_archive(path)


def oci(path: Path) -> Path:
    return IMAGE.oci_archive(path)


def oci_nested(path: Path) -> Path:
    return IMAGE.oci_archive(path, nested=True)


@pytest.mark.parametrize("make", [docker, oci, oci_nested])
def test_both_layouts_give_the_same_blobs(make: Callable[[Path], Path], tmp_path: Path) -> None:
    with open_archive(make(tmp_path / "image.tar")) as archive:
        assert (archive.image_id, archive.layers) == (IMAGE.id, IMAGE.layers)
        for digest, content in IMAGE.blobs.items():
            for offset in (0, 1, len(content) - 1, len(content)):
                parts = list(archive.blob(BlobNeed(digest=digest, offset_bytes=offset)))
                assert b"".join(part.data for part in parts) == content[offset:]
                assert parts[0].offset_bytes == offset
                assert {part.size_bytes for part in parts} == {len(content)}
                assert all(len(part.data) <= PART_BYTES for part in parts)


def test_what_is_no_archive_of_one_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for content in (b"", b"no tar", tar_of({"x": b""}), tar_of({"manifest.json": b"[]"})):
        path.write_bytes(content)
        with pytest.raises(InvalidInput), open_archive(path):
            pass
    for content in (b"{", b'[{"Config": "a", "Layers": []}]', b'[{"Layers": []}]', b"[1]"):
        path.write_bytes(tar_of({"manifest.json": content}))
        with pytest.raises(InvalidInput), open_archive(path):
            pass


def test_a_missing_layer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(
        tar_of(
            {
                "c": IMAGE.config,
                "manifest.json": b'[{"Config": "c", "Layers": ["1/layer.tar", "2/layer.tar"]}]',
            }
        )
    )
    with open_archive(path) as archive, pytest.raises(InvalidInput, match=r"1/layer\.tar"):
        list(archive.blob(BlobNeed(digest=IMAGE.layers[0])))


def test_an_engine_takes_an_archive_without_the_layers_it_has(tmp_path: Path) -> None:
    engine = FakeEngine()
    base = TinyImage(BIG)
    engine.images[base.id] = base
    layer = tmp_path / "layer"
    layer.write_bytes(IMAGE.contents[1])
    engine.load(IMAGE.id, load_stream(IMAGE.id, IMAGE.config, IMAGE.layers, [(IMAGE.layers[1], layer)]))
    assert engine.inspect(IMAGE.id) is not None
    assert engine.loads == [sorted([f"{IMAGE.id}.json", f"{IMAGE.layers[1]}.tar", "manifest.json"])]
