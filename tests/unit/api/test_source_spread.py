"""An uploaded source is on a second host before the upload is answered: real gRPC between real stores."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc.aio
import msgspec
import pytest

from flyd.api import peers as peers_module
from flyd.api.interceptor import ErrorInterceptor
from flyd.api.peers import Peers
from flyd.api.releases import ReleasesServicer
from flyd.api.status import from_rpc
from flyd.drivers.process.sources import DirectorySources, pack
from flyd.errors import Unavailable
from flyd.model import encode
from flyd.ports import Delete
from flyd.store import keys
from flyd.store.memory import MemoryEtcd, MemoryKV
from flyd.store.mirror import Mirror
from flyd.v1 import releases_pb2, releases_pb2_grpc
from tests.support.placing import make_host

pytestmark = pytest.mark.timeout(30)


class OneHost:
    """A host's sources behind its API, and its view of the others."""

    def __init__(self, name: str, folder: Path, etcd: MemoryEtcd) -> None:
        self.name = name
        self.mirror = Mirror(MemoryKV(etcd), (keys.HOSTS, keys.ALIVE))
        self.peers = Peers(name, self.mirror)
        self.sources = DirectorySources(folder, self.peers.fetch_source)
        self.server: grpc.aio.Server = cast(Any, grpc.aio).server(
            interceptors=(ErrorInterceptor(self.mirror.stale_s, lambda method, context: None),)
        )
        context = cast(Any, SimpleNamespace(sources=self.sources, peers=self.peers))
        releases_pb2_grpc.add_ReleasesServiceServicer_to_server(ReleasesServicer(context), self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"

    async def upload(self, tar: bytes) -> None:
        """What `fly deploy` does."""

        async def chunks() -> AsyncIterator[releases_pb2.UploadSourceRequest]:
            yield releases_pb2.UploadSourceRequest(digest=hashlib.sha256(tar).hexdigest(), data=tar)

        async with grpc.aio.insecure_channel(self.address) as channel:
            try:
                await releases_pb2_grpc.ReleasesServiceStub(channel).UploadSource(chunks())
            except grpc.aio.AioRpcError as error:
                raise from_rpc(error, self.address) from None


@asynccontextmanager
async def hosts(folder: Path, *names: str) -> AsyncGenerator[tuple[MemoryKV, list[OneHost]]]:
    """Hosts that see each other and answer."""
    etcd = MemoryEtcd()
    kv = MemoryKV(etcd)
    made = [OneHost(name, folder / name, etcd) for name in names]
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        for one in made:
            described = msgspec.structs.replace(make_host(one.name), api_address=one.address)
            await kv.put(keys.host(one.name), encode(described))
            await kv.put(keys.alive(one.name), b"true")
            await one.server.start()
            stack.push_async_callback(one.server.stop, None)
            stack.push_async_callback(one.peers.close)
        keepers = [group.create_task(one.mirror.keep()) for one in made]
        for one in made:
            await one.mirror.wait_synced()
        yield kv, made
        for keeper in keepers:
            keeper.cancel()


@pytest.fixture
def tar(tmp_path: Path) -> bytes:
    """A packed source."""
    tree, file = tmp_path / "tree", tmp_path / "tar"
    tree.mkdir()
    (tree / "app.py").write_text("print('hello')\n")
    with file.open("wb") as into:
        pack(tree, into)
    return file.read_bytes()


def holders(made: list[OneHost], tar: bytes) -> list[str]:
    return [one.name for one in made if one.sources.has(hashlib.sha256(tar).hexdigest())]


async def test_an_upload_is_on_every_living_host_when_it_is_answered(tmp_path: Path, tar: bytes) -> None:
    async with hosts(tmp_path, "ams-1", "iad-1", "sin-1") as (_, made):
        await made[0].upload(tar)
        assert holders(made, tar) == ["ams-1", "iad-1", "sin-1"]


async def test_one_other_host_is_enough(tmp_path: Path, tar: bytes) -> None:
    async with hosts(tmp_path, "ams-1", "iad-1", "sin-1") as (_, made):
        await made[1].server.stop(None)  # killed, its lease not yet run out
        await made[0].upload(tar)
        assert holders(made, tar) == ["ams-1", "sin-1"]


async def test_a_host_that_does_not_answer_is_not_waited_for_once_another_has_it(
    tmp_path: Path, tar: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def frozen(_digest: str) -> str:
        await asyncio.sleep(3600)
        raise AssertionError

    monkeypatch.setattr(peers_module, "SPREAD_REST_S", 0.1)
    async with hosts(tmp_path, "ams-1", "iad-1", "sin-1") as (_, made):
        monkeypatch.setattr(made[1].sources, "ensure", frozen)
        async with asyncio.timeout(5):
            await made[0].upload(tar)
        assert holders(made, tar) == ["ams-1", "sin-1"]


async def test_a_host_alone_does_not_wait(tmp_path: Path, tar: bytes) -> None:
    async with hosts(tmp_path, "ams-1") as (_, made):
        await made[0].upload(tar)
        assert holders(made, tar) == ["ams-1"]


async def test_the_last_other_host_is_asked_until_its_lease_has_run_out(tmp_path: Path, tar: bytes) -> None:
    async with hosts(tmp_path, "ams-1", "iad-1") as (kv, made), asyncio.TaskGroup() as group:
        await made[1].server.stop(None)
        uploading = group.create_task(made[0].upload(tar))
        done, _ = await asyncio.wait((uploading,), timeout=0.3)
        assert not done
        await kv.txn((), (Delete(keys.alive("iad-1")),))


async def test_an_upload_that_stays_on_one_host_is_refused_with_each_reason(
    tmp_path: Path, tar: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers_module, "SPREAD_TIMEOUT_S", 0.5)
    async with hosts(tmp_path, "ams-1", "iad-1") as (_, made):
        await made[1].server.stop(None)
        with pytest.raises(Unavailable, match=r"is on ams-1 alone: .*iad-1: flyd at"):
            await made[0].upload(tar)
