"""Backups by the agents, a failover whose old primary archives past the fork, restores to chosen instants.

Numbers are those of docs/incidents_of_others.md.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import LiteralString

import msgspec
import psycopg
import pytest
import pytest_asyncio

from flyd.errors import Unavailable
from flyd.model import PostgresLeader
from integration.pgha_faults import insert, silent_streams, until
from pgha import archived
from pgha.backup_plan import ArchiveState, DrillResult, Schedule
from pgha.backup_requests import archive_state, drill_results, set_schedule
from pgha.binaries import find_binaries
from pgha.drill import Scratch
from pgha.model import Backup
from pgha.pgconf import PostgresConfig
from pgha.postgres import RealPostgres
from pgha.process_table import server_pids
from pgha.processes import give_tree, unprivileged
from pgha.requests import request_backup, taken
from tests.support.etcd import free_ports
from tests.support.pgha import PASSWORD, Connection, Node, PgCluster, connect, run_pgha

pytestmark = [pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]
WAIT_S = 60.0
WAITING: LiteralString = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
DAY_S = 86400.0
FIRST = "first"
NEVER = -22  # written by the old primary alone


async def ask(leader: PostgresLeader, *statements: str) -> list[object]:
    """The last one's first column."""
    async with await connect(leader.address) as session:
        for statement in statements[:-1]:
            await session.execute(statement.encode())
        cursor = await session.execute(statements[-1].encode())
        return [row[0] for row in await cursor.fetchall()]


async def write(leader: PostgresLeader, first: int) -> str:
    """Ten rows; an instant when they, and no later ones, are there."""
    add = f"INSERT INTO acks SELECT generate_series({first}, {first + 9})"
    now = "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US')"
    return f"{(await ask(leader, add, now))[0]}+00:00"


async def backed_up(cluster: PgCluster, name: str = "") -> Backup:
    """The backup of that name (empty: any but the first), once it has ended."""
    async with asyncio.timeout(WAIT_S):
        while True:
            for backup in await taken(cluster.kv, cluster.name):
                wanted = backup.name == name if name else backup.name != FIRST
                if wanted and (backup.finished_at_s or backup.error):
                    return backup
            await asyncio.sleep(0.1)


def waiting(node: Node) -> list[str]:
    """What it has not archived yet."""
    return [path.name for path in (node.directory / "pgdata/pg_wal/archive_status").glob("*.ready")]


class Past:
    """What a cluster with a failover has left in its archive."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.archive = root / "old"
        self.instants: list[str] = []  # the n-th: 10 * (n + 1) rows
        self.epoch = 0
        self.drills: dict[str, DrillResult] = {}
        self.state = ArchiveState()
        self.primary = ""

    def files(self) -> dict[str, int]:
        """And when each was made."""
        return {path.name: path.stat().st_mtime_ns for path in (self.archive / "wal").iterdir()}

    def config(self, name: str, to: str = "", archive: Path | None = None) -> PostgresConfig:
        """A member's that begins with the archive."""
        return PostgresConfig(
            node="pg-1", members=("pg-1", "pg-2"), host="127.0.40.9", port=free_ports(1)[0],
            directory=str(self.root / name), socket_dir=str(self.root / f"s-{name}"),
            bin_dir=str(find_binaries("", unprivileged(), self.root)),
            superuser_password=PASSWORD, replication_password="r",
            restore_from=str(archive or self.archive), restore_to=to,
        )  # fmt: skip

    async def restored(self, name: str, to: str, archive: Path | None = None) -> list[int]:
        """The rows of a member made from the archive, without any agent."""
        config = self.config(name, to, archive)
        member = RealPostgres(config)
        await member.initialise()
        await member.start()
        try:
            async with asyncio.timeout(WAIT_S):
                while not (await member.status()).idle:
                    await asyncio.sleep(0.02)
            async with await connect(f"{config.host}:{config.port}") as session:
                cursor = await session.execute("SELECT n FROM acks ORDER BY n")
                return [int(str(row[0])) for row in await cursor.fetchall()]
        finally:
            await member.kill()


