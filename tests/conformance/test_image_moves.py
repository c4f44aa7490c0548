"""Images on real engines: a laptop's (this machine's), and two hosts' in containers, over real gRPC.

The suite at the top holds for the fake engine of tests/support/images.py too.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import grpc.aio
import pytest

from flyd.api.context import ApiContext
from flyd.api.image_peers import fetch_image
from flyd.api.images import ImagesServicer
from flyd.api.interceptor import ErrorInterceptor
from flyd.api.peers import Peers
from flyd.cli import connection
from flyd.cli.images import bring_image
from flyd.errors import InvalidInput, NotFound, Refused, Unavailable
from flyd.identity.credentials import Credentials
from flyd.identity.folder import write_identity
from flyd.identity.founding import FirstHost, found
from flyd.images import local
from flyd.images.engine import ImageEngine
from flyd.images.local import LocalImage
from flyd.images.store import EngineImages
from flyd.model import App, BlobNeed, BlobPart, Host, ImagePlan, Resources, encode
from flyd.model.image import IMAGE_PREFIX
from flyd.ports import ImageStore, Put
from flyd.store import keys
from flyd.store.memory import MemoryEtcd, MemoryKV
from flyd.store.mirror import Mirror
from flyd.store.system import SystemClock, SystemEntropy
from flyd.v1 import images_pb2, images_pb2_grpc
from tests.support.drivers import BASE_IMAGE
from tests.support.engine import engine
from tests.support.images import FakeEngine, TinyImage, streamed, tar_of
from tests.support.inner_engine import HOST_IMAGE, docker, ensure_host_image, inner_engine

pytestmark = pytest.mark.timeout(180)

LIFETIME_S = 3600.0

SMALL_PART = 0.05  # of an image's bytes, for a change of one line
APP = f"moves{os.getpid()}"


async def no_peer(image_id: str, plan: object) -> AsyncIterator[BlobPart]:
    raise NotFound(f"nobody has {image_id}")
    yield


# --------------------------------------------------------------------------- one store, fake and real


@pytest.fixture(scope="module")
def urls() -> Iterator[tuple[str, str]]:
    engine()
    with inner_engine("one") as one, inner_engine("two") as two:
        yield one, two


@pytest.fixture(params=["fake", "real"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ImageStore:
    if request.param == "fake":
        return EngineImages(tmp_path, cast(Any, FakeEngine()), no_peer)
    url = cast("tuple[str, str]", request.getfixturevalue("urls"))[0]
    return EngineImages(tmp_path, ImageEngine("one", url), no_peer)


def tiny(text: bytes) -> tuple[TinyImage, TinyImage]:
    """Two images of which the second has one layer more."""
    base = TinyImage(tar_of({"base": text + b"b" * 5000}))
    return base, TinyImage(*base.contents, tar_of({"app": text}))


async def upload(store: ImageStore, image: TinyImage) -> tuple[BlobNeed, ...]:
    plan = await store.plan(image.id, image.layers)
    await store.receive(image.id, streamed(image.parts(plan.needs)))
    return plan.needs


async def test_an_image_comes_and_goes(store: ImageStore) -> None:
    base, image = tiny(b"comes")
    assert not await store.has(base.id)
    await upload(store, base)
    assert await store.has(base.id)
    assert await upload(store, image) == (BlobNeed(digest=image.id), BlobNeed(digest=image.layers[1]))
    assert await store.plan(image.id, image.layers) == ImagePlan(present=True)
    assert await store.layers(image.id) == image.layers
    assert {base.id, image.id} <= {held.image_id for held in await store.held()}
    await store.remove(base.id)
    assert not await store.has(base.id)
    assert await store.has(image.id)
    await store.remove(image.id)
    await store.remove(image.id)
    assert not await store.has(image.id)
    with pytest.raises(NotFound):
        await store.ensure(image.id)


async def test_a_wrong_byte_leaves_nothing(store: ImageStore) -> None:
    base, image = tiny(b"wrong")
    await upload(store, base)
    plan = await store.plan(image.id, image.layers)
    parts = image.parts(plan.needs)
    data = parts[-1].data
    parts[-1] = BlobPart(
        digest=parts[-1].digest,
        offset_bytes=parts[-1].offset_bytes,
        size_bytes=parts[-1].size_bytes,
        data=data[:-1] + bytes([data[-1] ^ 1]),
    )
    with pytest.raises(Refused):
        await store.receive(image.id, streamed(parts))
    assert not await store.has(image.id)
    assert (await store.plan(image.id, image.layers)).needs == (BlobNeed(digest=image.layers[1]),)
    await store.remove(base.id)


async def test_what_an_engine_saves_is_what_it_was_given(store: ImageStore, tmp_path: Path) -> None:
    _, image = tiny(b"given")
    await upload(store, image)
    for path in (tmp_path / "blobs").iterdir():
        path.unlink()
    needs = [BlobNeed(digest=digest) for digest in image.blobs]
    found: dict[str, bytes] = dict.fromkeys(image.blobs, b"")
    async for part in store.open(image.id, needs):
        found[part.digest] += part.data
    assert found == image.blobs
    await store.remove(image.id)


def test_an_image_in_use_stays(urls: tuple[str, str], tmp_path: Path) -> None:
    real = ImageEngine("one", urls[0])
    _, image = tiny(b"use")
    image.docker_archive(tmp_path / "i.tar")
    docker("--host", urls[0], "load", "--input", str(tmp_path / "i.tar"))
    real.mark(image.id)
    container = docker("--host", urls[0], "create", f"sha256:{image.id}", "/none")
    assert not real.remove(image.id)
    assert real.inspect(image.id) is not None
    docker("--host", urls[0], "rm", container)
    assert real.remove(image.id)
    assert real.inspect(image.id) is None


# --------------------------------------------------------------------------- laptop -> host -> host


@dataclass
class Cluster:
    """The images service of two hosts, and the engine of each."""

    stores: dict[str, EngineImages]
    urls: dict[str, str]
    addresses: dict[str, str]
    user: Path  # the identity of who asks


@asynccontextmanager
async def cluster(urls: tuple[str, str], root: Path) -> AsyncGenerator[Cluster]:
    etcd = MemoryEtcd()
    kv = MemoryKV(etcd)
    made = Cluster({}, {}, {}, root / "user")
    first = [FirstHost(name=name, addresses=("127.0.0.1",), subnet="127.1") for name in ("ams-1", "iad-1")]
    founded = found(first, "tester", SystemClock(), SystemEntropy(), LIFETIME_S)
    write_identity(made.user, founded.user)
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        tasks: list[asyncio.Task[None]] = []
        await kv.put(keys.app(APP), encode(App(name=APP)))
        for name, region, url in (("ams-1", "ams", urls[0]), ("iad-1", "iad", urls[1])):
            mirror = Mirror(kv, (keys.ROOT,))
            tasks.append(group.create_task(mirror.keep()))
            await mirror.wait_synced()
            write_identity(root / f"{name}-identity", founded.hosts[name])
            credentials = Credentials(root / f"{name}-identity")
            peers = Peers(name, mirror, credentials)
            stack.push_async_callback(peers.close)
            store = EngineImages(root / name, ImageEngine(name, url), partial(fetch_image, peers))
            server = cast(Any, grpc.aio).server(
                interceptors=(ErrorInterceptor(mirror.stale_s, lambda method, context: None),)
            )
            port = server.add_secure_port("127.0.0.1:0", credentials.for_server())
            host = Host(
                name=name, region=region, api_address=f"127.0.0.1:{port}", address="127.0.0.1",
                subnet="127.1", capacity=Resources(), driver="docker", version="0",
            )  # fmt: skip
            context: Any = ApiContext(
                host=host, kv=kv, mirror=mirror, clock=cast(Any, None), entropy=cast(Any, None),
                driver=cast(Any, None), sources=cast(Any, None), peers=peers, etcd_endpoints=(), images=store,
            )  # fmt: skip
            images_pb2_grpc.add_ImagesServiceServicer_to_server(ImagesServicer(context), server)
            await server.start()
            stack.push_async_callback(server.stop, None)
            made.stores[name], made.urls[name], made.addresses[name] = store, url, host.api_address
            etcd.txn((), (Put(keys.host(name), encode(host)), Put(keys.alive(name), b"true")))
        yield made
        for task in tasks:
            task.cancel()


@contextmanager
def speaking_to(hosts: Cluster, name: str, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    monkeypatch.setenv(connection.ENV, hosts.addresses[name])
    monkeypatch.setenv(connection.IDENTITY_ENV, str(hosts.user))
    connection.channel.cache_clear()
    yield
    connection.channel().close()
    connection.channel.cache_clear()


CONFIG = f'app = "{APP}"\nprimary_region = "ams"\n[flyd]\nregions = ["ams", "iad"]\n'


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    label = f"flyd.test={APP}"
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "Dockerfile").write_text(
        f"FROM {BASE_IMAGE}\nLABEL {label}\nARG WORD=none\n"
        'RUN head -c 3000000 /dev/urandom > /big; echo "$WORD" > /word\nCOPY app.py .\n'
    )
    (folder / "app.py").write_text("print('one')\n")
    yield folder
    subprocess.run(("docker", "rmi", "--force", f"fly-{APP}:latest"), capture_output=True, check=False)
    docker("image", "prune", "--force", "--filter", f"label={label}")


def bring(folder: Path, build: dict[str, Any]) -> tuple[str, list[images_pb2.ImageMove]]:
    return bring_image(APP, CONFIG, build, folder, [])


async def test_a_second_deploy_moves_one_layer_to_each_host(
    urls: tuple[str, str], project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(urls, tmp_path) as hosts:
        with speaking_to(hosts, "ams-1", monkeypatch):
            build = {"args": {"WORD": "hello"}}
            first_ref, first = await asyncio.to_thread(bring, project, build)
            assert [move.host for move in first] == ["ams-1", "iad-1"]
            assert all(move.moved_bytes > 0.9 * move.image_bytes and not move.error for move in first)
            (project / "app.py").write_text("print('two')\n")
            second_ref, second = await asyncio.to_thread(bring, project, build)
            assert first_ref != second_ref
            again = await asyncio.to_thread(bring, project, build)
        print(f"second deploy, moved / image bytes: {[(m.moved_bytes, m.image_bytes) for m in second]}")
        assert all(0 < move.moved_bytes < SMALL_PART * move.image_bytes for move in second)
        assert [move.moved_bytes for move in again[1]] == [0, 0]
        for name, url in hosts.urls.items():
            image = second_ref.removeprefix("image:")
            assert image.removeprefix("sha256:") in [h.image_id for h in await hosts.stores[name].held()]
            word = docker("--host", url, "run", "--rm", "--network", "none", image, "cat", "/word", "app.py")
            assert word.splitlines() == ["hello", "print('two')"]
        for ref in (first_ref, second_ref):
            for store in hosts.stores.values():
                await store.remove(ref.removeprefix(IMAGE_PREFIX))


async def test_a_cut_line_is_gone_on_with(
    urls: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = TinyImage(*(tar_of({f"f{n}": os.urandom(3_000_000)}) for n in range(3)))
    image.oci_archive(tmp_path / "image.tar")
    async with cluster(urls, tmp_path) as hosts:
        store = hosts.stores["ams-1"]
        receive, cuts = store.receive, [2]

        async def cut_receive(image_id: str, parts: AsyncIterator[BlobPart]) -> Any:
            async def cut() -> AsyncIterator[BlobPart]:
                seen = 0
                async for part in parts:
                    yield part
                    seen += 1
                    if cuts[0] and seen == 4:
                        cuts[0] -= 1
                        raise LineCut

            try:
                return await receive(image_id, cut())
            except LineCut:
                raise Unavailable("the line was cut") from None

        monkeypatch.setattr(store, "receive", cut_receive)
        with speaking_to(hosts, "ams-1", monkeypatch):
            ref, moves = await asyncio.to_thread(bring, tmp_path, {"image": "image.tar"})
        assert cuts == [0]
        assert ref == IMAGE_PREFIX + image.id
        size_bytes = sum(map(len, image.blobs.values()))
        assert size_bytes <= moves[0].moved_bytes < size_bytes * 1.9  # what was in flight goes twice
        assert moves[1].moved_bytes == size_bytes
        for kept in hosts.stores.values():
            await kept.remove(image.id)


class LineCut(Exception):
    """The line was cut, as the test's wire says it."""


