"""Members of a Postgres cluster over the API: the machine and the word, without any member."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import msgspec
import pytest

from flyd.errors import Refused, Unplaceable
from flyd.model import Desired, Machine, PostgresMember, Volume, encode
from flyd.ports import Delete, Put
from flyd.postgres import members
from flyd.store import keys
from flyd.v1 import postgres_pb2 as pb
from pgha import changes
from pgha import keys as pgha_keys
from pgha.membership import next_step, settled, stepped
from pgha.model import Membership
from tests.unit.api.test_postgres_service import Site, running

BEGAN = ("db-1", "db-2")


@asynccontextmanager
async def cluster() -> AsyncGenerator[Site]:
    """db-1 in ams leads, db-2 is in iad; the primary walks every change."""
    async with running() as site:
        await site.make("db")
        record = Membership(quorum=settled(BEGAN), target=BEGAN)
        await site.kv.put(pgha_keys.membership("db"), encode(record))
        said = PostgresMember(node="db-2", region="iad", address="b:1", streaming=True)
        await site.kv.put(pgha_keys.member("db", "db-2"), encode(said))
        walking = asyncio.create_task(walk(site))  # noqa: TID251
        yield site
        walking.cancel()


async def walk(site: Site) -> None:
    """As the primary's agent does."""
    while True:
        record = await changes.membership(site.kv, "db")
        step = next_step(record.quorum, record.target)
        if step is not None:
            await site.kv.put(pgha_keys.membership("db"), encode(stepped(record, step)))
        await asyncio.sleep(0)


async def bury(site: Site, name: str) -> None:
    """As the machine's host does, once it is to be destroyed."""
    while (machine := (await members.machines(site.kv, "db"))[name]).desired is not Desired.DESTROYED:
        await asyncio.sleep(0)
    held = [v for v in await volumes(site) if v.attached_machine == machine.id]
    freed = [
        Put(keys.volume("db", v.id), encode(msgspec.structs.replace(v, attached_machine=""))) for v in held
    ]
    await site.kv.txn([], [Delete(keys.machine("db", machine.id)), *freed])


async def volumes(site: Site) -> list[Volume]:
    listing = await site.kv.list(f"{keys.VOLUMES}db/")
    return [msgspec.json.decode(item.value, type=Volume) for item in listing.items]


async def add(site: Site, region: str) -> pb.PostgresMember:
    request = pb.AddMemberRequest(cluster_name="db", region=region)
    return (await site.service.AddMember(request, None)).member


async def standings(site: Site) -> dict[str, str]:
    found = await site.service.ListMembers(pb.ListMembersRequest(cluster_name="db"), None)
    return {m.node: m.standing for m in found.members}


async def test_one_more_and_one_less() -> None:
    async with cluster() as site:
        made = await add(site, "iad")
        assert (made.node, made.standing, made.region) == ("db-3", "member", "iad")
        machine: Machine = (await members.machines(site.kv, "db"))["db-3"]
        assert machine.config.env["PGHA_NODE"] == "db-3"
        assert machine.config.env["PGHA_VOTERS"] == "db-1,db-2,db-3"
        assert machine.config.mounts
        assert await standings(site) == dict.fromkeys(("db-1", "db-2", "db-3"), "member")

        burying = asyncio.create_task(bury(site, "db-3"))  # noqa: TID251
        request = pb.RemoveMemberRequest(cluster_name="db", node="db-3")
        assert (await site.service.RemoveMember(request, None)).machine_id == machine.id
        await burying
        await site.service.RemoveMember(request, None)  # again, as after a crash
        assert sorted(v.region for v in await volumes(site)) == ["ams", "iad"]
        assert set(await standings(site)) == set(BEGAN)
        assert (await add(site, "ams")).node == "db-4"  # a name does not come back


async def test_without_room_nothing_is_half_done() -> None:
    async with cluster() as site:
        before = await site.kv.list(keys.ROOT)
        huge = msgspec.structs.replace
        machine = (await members.machines(site.kv, "db"))["db-1"]
        guest = huge(machine.config.guest, memory_mb=10**9)
        large = huge(machine, config=huge(machine.config, guest=guest))
        await site.kv.put(keys.machine("db", machine.id), encode(large))
        with pytest.raises(Unplaceable):
            await add(site, "ams")
        assert (await changes.membership(site.kv, "db")).target == BEGAN
        assert len((await site.kv.list(keys.ROOT)).items) == len(before.items)


async def test_the_primary_stays() -> None:
    async with cluster() as site:
        await add(site, "iad")
        with pytest.raises(Refused, match="db-1 is the primary"):
            await site.service.RemoveMember(pb.RemoveMemberRequest(cluster_name="db", node="db-1"), None)
        assert (await standings(site))["db-1"] == "member"
