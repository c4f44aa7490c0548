"""A Postgres on a small real file system that fills up: read-only before it dies, and writable again."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import pytest

from flyd.model import decode
from flyd.store.memory import MemoryEtcd, MemoryKV
from flyd.store.system import SystemClock
from pgha import archive_owner, keys
from pgha.archive_owner import ArchiveOwner
from pgha.binaries import find_binaries
from pgha.disk import FAILING_S, MB, Level, Storage
from pgha.guard import Guard, room
from pgha.journal import Journal
from pgha.model import AgentConfig
from pgha.pgconf import PostgresConfig
from pgha.postgres import RealPostgres
from pgha.processes import give_tree, unprivileged
from tests.support.etcd import free_ports

SIZE_MB = 400
WAIT_S = 30.0
pytestmark = pytest.mark.timeout(120)
Session = psycopg.AsyncConnection[tuple[object, ...]]


class FastClock(SystemClock):
    """Ahead of Postgres' by so much."""

    ahead_s = 0.0

    def wall_s(self) -> float:
        return super().wall_s() + self.ahead_s


class Site:
    """A primary on a disk of its own, and its guard."""

    def __init__(self, root: Path) -> None:
        self.config = PostgresConfig(
            node="pg-1", members=("pg-1", "pg-2"), host="127.0.0.1", port=free_ports(1)[0],
            directory=str(root / "disk" / "member"), socket_dir=str(root / "s"),
            bin_dir=str(find_binaries("", unprivileged(), root)),
            superuser_password="s", replication_password="r", archive_dir=str(root / "archive"),
        )  # fmt: skip
        self.kv = MemoryKV(MemoryEtcd())
        me = AgentConfig(cluster="db", node="pg-1", voters=("pg-1", "pg-2"), region="r", address="a:1")
        self.journal = Journal("db", "pg-1", self.kv, SystemClock())
        self.postgres = RealPostgres(self.config)
        self.clock = FastClock()
        self.guard = Guard(me, self.config, self.postgres, self.kv, self.clock, self.journal)
        self.ballast = root / "disk" / "ballast"

    async def connect(self) -> Session:
        return await psycopg.AsyncConnection.connect(
            host="127.0.0.1", port=self.config.port, user="postgres", password="s", dbname="postgres",
            autocommit=True, options="-c synchronous_commit=local",
        )  # fmt: skip

    def fill(self, free_bytes: int) -> None:
        """Leave so much."""
        now = room(self.ballast.parent)
        assert now is not None
        subprocess.run(["fallocate", "-l", str(now.free_bytes - free_bytes), self.ballast], check=True)

    async def kinds(self) -> list[str]:
        """What it said, oldest first."""
        await self.journal.flush()
        return [item.key.rpartition("-")[2] for item in (await self.kv.list("/flyd/v1/events/")).items]

    async def told(self) -> Storage:
        item = await self.kv.get(keys.storage("db", "pg-1"))
        assert item is not None
        return decode(item.value, Storage)


@pytest.fixture
def root() -> Iterator[Path]:
    """With a small file system in it."""
    root = Path(tempfile.mkdtemp(prefix="pgha-g-"))
    root.chmod(0o755)
    disk = root / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m,mode=755", "pgha-test", disk],
        check=False, capture_output=True,
    )  # fmt: skip
    if mounted.returncode != 0:
        shutil.rmtree(root)
        pytest.skip(f"no file system of its own: {mounted.stderr.decode().strip()}")
    give_tree(disk, unprivileged())
    yield root
    subprocess.run(["umount", disk], check=True)
    shutil.rmtree(root)


@pytest.fixture
async def site(root: Path) -> AsyncIterator[Site]:
    made = Site(root)
    try:
        await made.postgres.initialise()
        await made.postgres.start()
        async with asyncio.timeout(WAIT_S):
            while not (await made.postgres.status()).idle:
                await asyncio.sleep(0.02)
        await made.postgres.promote(2)
        yield made
    finally:
        await made.guard.close()
        await made.postgres.kill()


async def refused(site: Site, sql: str) -> bool:
    async with await site.connect() as session:
        try:
            await session.execute(sql.encode())
        except psycopg.errors.ReadOnlySqlTransaction:
            return True
    return False


async def until_refused(site: Site, wanted: bool) -> None:
    """A reload takes a moment."""
    async with asyncio.timeout(WAIT_S):
        while await refused(site, "INSERT INTO t VALUES (0)") is not wanted:
            await asyncio.sleep(0.05)


