"""Hosts with disks of their own and the calls between them, for tests of copies and moves of volumes."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from flyd.errors import Unavailable
from flyd.model import App, Host, Machine, MachineConfig, Mount, Reservations, Volume, decode, encode
from flyd.ports import Delete
from flyd.storage.copier import CopyOrder, VolumeCopier
from flyd.storage.copies import VolumeCopy
from flyd.storage.local import StreamPiece
from flyd.storage.receiver import CopyReceiver
from flyd.storage.recovery import Recovery
from flyd.store import keys
from flyd.store.memory import MemoryEtcd, MemoryKV
from flyd.store.mirror import Mirror
from tests.support.placing import CountedEntropy, FixedClock, join, make_host
from volumes.directory import DirectoryVolumes
from volumes.streams import StreamStore

HOSTS = [make_host("ams-1"), make_host("ams-2"), make_host("iad-1"), make_host("sin-1")]
VOLUME = Volume(id="vol1", name="data", app="web", region="ams", host="ams-1", size_gb=2, replicas=1)


@pytest.fixture
def memory() -> Generator[Path]:
    """A folder on no disk: nothing here cuts the power."""
    at = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=at if at.exists() else None) as folder:
        yield Path(folder)


class Site:
    """Hosts with disks of their own, and the calls between them."""

    def __init__(self, root: Path) -> None:
        self.kv = MemoryKV(MemoryEtcd())
        self.clock = FixedClock()
        self.entropy = CountedEntropy()
        self.mirror = Mirror(self.kv, (keys.ROOT,))
        self.stores: dict[str, StreamStore] = {h.name: DirectoryVolumes(root / h.name) for h in HOSTS}
        self.cut_after: int | None = None  # pieces, once
        self.orders: list[CopyOrder] = []
        self.moved: list[int] = []  # bytes, of those that ended well
        self.receivers = {
            name: CopyReceiver(name, self.kv, store, self.fetch, clock=self.clock, entropy=self.entropy)
            for name, store in self.stores.items()
        }
        self.copier = VolumeCopier(
            "ams-1", self.kv, self.mirror, self.stores["ams-1"], self, clock=self.clock
        )

    async def keep_copy(self, host: str, order: CopyOrder) -> int:
        self.orders.append(order)
        self.moved.append(await self.receivers[host].keep(order))
        await self.seen()
        return self.moved[-1]

    async def fetch(self, order: CopyOrder, parent: str, skip_bytes: int) -> AsyncIterator[StreamPiece]:
        count = 0
        async for piece in self.stores[order.source].send(order.volume, order.snapshot, parent, skip_bytes):
            count += 1
            if self.cut_after is not None and count > self.cut_after:
                self.cut_after = None
                raise Unavailable("the line is cut")
            yield piece

    async def put(self, *values: Volume | Machine | App) -> None:
        for value in values:
            match value:
                case Volume():
                    key = keys.volume(value.app, value.id)
                case Machine():
                    key = keys.machine(value.app, value.id)
                case App():
                    key = keys.app(value.name)
            await self.kv.put(key, encode(value))
        await self.seen()

    async def seen(self) -> None:
        revision = (await self.kv.list(keys.ROOT)).revision
        async with asyncio.timeout(5):
            await self.mirror.wait_revision(revision)

    async def write(self, text: str) -> None:
        """What the machine has on its volume."""
        store = self.stores["ams-1"]
        await store.create("vol1", 2)
        data = Path(await store.attach("vol1", "m1", 1))
        (data / "file").write_text(text)
        if not (data / "big").exists():
            (data / "big").write_bytes(b"x" * 2_000_000)

    async def copies(self) -> list[VolumeCopy]:
        listing = await self.kv.list(f"{keys.VOLUME_COPIES}web/vol1/")
        return [decode(item.value, VolumeCopy) for item in listing.items]

    async def volumes(self) -> dict[str, Volume]:
        listing = await self.kv.list(f"{keys.VOLUMES}web/")
        found = [decode(item.value, Volume) for item in listing.items]
        return {v.id: v for v in found}

    async def machine(self) -> Machine:
        record = await self.kv.get(keys.machine("web", "m1"))
        assert record is not None
        return decode(record.value, Machine)

    async def promised(self, host: str) -> Reservations:
        record = await self.kv.get(keys.reservations(host))
        return decode(record.value, Reservations) if record else Reservations(host=host)

    async def round(self, after_s: float = 0.0) -> None:
        self.clock.now_s += after_s
        await self.copier.round()
        await self.seen()

    async def lose(self, host: str) -> None:
        await self.kv.txn((), (Delete(keys.alive(host)),))
        await self.seen()

    def recovery(self, host: Host) -> Recovery:
        return Recovery(host, self.kv, self.stores[host.name], clock=self.clock, entropy=self.entropy)


MACHINE = Machine(
    id="m1",
    app="web",
    name="m1",
    region="ams",
    host="ams-1",
    instance_id="I1",
    config=MachineConfig(image="host:", mounts=(Mount(path="/data", volume="vol1", name="data", size_gb=2),)),
    private_ip="127.11.0.2",
    epoch=3,
)


@asynccontextmanager
async def running(root: Path) -> AsyncGenerator[Site]:
    """A volume of 2 GB in use by a machine on ams-1; copies wanted on one other host."""
    site = Site(root)
    await join(site.kv, *HOSTS)
    async with asyncio.TaskGroup() as group:
        keep = group.create_task(site.mirror.keep())
        await site.mirror.wait_synced()
        await site.put(
            App(name="web", regions=("ams",)), MACHINE, replace(VOLUME, attached_machine="m1", epoch=1)
        )
        yield site
        keep.cancel()


class Stop(Exception):
    """flyd dies here."""


def failing(function: Callable[..., Any], at: int, error: Callable[[], Exception], *, after: bool) -> Any:
    """The n-th call does not happen, or happens and its answer is lost."""
    count = 0

    async def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == at and not after:
            raise error()
        result = await function(*args, **kwargs)
        if count == at:
            raise error()
        return result

    return call