async def scheduled(cluster: PgCluster, past: Past) -> None:
    """The first backup is of yesterday: one is due at once, and a trial of it."""
    schedule = Schedule(every_s=DAY_S / 2, keep=2, verify_every_s=DAY_S)
    await set_schedule(cluster.kv, cluster.name, schedule)
    second = await backed_up(cluster)
    assert second.error == ""
    async with asyncio.timeout(WAIT_S):
        while not (drills := await drill_results(cluster.kv, cluster.name)):
            await asyncio.sleep(0.1)
        while len((state := await archive_state(cluster.kv, cluster.name)).reached) < 2:
            await asyncio.sleep(0.1)
    past.drills, past.state, past.primary = drills, state, second.node


@asynccontextmanager
async def shared_folder() -> AsyncGenerator[Path]:
    """One that every member reaches."""
    root = Path(tempfile.mkdtemp(prefix="pgha-archive-"))
    root.chmod(0o755)
    try:
        yield root
    finally:
        shutil.rmtree(root)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def past() -> AsyncIterator[Past]:
    async with shared_folder() as root:
        made = Past(root)
        async with run_pgha(more_env={"PGHA_ARCHIVE_DIR": str(made.archive)}) as cluster:
            await live(cluster, made)
        yield made


async def live(cluster: PgCluster, past: Past) -> None:
    """A backup and three instants, one before and two after a failover (22)."""
    leader = await cluster.wait_whole()
    await ask(leader, "CREATE TABLE acks (n int PRIMARY KEY)", "SELECT 1")
    await request_backup(cluster.kv, cluster.name, FIRST, time.time() - DAY_S)
    backup = await backed_up(cluster, FIRST)
    assert (backup.error, backup.node, backup.epoch) == ("", leader.node, leader.epoch)
    past.instants.append(await write(leader, 0))
    old = cluster.node(leader.node)
    async with silent_streams(old):
        session = await connect(leader.address)
        lonely = insert(session, NEVER)
        async with await connect(leader.address) as other:
            async with asyncio.timeout(WAIT_S):
                while await scalar(other, WAITING) != "1":
                    await asyncio.sleep(0.02)
            name = await scalar(other, "SELECT pg_walfile_name(pg_switch_wal())")
        await until("the old primary has archived it", lambda: (past.archive / "wal" / name).exists())
        await old.kill()
    with pytest.raises(psycopg.OperationalError):
        await lonely
    after = await cluster.wait_leader(lambda now: now.epoch > leader.epoch)
    past.instants.append(await write(after, 10))
    await old.start()
    after = await cluster.wait_whole()
    past.instants.append(await write(after, 20))
    await write(after, 30)
    await ask(after, "SELECT pg_switch_wal()")
    await write(after, 40)
    past.epoch = after.epoch
    last = str((await ask(after, "SELECT pg_walfile_name(pg_current_wal_lsn())"))[0])
    await ask(after, "SELECT pg_switch_wal()")
    await until("the end is archived", lambda: (past.archive / "wal" / last).exists())
    await scheduled(cluster, past)
    for node in cluster.nodes:
        await until(f"{node.name} has nothing left to archive", lambda node=node: not waiting(node))
    fork = archived.histories(past.archive)[after.epoch][-1]
    assert fork.timeline == leader.epoch
    assert (past.archive / "wal" / name).read_bytes()[fork.lsn % (16 << 20) :].strip(b"\0")  # past the fork


async def scalar(session: Connection, query: LiteralString) -> str:
    """Its one value."""
    row = await (await session.execute(query)).fetchone()
    assert row is not None
    return str(row[0])


async def test_22_every_instant_has_its_rows_although_the_old_primary_archived_past_the_fork(
    past: Past,
) -> None:
    rows = await asyncio.gather(*(past.restored(f"at-{n}", to) for n, to in enumerate(past.instants)))
    assert list(rows) == [list(range(10)), list(range(20)), list(range(30))]
    assert await past.restored("all", "") == list(range(50))