async def loaded_a_second_ago(session: Session) -> None:
    """See END_WRITERS_SQL: from now on who writes means it."""
    async with asyncio.timeout(WAIT_S):
        while True:
            cursor = await session.execute("SELECT now() > pg_conf_load_time() + interval '1 second'")
            if await cursor.fetchone() == (True,):
                return
            await asyncio.sleep(0.05)


async def test_it_is_read_only_before_the_disk_is_full_and_writable_once_there_is_room(site: Site) -> None:
    assert not await refused(site, "CREATE TABLE t (n int)")
    assert site.guard.look().level is Level.OK
    site.fill(100 * MB)
    assert site.guard.look().level is Level.LOW
    async with await site.connect() as idle, await site.connect() as busy:
        await busy.execute("BEGIN")
        await busy.execute("INSERT INTO t VALUES (1)")
        site.ballast.unlink()
        site.fill(40 * MB)
        assert site.guard.look().level is Level.READ_ONLY
        await until_refused(site, wanted=True)
        await site.guard.end_writers()
        with pytest.raises(psycopg.OperationalError):
            await busy.execute("COMMIT")
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            await idle.execute("INSERT INTO t VALUES (2)")  # a session that was there before
        await loaded_a_second_ago(idle)
        await idle.execute("BEGIN READ WRITE")
        await idle.execute("DELETE FROM t")
        await site.guard.end_writers()
        await idle.execute("COMMIT")
    site.ballast.unlink()
    site.fill(100 * MB)  # more than what closed it, less than what opens it
    assert site.guard.look().level is Level.READ_ONLY
    site.ballast.unlink()
    assert site.guard.look().level is Level.OK
    await until_refused(site, wanted=False)
    assert await site.kinds() == ["disk_low", "disk_full", "disk_writable"]


async def test_a_member_that_starts_on_a_full_disk_is_read_only_from_the_start(site: Site) -> None:
    assert not await refused(site, "CREATE TABLE t (n int)")
    await site.postgres.kill()
    site.fill(40 * MB)
    assert site.guard.look().level is Level.READ_ONLY
    await site.postgres.start()
    async with asyncio.timeout(WAIT_S):
        while not (await site.postgres.status()).idle:
            await asyncio.sleep(0.02)
    await site.postgres.promote(3)
    assert await refused(site, "INSERT INTO t VALUES (0)")


async def test_what_it_sees_is_told(site: Site) -> None:
    async with asyncio.TaskGroup() as group:
        loop = group.create_task(site.guard.keep())
        async with asyncio.timeout(WAIT_S):
            while await site.kv.get(keys.storage("db", "pg-1")) is None:
                await asyncio.sleep(0.02)
        told = await site.told()
        assert (told.level, told.total_bytes) == (Level.OK, SIZE_MB * MB)
        site.fill(40 * MB)
        async with asyncio.timeout(WAIT_S):
            while (await site.told()).level is not Level.READ_ONLY:
                await asyncio.sleep(0.02)
        loop.cancel()


async def test_archiving_that_fails_is_said_and_that_it_works_again(site: Site) -> None:
    """The archive is nobody's yet: nothing goes in."""

    async def switch(until: str) -> None:
        """More WAL, until Postgres says so of its archiver: a new segment has it try again."""
        async with await site.connect() as session, asyncio.timeout(WAIT_S):
            while True:
                await session.execute("SELECT txid_current(), pg_switch_wal()")
                cursor = await session.execute(f"SELECT {until} FROM pg_stat_archiver".encode())
                if await cursor.fetchone() == (True,):
                    return
                await asyncio.sleep(0.2)

    await switch("last_failed_time IS NOT NULL")
    await site.guard.look_at_archiver()
    assert (site.guard.look().failing_since_s, await site.kinds()) == (0.0, [])
    site.clock.ahead_s = FAILING_S + 1
    await site.guard.look_at_archiver()
    found = site.guard.look()
    assert found.failing_since_s > 0
    assert found.failing_segment
    assert found.waiting > 0
    assert await site.kinds() == ["archive_failing"]
    owner = ArchiveOwner(cluster="db", token="t")
    archive_owner.claim(Path(site.config.archive_dir), owner, Path(site.config.directory))
    await switch("last_archived_time > last_failed_time")
    await site.guard.look_at_archiver()
    assert site.guard.look().failing_since_s == 0
    assert await site.kinds() == ["archive_failing", "archive_works"]
