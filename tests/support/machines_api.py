"""MachinesService over a store of its own, without hosts: what calls write, refuse and show."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec

from flyd.api.context import ApiContext
from flyd.api.machines import MachinesServicer
from flyd.model import App, Machine, MachineState, MachineStatus, decode, encode
from flyd.store import keys
from flyd.store.memory import MemoryEtcd, MemoryKV
from flyd.store.mirror import Mirror
from flyd.v1 import machines_pb2 as pb
from tests.support.host_world import FakeDriver
from tests.support.placing import CountedEntropy, FixedClock, join, make_host

HOST = msgspec.structs.replace(make_host("ams-1"), labels={"disk": "fast"})


class Api:
    """One flyd's API over a store of its own."""

    def __init__(self) -> None:
        self.kv = MemoryKV(MemoryEtcd())
        self.driver = FakeDriver()
        self.mirror = Mirror(self.kv, (keys.ROOT,))
        context = ApiContext(
            host=HOST,
            kv=self.kv,
            mirror=self.mirror,
            clock=FixedClock(),
            entropy=CountedEntropy(),
            driver=self.driver,
            sources=cast(Any, None),
            peers=cast(Any, None),
            etcd_endpoints=(),
        )
        self.service = MachinesServicer(context)

    async def create(self, **more: Any) -> pb.Machine:
        request = pb.CreateMachineRequest(app_name="web", config=pb.MachineConfig(image="host:"), **more)
        made = (await self.service.CreateMachine(request, None)).machine
        await self.seen(made.id)
        return made

    async def seen(self, machine_id: str) -> None:
        """The mirror has the newest claim."""
        record = await self.kv.get(keys.machine("web", machine_id))
        revision = record.mod_revision if record is not None else 0
        async with asyncio.timeout(5):
            while self.mirror.revision < revision:
                await asyncio.sleep(0)

    async def claim(self, machine_id: str) -> Machine:
        record = await self.kv.get(keys.machine("web", machine_id))
        assert record is not None
        await self.seen(machine_id)
        return decode(record.value, Machine)

    async def say(self, machine_id: str, state: MachineState) -> None:
        claim = await self.claim(machine_id)
        status = MachineStatus(
            id=claim.id, app="web", host=claim.host, instance_id=claim.instance_id, epoch=1, state=state
        )
        revision = await self.kv.put(keys.status("web", machine_id), encode(status))
        while self.mirror.revision < revision:
            await asyncio.sleep(0)


@asynccontextmanager
async def running() -> AsyncGenerator[Api]:
    api = Api()
    await join(api.kv, HOST, make_host("iad-1"))
    await api.kv.put(keys.app("web"), encode(App(name="web", regions=("ams",))))
    async with asyncio.TaskGroup() as group:
        keep = group.create_task(api.mirror.keep())
        await api.mirror.wait_synced()
        yield api
        keep.cancel()