@pytest.mark.soak
async def test_22_before_the_new_primary_archived_anything_the_fork_is_where_a_restore_ends(
    past: Past,
) -> None:
    """The archive as it was then: the new timeline is known, its first segment is not there yet."""
    then = past.root / "then"
    shutil.copytree(past.archive, then)
    give_tree(then, unprivileged())
    for path in (then / "wal").glob(f"{past.epoch:08X}0*"):
        path.unlink()
    for path in (then / "base").glob("*.json"):
        if path.stem != FIRST:
            path.unlink()
    assert await past.restored("then-all", "", then) == list(range(10))


@pytest.mark.soak
async def test_a_schedule_takes_backups_and_a_replica_tries_them(past: Past) -> None:
    second = next(r.backup for r in past.state.reached if r.backup != FIRST)
    drill = past.drills[second]
    assert (drill.error, drill.databases) == ("", 2)
    assert drill.node != past.primary
    for reached in past.state.reached:
        assert reached.missing == ""
        assert archived.instant_s(past.instants[2]) < reached.last_commit_s <= drill.finished_at_s


@pytest.mark.soak
async def test_a_trial_restore_finds_what_is_damaged_and_leaves_nothing(past: Past) -> None:
    damaged = past.root / "damaged"
    shutil.copytree(past.archive, damaged)
    give_tree(damaged, unprivileged())
    config = past.config("trial")
    Path(config.directory).mkdir()
    give_tree(Path(config.directory), unprivileged())
    scratch = Scratch(msgspec.structs.replace(config, archive_dir=str(damaged), restore_from=""))
    assert (await scratch.restored(FIRST))[1] == 2
    segments = sorted((damaged / "wal").glob(f"{past.epoch:08X}0*"))
    assert len(segments) >= 2
    middle = segments[0].read_bytes()
    fork = archived.histories(damaged)[past.epoch][-1].lsn % (16 << 20)
    segments[0].write_bytes(middle[: fork + 256] + bytes(len(middle) - fork - 256))
    with pytest.raises(Unavailable, match="cannot be read"):
        await scratch.restored(FIRST)
    segments[0].unlink()
    with pytest.raises(Unavailable, match="lacks"):
        await scratch.restored(FIRST)
    segments[0].write_bytes(middle)
    relation = max((damaged / "base" / FIRST / "base").rglob("1*"), key=lambda p: p.stat().st_size)
    whole = relation.read_bytes()
    relation.write_bytes(b"x" + whole[1:])
    with pytest.raises(Unavailable, match="pg_verifybackup"):
        await scratch.restored(FIRST)
    relation.write_bytes(whole)
    trial = asyncio.ensure_future(scratch.restored(FIRST))
    await until("it is at work", lambda: bool(server_pids(scratch.data)))
    trial.cancel()
    await asyncio.wait({trial})
    await scratch.clear()
    assert list(Path(config.directory).iterdir()) == []
    assert not Path(f"{config.socket_dir}-d").exists()


async def test_23_a_clone_with_the_same_archive_refuses_until_it_has_its_own(past: Past) -> None:
    before = past.files()
    same = {"PGHA_ARCHIVE_DIR": str(past.archive), "PGHA_RESTORE_FROM": str(past.archive)}
    async with run_pgha(member_count=2, more_env=same) as clone:
        logs = [clone.root / f"{node.name}.log" for node in clone.nodes]
        await until("it refuses", lambda: "has the WAL of another cluster" in logs[0].read_text())
        await until("it says why", lambda: "belongs to another cluster" in logs[1].read_text())
        assert await clone.leader() is None or not (await clone.members())[clone.nodes[0].name].streaming
    assert past.files() == before
    own = same | {"PGHA_ARCHIVE_DIR": str(past.root / "new"), "PGHA_RESTORE_TO": past.instants[1]}
    async with run_pgha(member_count=2, more_env=own) as clone:
        leader = await clone.wait_whole()
        assert await ask(leader, "SELECT n FROM acks ORDER BY n") == list(range(20))
        assert leader.epoch > past.epoch
        await write(leader, 50)
        await until("it archives", lambda: any((past.root / "new" / "wal").iterdir()))
    assert past.files() == before  # not one file more or other
