"""A host's images: cut and corrupted transfers, peers, two senders at once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from flyd.drivers.locks import Locks
from flyd.errors import Conflict, InvalidInput, NotFound, Refused, Unavailable
from flyd.images.blobs import KEPT_BYTES, PART_AGE_S, Blobs
from flyd.images.store import EngineImages, Planner
from flyd.model import BlobNeed, BlobPart, ImagePlan
from tests.support.images import FakeEngine, TinyImage, streamed, tar_of

BASE = TinyImage(tar_of({"base": b"b" * 20_000}))
ONE = TinyImage(*BASE.contents, tar_of({"app": b"1"}))
TWO = TinyImage(*BASE.contents, tar_of({"app": b"2"}))


class Node:
    """A host with a fake engine; fetches from `peer`."""

    def __init__(self, root: Path) -> None:
        self.engine = FakeEngine()
        self.peer: Node | None = None
        self.cuts = 0  # so many fetches end after three parts
        self.images = EngineImages(root, cast(Any, self.engine), self.fetch)

    async def fetch(self, image_id: str, plan: Planner) -> AsyncIterator[BlobPart]:
        assert self.peer is not None
        while True:
            found = await plan(await self.peer.images.layers(image_id))
            sent = 0
            async for part in self.peer.images.open(image_id, found.needs):
                yield part
                sent += 1
                if self.cuts and sent == 3:
                    self.cuts -= 1
                    break
            else:
                return

    async def upload(self, image: TinyImage) -> int:
        found = await self.images.plan(image.id, image.layers)
        return (await self.images.receive(image.id, streamed(image.parts(found.needs)))).moved_bytes


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path / "one")


@pytest.fixture
def other(tmp_path: Path, node: Node) -> Node:
    made = Node(tmp_path / "two")
    made.peer = node
    return made


async def test_a_second_deploy_moves_only_what_changed(node: Node) -> None:
    assert await node.upload(ONE) == sum(map(len, ONE.blobs.values()))
    moved_bytes = await node.upload(TWO)
    assert moved_bytes == len(TWO.config) + len(TWO.contents[1])
    assert node.engine.loads[1] == sorted([f"{TWO.id}.json", f"{TWO.layers[1]}.tar", "manifest.json"])
    assert await node.images.plan(TWO.id, TWO.layers) == ImagePlan(present=True)
    assert [h.image_id for h in await node.images.held()] == sorted([ONE.id, TWO.id])


async def test_a_cut_upload_goes_on_where_it_was(node: Node) -> None:
    found = await node.images.plan(ONE.id, ONE.layers)
    parts = ONE.parts(found.needs)

    async def cut() -> AsyncIterator[BlobPart]:
        for part in parts[:5]:
            yield part
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await node.images.receive(ONE.id, cut())
    assert not await node.images.has(ONE.id)
    again = await node.images.plan(ONE.id, ONE.layers)
    assert again.needs[0] == BlobNeed(digest=BASE.layers[0], offset_bytes=4000)
    move = await node.images.receive(ONE.id, streamed(ONE.parts(again.needs)))
    assert move.moved_bytes == sum(map(len, ONE.blobs.values())) - len(ONE.config) - 4000
    assert await node.images.has(ONE.id)


async def test_an_upload_that_ends_early_loads_nothing(node: Node) -> None:
    found = await node.images.plan(ONE.id, ONE.layers)
    with pytest.raises(Conflict, match="did not come whole"):
        await node.images.receive(ONE.id, streamed(ONE.parts(found.needs)[:-1]))
    with pytest.raises(Conflict, match="configuration"):
        await node.images.receive(TWO.id, streamed([]))
    assert node.engine.loads == []


async def test_a_corrupted_blob_is_refused_and_forgotten(node: Node) -> None:
    found = await node.images.plan(ONE.id, ONE.layers)
    parts = ONE.parts(found.needs)
    parts[-1] = msgspec.structs.replace(parts[-1], data=b"!" + parts[-1].data[1:])
    with pytest.raises(Refused, match="other bytes"):
        await node.images.receive(ONE.id, streamed(parts))
    assert node.engine.loads == []
    again = await node.images.plan(ONE.id, ONE.layers)
    assert again.needs == (BlobNeed(digest=ONE.layers[1]),)
    await node.images.receive(ONE.id, streamed(ONE.parts(again.needs)))
    assert await node.images.has(ONE.id)


async def test_what_is_none_of_the_image_is_refused(node: Node) -> None:
    found = await node.images.plan(ONE.id, ONE.layers)
    with pytest.raises(InvalidInput, match="none of image"):
        await node.images.receive(ONE.id, streamed(ONE.parts(found.needs[::-1])))  # a layer first
    stranger = TWO.parts([BlobNeed(digest=TWO.layers[1])])
    with pytest.raises(InvalidInput, match="none of image"):
        await node.images.receive(ONE.id, streamed([*ONE.parts(found.needs), *stranger]))
    with pytest.raises(InvalidInput, match="no digest"):
        await node.images.receive("../x", streamed([]))


async def test_two_senders_of_one_image_do_not_disturb_each_other(node: Node) -> None:
    found = await node.images.plan(ONE.id, ONE.layers)
    parts = ONE.parts(found.needs)

    async def interleaved() -> AsyncIterator[BlobPart]:
        for part in parts:
            yield part
            yield part

    move = await node.images.receive(ONE.id, interleaved())
    assert move.moved_bytes == sum(map(len, ONE.blobs.values()))
    assert await node.images.has(ONE.id)


async def test_ensure_fetches_from_a_peer_what_is_lacking(node: Node, other: Node) -> None:
    node.engine.images |= {ONE.id: ONE, TWO.id: TWO}
    move = await other.images.ensure(ONE.id)
    assert move.moved_bytes == sum(map(len, ONE.blobs.values()))
    other.cuts = 1
    move = await other.images.ensure(TWO.id)
    assert move.moved_bytes == len(TWO.config) + len(TWO.contents[1])
    assert (await other.images.ensure(TWO.id)).moved_bytes == 0
    assert sorted(other.engine.marks) == sorted([ONE.id, TWO.id])


async def test_ensure_goes_on_after_a_cut(node: Node, other: Node) -> None:
    big = TinyImage(*(os.urandom(5000) for _ in range(6)))
    node.engine.images[big.id] = big
    other.cuts = 2
    assert (await other.images.ensure(big.id)).moved_bytes == sum(map(len, big.blobs.values()))


async def test_what_was_just_moved_is_passed_on_without_saving_the_image(node: Node, other: Node) -> None:
    await node.upload(ONE)
    await other.images.ensure(ONE.id)
    assert node.engine.saves == 0


async def test_an_absent_image_is_not_found(node: Node, other: Node) -> None:
    with pytest.raises(NotFound):
        await other.images.ensure(ONE.id)
    with pytest.raises(NotFound):
        [p async for p in node.images.open(ONE.id, [BlobNeed(digest=ONE.id)])]


async def test_an_engine_that_names_images_otherwise_is_told_apart(node: Node) -> None:
    def forget(image_id: str, archive: Any) -> None:
        b"".join(archive)

    node.engine.load = forget
    with pytest.raises(Refused, match="another id"):
        await node.upload(ONE)


async def test_removing(node: Node) -> None:
    await node.upload(ONE)
    node.engine.in_use = [ONE.id]
    await node.images.remove(ONE.id)
    assert await node.images.has(ONE.id)
    node.engine.in_use = []
    await node.images.remove(ONE.id)
    await node.images.remove(ONE.id)
    assert not await node.images.has(ONE.id)


# --------------------------------------------------------------------------- blobs


async def test_unknown_images_leave_nothing_in_memory(node: Node, other: Node) -> None:
    for number in range(20):
        image_id = hashlib.sha256(b"%d" % number).hexdigest()
        for asked in (other.images.ensure(image_id), other.images.remove(image_id)):
            with suppress(NotFound):
                await asked
    held = [kept for kept in vars(other.images).values() if isinstance(kept, Locks)]
    assert [len(locks) for locks in held] == [0, 0]


def piece(digest: str, whole: bytes, start: int, end: int) -> BlobPart:
    return BlobPart(digest=digest, offset_bytes=start, size_bytes=len(whole), data=whole[start:end])


def test_a_gap_is_a_conflict(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    digest, whole = BASE.layers[0], BASE.contents[0]
    blobs.append(piece(digest, whole, 0, 100))
    with pytest.raises(Conflict, match="up to byte 100"):
        blobs.append(piece(digest, whole, 200, 300))
    assert blobs.append(piece(digest, whole, 50, 150)) == 50


@pytest.mark.parametrize("offset", [0, 7, len(BASE.contents[0])])
def test_a_whole_part_that_was_not_noticed_is_completed(offset: int, tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    digest, whole = BASE.layers[0], BASE.contents[0]
    blobs.append(piece(digest, whole, 0, len(whole) - 1))
    with (tmp_path / f"{digest}.part").open("ab") as file:
        file.write(whole[-1:])  # then the power went
    found = blobs.received_bytes([digest])
    assert found == {digest: len(whole)}
    source = Blobs(tmp_path / "source")
    source.append(piece(digest, whole, 0, len(whole)))
    for part in source.read(BlobNeed(digest=digest, offset_bytes=offset)):
        blobs.append(part)
    assert blobs.received_bytes([digest]) == {digest: None}


@pytest.mark.parametrize(("start", "size"), [(-1, 10), (5, 4), (0, 0)])
def test_impossible_pieces_are_refused(start: int, size: int, tmp_path: Path) -> None:
    part = BlobPart(digest=BASE.layers[0], offset_bytes=start, size_bytes=size, data=b"x")
    with pytest.raises(InvalidInput):
        Blobs(tmp_path).append(part)


def test_tidy_forgets_old_parts_and_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flyd.images.blobs.KEPT_BYTES", 150)
    assert KEPT_BYTES > 150
    ages: Sequence[tuple[str, float]] = [
        ("a.part", PART_AGE_S + 1),
        ("b.part", 1),
        ("c", 3),
        ("d", 2),
        ("e", 1),
    ]
    for name, age_s in ages:
        path = tmp_path / name
        path.write_bytes(bytes(60))
        os.utime(path, (1e9 - age_s, 1e9 - age_s))
    Blobs(tmp_path).tidy(1e9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.part", "d", "e"]


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    blobs = Blobs(tmp_path)
    monkeypatch.setattr("flyd.images.blobs.os.pwrite", full)
    with pytest.raises(Unavailable, match="No space left"):
        blobs.append(piece(BASE.layers[0], BASE.contents[0], 0, 10))