# --------------------------------------------------------------------------- the laptop


@pytest.fixture(params=["this machine's", "Debian's"])
def docker_command(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The docker command of this machine, and that of Debian 12 (20.10), which has BuildKit in itself."""
    engine()
    if request.param == "Debian's":
        ensure_host_image()
        container = docker("create", HOST_IMAGE)
        docker("cp", f"{container}:/usr/bin/docker", str(tmp_path / "docker"))
        docker("rm", container)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        assert local.builder() == local.BUILDKIT
    return request.param


def test_an_ignorefile_keeps_files_out_and_a_target_is_chosen(
    docker_command: str, project: Path, tmp_path: Path
) -> None:
    (project / "Dockerfile").write_text(
        f"FROM {BASE_IMAGE} AS a\nLABEL flyd.test={APP}\nCOPY . /src\nFROM a AS b\nRUN false\n"
    )
    (project / "secret.env").write_text("x")
    (project / "ignored").write_text("*.env\n")
    lines: list[str] = []
    build = {"ignorefile": "ignored", "build-target": "a"}
    image = local.take(project, APP, build, tmp_path, lines.append)
    assert any("COPY" in line for line in lines)
    listed = docker("run", "--rm", "--network", "none", image.name, "ls", "/src").split()
    assert "app.py" in listed
    assert "secret.env" not in listed


def test_a_failed_build_shows_its_last_lines(docker_command: str, project: Path, tmp_path: Path) -> None:
    (project / "Dockerfile").write_text(
        f"FROM {BASE_IMAGE}\nLABEL flyd.test={APP}\nRUN echo why it failed; exit 7\n"
    )
    with pytest.raises(InvalidInput, match="why it failed"):
        local.take(project, APP, {}, tmp_path, lambda _: None)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        ({"dockerfile": "absent"}, "absent"),
        ({"builder": "paketo"}, "buildpacks"),
        ({"image": "flyd.invalid/none:1"}, "can not be pulled"),
        ({"image": "none.tar"}, "none.tar"),
        ({"args": ["a"]}, "table"),
        ({"image": 3}, "text"),
    ],
)
def test_what_cannot_be_built_says_why(
    build: dict[str, Any], says: str, project: Path, tmp_path: Path
) -> None:
    engine()
    with pytest.raises(InvalidInput, match=says):
        local.take(project, APP, build, tmp_path, lambda _: None)


def test_a_local_image_is_taken_by_its_name(tmp_path: Path) -> None:
    engine()
    image: LocalImage = local.take(tmp_path, APP, {"image": BASE_IMAGE}, tmp_path, lambda _: None)
    assert docker("image", "inspect", BASE_IMAGE, "--format", "{{.Id}}") == f"sha256:{image.image_id}"
    assert not image.archive
