"""PostgresService over a store of its own: archives, backups, restores and pauses, without any member."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, cast

import msgspec
import pytest

from flyd.api.context import ApiContext
from flyd.api.postgres import PostgresServicer
from flyd.errors import Conflict, InvalidInput, NotFound, Refused, Unavailable
from flyd.model import Machine, PostgresLeader, decode, encode
from flyd.ports import Delete, Put
from flyd.store import keys
from flyd.store.memory import MemoryEtcd, MemoryKV
from flyd.store.mirror import Mirror
from flyd.v1 import postgres_pb2 as pb
from pgha import keys as pgha_keys
from pgha.backup_plan import ArchiveState, Drill, DrillResult, Reached
from pgha.model import Backup
from tests.support.host_world import FakeDriver
from tests.support.placing import CountedEntropy, FixedClock, join, make_host

HOSTS = (make_host("ams-1"), make_host("iad-1"))
ENDED_S = -100.0  # before now


class Site:
    """One flyd's API and whatever a cluster's members would do, done by hand."""

    def __init__(self) -> None:
        self.kv = MemoryKV(MemoryEtcd())
        self.clock = FixedClock()
        self.mirror = Mirror(self.kv, (keys.ROOT,))
        context = ApiContext(
            host=HOSTS[0],
            kv=self.kv,
            mirror=self.mirror,
            clock=self.clock,
            entropy=CountedEntropy(),
            driver=FakeDriver(),
            sources=cast(Any, None),
            peers=cast(Any, None),
            etcd_endpoints=(),
        )
        self.service = PostgresServicer(context)

    async def lead(self, cluster: str) -> None:
        leader = PostgresLeader(cluster=cluster, epoch=2, node=f"{cluster}-1", address="a:1", serving=True)
        revision = await self.kv.put(keys.postgres_leader(cluster), encode(leader))
        while self.mirror.revision < revision:
            await asyncio.sleep(0)

    async def make(self, cluster: str, archive_dir: str = "") -> None:
        await self.lead(cluster)
        request = pb.CreateClusterRequest(
            cluster_name=cluster, regions=["ams", "iad"], archive_dir=archive_dir
        )
        await self.service.CreateCluster(request, None)
        revision = (await self.kv.list(keys.MACHINES)).revision
        while self.mirror.revision < revision:
            await asyncio.sleep(0)

    async def take(self, cluster: str, error: str = "") -> None:
        """As a primary does: the wish becomes a backup."""
        while (item := await self.kv.get(pgha_keys.backup_wish(cluster))) is None:
            await asyncio.sleep(0)
        wish = decode(item.value, Backup)
        ended_s = 0.0 if error else self.clock.wall_s() + ENDED_S
        done = msgspec.structs.replace(wish, node="db-1", finished_at_s=ended_s, error=error)
        put = Put(pgha_keys.backup(cluster, wish.name), encode(done))
        await self.kv.txn([], [put, Delete(pgha_keys.backup_wish(cluster))])

    async def drill(self, cluster: str) -> None:
        """As a replica does: the wish becomes a result."""
        while (item := await self.kv.get(pgha_keys.drill(cluster))) is None:
            await asyncio.sleep(0)
        wish, now_s = decode(item.value, Drill), self.clock.wall_s()
        found = DrillResult(
            backup=wish.backup, node="db-2", requested_at_s=wish.requested_at_s, finished_at_s=now_s,
            error="torn",
        )  # fmt: skip
        put = Put(pgha_keys.drill_result(cluster, wish.backup), encode(found))
        await self.kv.txn([], [put, Delete(pgha_keys.drill(cluster))])

    async def env(self, cluster: str) -> dict[str, str]:
        listing = await self.kv.list(f"{keys.MACHINES}{cluster}/")
        return dict(decode(listing.items[0].value, Machine).config.env)

    def time(self, offset_s: float) -> str:
        return datetime.fromtimestamp(self.clock.wall_s() + offset_s, UTC).isoformat()


@asynccontextmanager
async def running() -> AsyncGenerator[Site]:
    site = Site()
    await join(site.kv, *HOSTS)
    async with asyncio.TaskGroup() as group:
        keep = group.create_task(site.mirror.keep())
        await site.mirror.wait_synced()
        yield site
        keep.cancel()


async def back_up(site: Site, error: str = "") -> pb.CreateBackupResponse:
    asked = site.service.CreateBackup(pb.CreateBackupRequest(cluster_name="db"), None)
    return (await asyncio.gather(asked, site.take("db", error)))[0]


async def test_a_backup_is_taken_listed_and_restored_from() -> None:
    async with running() as site:
        await site.make("db", "/mnt/shared")
        made = (await back_up(site)).backup
        listed = await site.service.ListBackups(pb.ListBackupsRequest(cluster_name="db"), None)
        assert [(b.name, b.node) for b in listed.backups] == [(made.name, "db-1")]
        await site.lead("copy")
        to = site.time(ENDED_S + 1)
        request = pb.RestoreClusterRequest(cluster_name="db", new_name="copy", to=to)
        assert (await site.service.RestoreCluster(request, None)).cluster_name == "copy"
        env = await site.env("copy")
        assert env["PGHA_ARCHIVE_DIR"] == "/mnt/shared/copy"
        assert (env["PGHA_RESTORE_FROM"], env["PGHA_RESTORE_TO"]) == ("/mnt/shared/db", to)


async def test_a_schedule_is_kept_shown_and_ended() -> None:
    async with running() as site:
        await site.make("db", "/mnt/shared")
        listing = pb.ListBackupsRequest(cluster_name="db")
        assert not (await site.service.ListBackups(listing, None)).HasField("schedule")
        wanted = pb.BackupSchedule(every_s=86400, keep=7, verify_every_s=604800)
        request = pb.SetBackupScheduleRequest(cluster_name="db", schedule=wanted)
        await site.service.SetBackupSchedule(request, None)
        assert (await site.service.ListBackups(listing, None)).schedule == wanted
        for bad in (
            pb.BackupSchedule(every_s=86400),
            pb.BackupSchedule(every_s=86400, keep=-1),
            *(pb.BackupSchedule(every_s=s, keep=7) for s in (0, 1, math.nan, math.inf)),
            *(pb.BackupSchedule(every_s=86400, keep=7, verify_every_s=s) for s in (-1, math.nan, math.inf)),
        ):
            with pytest.raises(InvalidInput):
                await site.service.SetBackupSchedule(
                    pb.SetBackupScheduleRequest(cluster_name="db", schedule=bad), None
                )
        await site.service.SetBackupSchedule(pb.SetBackupScheduleRequest(cluster_name="db"), None)
        assert not (await site.service.ListBackups(listing, None)).HasField("schedule")


async def test_a_trial_restore_is_waited_for_and_shown() -> None:
    async with running() as site:
        await site.make("db", "/mnt/shared")
        request = pb.VerifyBackupRequest(cluster_name="db")
        with pytest.raises(Refused, match="no backup yet"):
            await site.service.VerifyBackup(request, None)
        made = (await back_up(site)).backup
        other = pb.VerifyBackupRequest(cluster_name="db", backup_name="another")
        with pytest.raises(NotFound, match="another"):
            await site.service.VerifyBackup(other, None)
        found = (await asyncio.gather(site.service.VerifyBackup(request, None), site.drill("db")))[0]
        assert (found.backup.name, found.backup.verify_error, found.backup.verified_by) == (
            made.name, "torn", "db-2",
        )  # fmt: skip


async def test_what_cannot_be_restored_is_refused_before_anything_is_made() -> None:
    async with running() as site:
        await site.make("db", "/mnt/shared")
        await back_up(site)
        for new_name, to, error in (
            ("copy", site.time(ENDED_S - 1), Refused),
            ("copy", site.time(60), InvalidInput),
            ("copy", "yesterday", InvalidInput),
            ("db", "", InvalidInput),
        ):
            request = pb.RestoreClusterRequest(cluster_name="db", new_name=new_name, to=to)
            with pytest.raises(error):
                await site.service.RestoreCluster(request, None)
        assert await site.kv.get(keys.app("copy")) is None


async def test_an_instant_behind_the_newest_archived_commit_is_refused() -> None:
    async with running() as site:
        await site.make("db", "/mnt/shared")
        made = (await back_up(site)).backup
        reached = Reached(backup=made.name, last_commit_s=site.clock.wall_s() + ENDED_S + 20)
        await site.kv.put(pgha_keys.archive("db"), encode(ArchiveState(reached=(reached,))))
        listed = await site.service.ListBackups(pb.ListBackupsRequest(cluster_name="db"), None)
        assert listed.backups[0].restorable_to == reached.last_commit_s
        for offset_s, refused in ((19, False), (20, True), (30, True)):
            to = site.time(ENDED_S + offset_s)
            request = pb.RestoreClusterRequest(cluster_name="db", new_name="copy", to=to)
            if refused:
                with pytest.raises(Refused, match="newest commit in the archive"):
                    await site.service.RestoreCluster(request, None)
            else:
                await site.lead("copy")
                await site.service.RestoreCluster(request, None)


async def test_a_backup_that_failed_says_why() -> None:
    async with running() as site:
        await site.make("db", "/mnt/shared")
        with pytest.raises(Unavailable, match="no space left"):
            await back_up(site, "no space left")


async def test_without_an_archive_there_is_no_backup() -> None:
    async with running() as site:
        await site.make("db")
        with pytest.raises(Refused, match="no archive"):
            await site.service.CreateBackup(pb.CreateBackupRequest(cluster_name="db"), None)


async def test_a_pause_is_shown_and_holds_off_a_switchover() -> None:
    async with running() as site:
        await site.make("db")
        await site.service.PauseCluster(pb.PauseClusterRequest(cluster_name="db", reason="disks"), None)
        shown = await site.service.GetCluster(pb.GetClusterRequest(cluster_name="db"), None)
        assert (shown.paused, shown.pause_reason) == (True, "disks")
        with pytest.raises(Conflict, match="paused"):
            await site.service.Failover(pb.FailoverRequest(cluster_name="db"), None)
        await site.service.ResumeCluster(pb.ResumeClusterRequest(cluster_name="db"), None)
        shown = await site.service.GetCluster(pb.GetClusterRequest(cluster_name="db"), None)
        assert not shown.paused
