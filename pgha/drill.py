"""Trial restores: a replica proves that a base backup can be restored, and leaves nothing behind.

    <member>/drill/pgdata       the backup, recovered with all the WAL that the archive has
    <member>/drill/pgdata.wal   newdata.py

A replica does it, on its own volume: not the primary, whose disk and processor serve. Its server has no
network and a socket of its own, and dies with the agent; what a crash left is removed when the agent begins.
In this order: is all WAL there; the backup's own checksums (pg_verifybackup); recovery up to the newest
archived commit; every index and table (pg_amcheck); every row of every database read (pg_dumpall); every
page's checksum (pg_checksums).

Made by pgha/main.py; a loop of its own. The outcome is in etcd: DrillResult.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import msgspec
import structlog

from flyd.errors import FlydError, Unavailable
from flyd.model import decode, encode
from flyd.ports import KV, Clock, Delete, Put, Unchanged
from pgha import archived, backup_plan, keys, newdata, pgconf, upkeep
from pgha.agent import Agent
from pgha.backup_plan import Drill, DrillResult, Reached
from pgha.model import AgentConfig, Backup
from pgha.pgconf import PostgresConfig
from pgha.processes import Tools, give_tree, kill_all, unprivileged
from pgha.session import SqlSession

log = structlog.get_logger(__name__)

LOOK_S = 2.0
HEARTBEAT_S = 20.0
CLOCK_S = 0.001  # two ways to read one commit's time
CHECK_S = 6 * 3600.0
ROOM = 1.3  # of the backup's size: its data, and what recovery adds
NO_CHECKSUMS = "data checksums are not enabled"


class NoRoom(Unavailable):
    """That says nothing of the backup."""


class Drills:
    """Tries backups while this member is a replica and one is wished for."""

    def __init__(
        self, config: AgentConfig, server: PostgresConfig, kv: KV, clock: Clock, agent: Agent
    ) -> None:
        self._config = config
        self._server = server
        self._kv = kv
        self._clock = clock
        self._records = agent.records
        self._journal = agent.journal
        self._scratch = Scratch(server)

    async def keep(self) -> None:
        """For ever; returns at once if there is no archive."""
        if not self._server.archive_dir:
            return
        await self._scratch.clear()
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                if not self._leads() and await self._claimed():
                    await self._tried()
            except* Unavailable as group:  # mostly of etcd: the same wish is seen again
                said = "; ".join(str(error) for error in group.exceptions)
                log.warning("pgha.drill_unsettled", node=self._config.node, error=said)

    def _leads(self) -> bool:
        leader = self._records.leader()
        return leader is None or leader.node == self._config.node

    async def _claimed(self) -> bool:
        """Say that we are at it, or still are; False if there is nothing to do, or another is at it."""
        key, now_s = keys.drill(self._config.cluster), self._clock.wall_s()
        if self._records.read(key, Drill) is None:
            return False
        item = await self._kv.get(key)
        if item is None:
            return False
        drill = decode(item.value, Drill)
        if not backup_plan.claimable(drill, self._config.node, now_s):
            return False
        mine = msgspec.structs.replace(drill, node=self._config.node, seen_at_s=now_s)
        return (await self._kv.txn([Unchanged(key, item.mod_revision)], [Put(key, encode(mine))])).succeeded

    async def _tried(self) -> None:
        """Do it, saying so now and then; given up when another took it over, or this member leads."""
        item = await self._kv.get(keys.drill(self._config.cluster))
        if item is None:
            return
        drill = decode(item.value, Drill)
        async with asyncio.TaskGroup() as group:
            trial = group.create_task(self._outcome(drill))
            while not (await asyncio.wait({trial}, timeout=HEARTBEAT_S))[0]:
                if self._leads() or not await self._still_ours():
                    trial.cancel()
                    return
        await self._settle(trial.result())

    async def _still_ours(self) -> bool:
        try:
            return await self._claimed()
        except Unavailable:  # of etcd: nobody else can have taken it either
            return True

    async def _settle(self, result: DrillResult) -> None:
        cluster = self._config.cluster
        item = await self._kv.get(keys.drill(cluster))
        if item is None or decode(item.value, Drill).node != self._config.node:
            return
        put = Put(keys.drill_result(cluster, result.backup), encode(result))
        compare = Unchanged(keys.drill(cluster), item.mod_revision)
        if (await self._kv.txn([compare], [put, Delete(keys.drill(cluster))])).succeeded:
            bad = "backup_unusable" if result.tried else "backup_not_tried"
            kind = bad if result.error else "backup_verified"
            self._journal.record(f"postgres.{kind}", result.error or result.backup, backup=result.backup)

    async def _outcome(self, drill: Drill) -> DrillResult:
        restored_to_s, databases, failure, tried = 0.0, 0, "", True
        try:
            restored_to_s, databases = await self._scratch.restored(drill.backup)
        except NoRoom as error:
            failure, tried = str(error), False
        except (FlydError, OSError) as error:  # what it shows is the outcome
            failure = str(error)
        finally:
            await self._scratch.clear()
        return DrillResult(
            backup=drill.backup, node=self._config.node, requested_at_s=drill.requested_at_s,
            finished_at_s=self._clock.wall_s(), error=failure, tried=tried,
            restored_to_s=restored_to_s, databases=databases,
        )  # fmt: skip


class Scratch:
    """A place on a member's volume in which a backup is restored and looked at."""

    def __init__(self, server: PostgresConfig) -> None:
        self._home = Path(server.directory) / "drill"
        self.data = self._home / "pgdata"
        self._config = msgspec.structs.replace(
            server, socket_dir=f"{server.socket_dir}-d", restore_from=server.archive_dir, restore_to=""
        )
        self._archive = Path(server.archive_dir)
        self._tools = Tools(server.bin_dir, self._home)

    async def clear(self) -> None:
        """Nothing of it runs or is there on return."""
        await kill_all(self.data)
        for folder in (self._home, Path(self._config.socket_dir)):
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def restored(self, name: str) -> tuple[float, int]:
        """When its last commit was, and how many databases were read; any FlydError says what is wrong."""
        await self.clear()
        backup = next((b for b in archived.sealed(self._archive) if b.name == name), None)
        if backup is None:
            raise Unavailable(f"there is no base backup {name} in {self._archive}")
        user = unprivileged()
        for folder in (self._home, Path(self._config.socket_dir)):
            folder.mkdir(mode=0o700)
            give_tree(folder, user)
        self._need_room(backup)
        reached = await self._reached(name)
        await self._tools.run(
            "pg_verifybackup", "--quiet", "--no-parse-wal", str(self._archive / "base" / name),
            timeout_s=CHECK_S,
        )  # fmt: skip
        async with newdata.recovered(self._tools, self._config, backup, self.data, user) as sql:
            found = await self._read(sql)
        has_s = max(found[0], backup.began_at_s)  # what was committed before it began is in its data
        if has_s < reached.last_commit_s - CLOCK_S:
            raise Unavailable(
                f"recovery of {name} ended {reached.last_commit_s - has_s:.1f} s before the newest "
                f"archived commit: WAL before the end of {reached.last_segment} cannot be read"
            )
        code, said = await self._tools.attempt(
            "pg_checksums", "--check", "-D", str(self.data), timeout_s=CHECK_S
        )
        if code != 0 and NO_CHECKSUMS not in said:
            raise Unavailable(f"pg_checksums found damage in what {name} restores: {said[-500:]}")
        return found

    async def _reached(self, name: str) -> Reached:
        """How far it is to get."""
        found = await upkeep.state(self._archive, self._tools)
        reached = next(r for r in found.reached if r.backup == name)
        if reached.missing:
            raise Unavailable(f"the archive lacks {reached.missing}, which {name} needs")
        return reached

    async def _read(self, sql: SqlSession) -> tuple[float, int]:
        """Every relation checked, every row read."""
        connect = ("-h", self._config.socket_dir, "-p", str(self._config.port), "-U", pgconf.SUPERUSER)
        await self._tools.run("pg_amcheck", "--all", "--install-missing", *connect, timeout_s=CHECK_S)
        await self._tools.run("pg_dumpall", "--no-sync", "--file=/dev/null", *connect, timeout_s=CHECK_S)
        row = (
            await sql.query(
                "SELECT coalesce(extract(epoch FROM pg_last_xact_replay_timestamp()), 0)::float8, "
                "(SELECT count(*) FROM pg_database WHERE datallowconn)"
            )
        )[0]
        return float(row[0]), int(row[1])

    def _need_room(self, backup: Backup) -> None:
        free = shutil.disk_usage(self._home).free
        if free < backup.size_bytes * ROOM:
            raise NoRoom(
                f"no room on this member's volume: {free >> 20} MB free of "
                f"{int(backup.size_bytes * ROOM) >> 20} MB needed in {os.fspath(self._home)}"
            )
