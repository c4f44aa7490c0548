"""Base backups, archived WAL and restores to an instant, with a real Postgres and without any agent."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import psycopg
import pytest

from flyd.errors import InvalidInput, Refused
from pgha import archive, backups
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


async def archived(config: PostgresConfig) -> None:
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
    await first.initialise()
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
    await archived(new)

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


def as_postgres(command: str, name: str, path: Path) -> int:
    """Run it as Postgres would."""
    for placeholder, text in (("%f", name), ("%p", str(path)), ("%%", "%")):
        command = command.replace(placeholder, text)
    return subprocess.run(["sh", "-c", command], check=False).returncode


def test_an_archived_name_has_one_content_for_ever(tmp_path: Path) -> None:
    source, back, wal = tmp_path / "segment", tmp_path / "back", tmp_path / "w %al"
    wal.mkdir()
    push, fetch = archive.push_command(wal, "pg-1"), archive.fetch_command(wal)
    source.write_bytes(b"one")
    assert as_postgres(push, "S", source) == 0
    assert as_postgres(push, "S", source) == 0
    for other in (b"two", b"longer", b"on"):
        source.write_bytes(other)
        assert as_postgres(push, "S", source) != 0
    assert [p.name for p in wal.iterdir()] == ["S"]
    assert as_postgres(fetch, "S", back) == 0
    assert back.read_bytes() == b"one"
    assert as_postgres(fetch, "T", back) != 0


def test_members_that_archive_at_once_agree(tmp_path: Path) -> None:
    source, wal = tmp_path / "segment", tmp_path / "wal"
    source.write_bytes(os.urandom(3 << 20))
    wal.mkdir()
    command = archive.push_command(wal, "pg-1").replace("%f", "S").replace("%p", str(source))
    pushes = [subprocess.Popen(["sh", "-c", command]) for _ in range(4)]
    assert [push.wait() for push in pushes] == [0] * 4
    assert [p.name for p in wal.iterdir()] == ["S"]
    assert (wal / "S").read_bytes() == source.read_bytes()


def test_an_instant_has_an_offset() -> None:
    assert backups.instant_s("1970-01-01T01:00:00+01:00") == 0
    for text in ("yesterday", "2026-11-23T21:00:00"):
        with pytest.raises(InvalidInput):
            backups.instant_s(text)
