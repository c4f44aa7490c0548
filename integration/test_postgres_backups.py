"""A backup by the agents, a failover, and a new cluster with what the old one had before its end."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from flyd.model import PostgresLeader
from pgha.model import Backup
from pgha.requests import request_backup, taken
from tests.support.pgha import PgCluster, connect, run_pgha

pytestmark = pytest.mark.timeout(180)
WAIT_S = 60.0


@asynccontextmanager
async def shared_folder() -> AsyncGenerator[Path]:
    """One that every member reaches."""
    root = Path(tempfile.mkdtemp(prefix="pgha-archive-"))
    root.chmod(0o755)
    try:
        yield root
    finally:
        shutil.rmtree(root)


async def ask(leader: PostgresLeader, *statements: str) -> list[object]:
    """The last one's first column."""
    async with await connect(leader.address) as session:
        for statement in statements[:-1]:
            await session.execute(statement.encode())
        cursor = await session.execute(statements[-1].encode())
        return [row[0] for row in await cursor.fetchall()]


async def write(leader: PostgresLeader, first: int) -> str:
    """Ten rows; an instant when they, and no later ones, are there."""
    insert = f"INSERT INTO rows SELECT generate_series({first}, {first + 9})"
    now = "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US')"
    return f"{(await ask(leader, insert, now))[0]}+00:00"


async def backed_up(cluster: PgCluster) -> Backup:
    await request_backup(cluster.kv, cluster.name, "first", time.time())
    async with asyncio.timeout(WAIT_S):
        while not (found := [b for b in await taken(cluster.kv, cluster.name) if b.finished_at_s or b.error]):
            await asyncio.sleep(0.1)
    return found[0]


async def test_a_new_cluster_has_what_the_old_one_had_at_an_instant_after_its_failover() -> None:
    async with shared_folder() as root:
        old = {"PGHA_ARCHIVE_DIR": f"{root}/old"}
        async with run_pgha(more_env=old) as cluster:
            leader = await cluster.wait_whole()
            await ask(leader, "CREATE TABLE rows (n int PRIMARY KEY)", "SELECT 1")
            backup = await backed_up(cluster)
            assert (backup.error, backup.node, backup.epoch) == ("", leader.node, leader.epoch)
            await write(leader, 0)
            await cluster.node(leader.node).kill()
            after = await cluster.wait_leader(lambda now: now.epoch > leader.epoch)
            instant = await write(after, 10)
            await write(after, 20)
            name = (await ask(after, "SELECT pg_walfile_name(pg_current_wal_lsn())"))[0]
            await ask(after, "SELECT pg_switch_wal()")
            async with asyncio.timeout(WAIT_S):
                while not (root / "old" / "wal" / str(name)).exists():
                    await asyncio.sleep(0.1)
        files = sorted((root / "old" / "wal").iterdir())
        before = {path.name: path.stat().st_mtime_ns for path in files}
        new = {
            "PGHA_ARCHIVE_DIR": f"{root}/new",
            "PGHA_RESTORE_FROM": f"{root}/old",
            "PGHA_RESTORE_TO": instant,
        }
        async with run_pgha(member_count=2, more_env=new) as cluster:
            restored = await cluster.wait_whole()
            assert await ask(restored, "SELECT n FROM rows ORDER BY n") == list(range(20))
            assert restored.epoch > after.epoch
            await write(restored, 50)
        files = sorted((root / "old" / "wal").iterdir())
        assert {path.name: path.stat().st_mtime_ns for path in files} == before  # not one file more or other
