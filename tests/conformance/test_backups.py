"""Base backups, archived WAL and restores to an instant, with a real Postgres and without any agent."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import psycopg
import pytest

from flyd.errors import InvalidInput, Refused
from pgha import archive_owner, archived, backups
from pgha.archive_owner import ArchiveOwner
from pgha.binaries import find_binaries
from pgha.model import Backup
from pgha.pgconf import PostgresConfig
from pgha.postgres import RealPostgres
from pgha.processes import unprivileged
from tests.support.etcd import free_ports

NODES = ("pg-1", "pg-2", "pg-3")
WAIT_S = 60.0
pytestmark = pytest.mark.timeout(180)


class Site:
    """Members of a cluster and of restored ones, and one archive for each cluster."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bin_dir = str(find_binaries("", unprivileged(), root))
        self.members: list[RealPostgres] = []

    def config(self, node: str, cluster: str, restore_to: str | None = None) -> PostgresConfig:
        name = f"{cluster}-{node}"
        return PostgresConfig(
            node=node,
            members=NODES,
            host="127.0.0.1",
            port=free_ports(1)[0],
            directory=str(self.root / name),
            bin_dir=self.bin_dir,
            socket_dir=str(self.root / f"s-{name}"),
            superuser_password=f"of {cluster}",
            replication_password="repl:\\secret",
            archive_dir=str(self.root / "archive" / cluster),
            restore_from="" if restore_to is None else str(self.root / "archive" / "old"),
            restore_to=restore_to or "",
        )

    def member(self, config: PostgresConfig) -> RealPostgres:
        self.members.append(RealPostgres(config))
        return self.members[-1]


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    root = Path(tempfile.mkdtemp(prefix="pgha-b-"))
    root.chmod(0o755)
    made = Site(root)
    yield made
    for member in made.members:
        await member.kill()
    shutil.rmtree(root)


async def owned(member: RealPostgres, config: PostgresConfig) -> None:
    """A new data directory, and its archive is its cluster's."""
    await member.initialise()
    claim(config)


def claim(config: PostgresConfig) -> None:
    folder = Path(config.archive_dir)
    archive_owner.claim(folder, ArchiveOwner(cluster=folder.name, token="t"), Path(config.directory))


async def ready(member: RealPostgres) -> None:
    async with asyncio.timeout(WAIT_S):
        while not ((status := await member.status()).ready and status.idle):
            await asyncio.sleep(0.02)


async def ask(config: PostgresConfig, *statements: str) -> str:
    """The last statement's one value; nobody else has to have it."""
    connection = await psycopg.AsyncConnection.connect(
        host=config.host, port=config.port, user="postgres", dbname="postgres", autocommit=True,
        password=config.superuser_password, options="-c synchronous_commit=local -c timezone=UTC",
    )  # fmt: skip
    async with connection:
        for statement in statements[:-1]:
            await connection.execute(statement.encode())
        cursor = await connection.execute(statements[-1].encode())
        row = await cursor.fetchone() if cursor.description is not None else None
    return "" if row is None else str(row[0])


async def write(config: PostgresConfig, numbers: Sequence[int]) -> str:
    """Insert them; an instant at which they are there and no later one is."""
    for number in numbers:
        await ask(config, f"INSERT INTO rows VALUES ({number})")
    return await ask(config, "SELECT to_char(clock_timestamp(), 'YYYY-MM-DD\"T\"HH24:MI:SS.US')") + "+00:00"


async def all_archived(config: PostgresConfig) -> None:
    """All that was written is in the archive."""
    name = await ask(config, "SELECT pg_walfile_name(pg_current_wal_lsn())")
    await ask(config, "SELECT pg_switch_wal()")
    async with asyncio.timeout(WAIT_S):
        while not (Path(config.archive_dir) / "wal" / name).exists():
            await asyncio.sleep(0.05)


async def restored(site: Site, name: str, to: str) -> list[int]:
    """The rows of a cluster made from the old one's archive."""
    config = site.config("pg-1", name, to)
    member = site.member(config)
    await member.initialise()
    await member.start()
    await ready(member)
    await member.promote((await member.status()).timeline + 1)
    rows = await ask(config, "SELECT coalesce(string_agg(n::text, ',' ORDER BY n), '') FROM rows")
    await member.kill()
    return [int(n) for n in rows.split(",") if n]


async def test_any_instant_can_be_restored_also_across_a_failover(site: Site) -> None:
    old = site.config("pg-1", "old")
    first = site.member(old)
    await owned(first, old)
    await first.start()
    await ready(first)
    await first.promote(2)
    await ask(old, "CREATE TABLE rows (n int PRIMARY KEY)")
    before = await write(old, [])
    size = await backups.take(old, "one")
    finished_s = float(await ask(old, "SELECT extract(epoch FROM clock_timestamp())"))
    done = Backup(name="one", finished_at_s=finished_s, size_bytes=size)
    backups.seal(Path(old.archive_dir), done)
    one = await write(old, range(10))
    two = await write(old, range(10, 20))

    new = site.config("pg-2", "old")
    second = site.member(new)
    claim(new)
    await second.copy(f"127.0.0.1:{old.port}")
    await second.start()
    await ready(second)
    await second.follow(f"127.0.0.1:{old.port}")
    async with asyncio.timeout(WAIT_S):
        while (await second.status()).flushed_lsn < (await first.status()).flushed_lsn:
            await asyncio.sleep(0.02)
    await first.kill()
    await second.fence()
    await second.promote(3)
    three = await write(new, range(20, 30))
    await write(new, range(30, 40))
    await all_archived(new)

    rows = await asyncio.gather(
        restored(site, "x", one),
        restored(site, "y", two),
        restored(site, "z", three),
        refused(site, before),
    )
    assert rows[:3] == [list(range(10)), list(range(20)), list(range(30))]


async def refused(site: Site, before: str) -> None:
    with pytest.raises(Refused, match="no base backup"):
        await site.member(site.config("pg-1", "early", before)).initialise()
    with pytest.raises(Refused, match="ends before"):
        await site.member(site.config("pg-1", "late", "2999-01-01T00:00:00+00:00")).initialise()
    used = site.config("pg-3", "old")
    with pytest.raises(Refused, match="another cluster"):
        await site.member(used).initialise()


def test_an_instant_has_an_offset() -> None:
    assert archived.instant_s("1970-01-01T01:00:00+01:00") == 0
    for text in ("yesterday", "2026-11-23T21:00:00"):
        with pytest.raises(InvalidInput):
            archived.instant_s(text)
