"""Base backups in the archive directory of a cluster, taken by the primary when somebody asks or one is due.

What is in an archive: archived.py. When something is due and what is dropped: backup_plan.py.
Made by pgha/main.py (`Backups`); a loop of its own beside the agent's. Works on nothing but copies.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
import structlog

from flyd.errors import FlydError, Refused, Unavailable
from flyd.model import encode
from flyd.ports import KV, Clock, Delete, Entropy, Put, Unchanged
from pgha import archive_owner, archived, backup_plan, keys, pgconf, upkeep, wal
from pgha.agent import Agent
from pgha.backup_plan import ArchiveState, Drill, DrillResult, Schedule
from pgha.model import AgentConfig, Backup
from pgha.pgconf import PostgresConfig
from pgha.processes import Tools, give_tree, require_reachable, unprivileged

log = structlog.get_logger(__name__)

UPKEEP_S = 30.0
BACKUP_S = 6 * 3600.0
LOOK_S = 1.0


class Backups:
    """Takes base backups and looks after the archive while this member leads."""

    def __init__(
        self,
        config: AgentConfig,
        server: PostgresConfig,
        kv: KV,
        clock: Clock,
        entropy: Entropy,
        agent: Agent,
    ) -> None:
        self._config = config
        self._server = server
        self._kv = kv
        self._clock = clock
        self._entropy = entropy
        self._records = agent.records
        self._journal = agent.journal
        self._tools = Tools(server.bin_dir, Path(server.directory))
        self._looked_s = 0.0  # at the archive; 0: at once

    async def keep(self) -> None:
        """For ever; returns at once if there is no archive."""
        if not self._server.archive_dir:
            return
        archive_owner.forget(Path(self._server.directory))
        await self._owned()
        said = ""
        while True:
            await asyncio.sleep(LOOK_S)
            leader = self._records.leader()
            if leader is None or leader.node != self._config.node or not leader.serving:
                continue
            try:
                await self._turn(leader.epoch)
                said = ""
            except (Refused, Unavailable, OSError) as error:  # of etcd or the archive: all is seen again
                if said != str(error):
                    log.warning("pgha.backup_unsettled", node=self._config.node, error=str(error))
                said = str(error)

    async def _turn(self, epoch: int) -> None:
        """One thing after the other, while this member leads."""
        cluster, now_s = self._config.cluster, self._clock.wall_s()
        wish, schedule = self._records.backup_wish(), self._records.read(keys.schedule(cluster), Schedule)
        backups = list(self._records.read_all(keys.backups(cluster), Backup))
        results = self._records.read_all(keys.drill_results(cluster), DrillResult)
        if wish is not None:
            await self._settle(wish, await self._taken(wish, epoch))
            self._looked_s = 0.0
        elif backup_plan.backup_due(schedule, backups, now_s):
            name = backup_plan.backup_name(now_s, self._entropy)
            made = Backup(name=name, requested_at_s=now_s)
            await self._wish(keys.backup_wish(cluster), encode(made))
        elif name := backup_plan.drill_due(schedule, backups, results, now_s):
            await self._wish(keys.drill(cluster), encode(Drill(backup=name, requested_at_s=now_s)))
        elif self._clock.monotonic_s() >= self._looked_s + UPKEEP_S:
            await self._upkeep(schedule, results)
            self._looked_s = self._clock.monotonic_s()

    async def _wish(self, key: str, value: bytes) -> None:
        """Unless there is one, or another leads by now."""
        leader_key = keys.postgres_leader(self._config.cluster)
        mine = Unchanged(leader_key, self._records.mod_revision(leader_key))
        await self._kv.txn([mine, Unchanged(key, 0)], [Put(key, value)])

    async def _upkeep(self, schedule: Schedule | None, results: Sequence[DrillResult]) -> None:
        """Drop what the schedule does not keep, then say how far the rest reaches."""
        cluster, archive = self._config.cluster, Path(self._server.archive_dir)
        archive_owner.require(archive, Path(self._server.directory))
        if schedule is not None:
            bad = backup_plan.broken(results)
            gone = await upkeep.pruned(archive, bad, schedule.keep, self._clock.wall_s())
            for name in gone:
                self._journal.record(
                    "postgres.backup_dropped", f"{schedule.keep} newer are kept", backup=name
                )
        there = await asyncio.to_thread(archived.sealed, archive)
        recorded = self._records.read_all(keys.backups(cluster), Backup)
        for name in backup_plan.forgotten(recorded, there):
            effects = [Delete(keys.backup(cluster, name)), Delete(keys.drill_result(cluster, name))]
            await self._kv.txn([], effects)
        key, found = keys.archive(cluster), await upkeep.state(archive, self._tools)
        if found != self._records.read(key, ArchiveState):
            await self._kv.txn([], [Put(key, encode(found))])

    async def _owned(self) -> None:
        """Until the archive is known to be this cluster's: only then does anything go in."""
        folder, said = Path(self._server.archive_dir), ""
        while True:
            try:
                if (folder / "wal").exists():  # made with the first data directory
                    mine = await archive_owner.token_of(self._kv, self._config.cluster, self._entropy)
                    archive_owner.claim(folder, mine, Path(self._server.directory))
                    return
            except (Refused, Unavailable, OSError) as error:
                if said != str(error):
                    self._journal.record("postgres.archive_refused", _told(error))
                said = str(error)
            await asyncio.sleep(LOOK_S)

    async def _taken(self, wish: Backup, epoch: int) -> Backup:
        began_s = self._clock.wall_s()
        try:
            size = await take(self._server, wish.name)
            done = msgspec.structs.replace(
                wish, node=self._config.node, epoch=epoch, began_at_s=began_s,
                finished_at_s=self._clock.wall_s(), size_bytes=size,
            )  # fmt: skip
            seal(Path(self._server.archive_dir), done)
        except (Unavailable, OSError) as error:  # a full or absent archive must not end this member
            return msgspec.structs.replace(wish, node=self._config.node, epoch=epoch, error=str(error))
        return done

    async def _settle(self, wish: Backup, done: Backup) -> None:
        key = keys.backup_wish(self._config.cluster)
        compare = Unchanged(key, self._records.mod_revision(key))
        put = Put(keys.backup(self._config.cluster, wish.name), encode(done))
        await self._kv.txn([compare], [put, Delete(key)])
        log.info("pgha.backup", node=self._config.node, name=done.name, error=done.error)


async def take(config: PostgresConfig, name: str) -> int:
    """A base backup of the server that runs here; its size in bytes. Begins afresh if it was cut short."""
    base = Path(config.archive_dir) / "base"
    partial = base / f"{name}.new"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(base / name, ignore_errors=True)  # not sealed: nobody relies on it
    address = f"{config.host}:{config.port}"
    source = pgconf.conninfo(address, pgconf.REPLICATION_USER, f"{config.node}-backup", "")
    await Tools(config.bin_dir, base).run(
        "pg_basebackup", "-D", str(partial), "-d", source, "-X", "stream", "-c", "fast",
        env={"PGPASSWORD": config.replication_password}, timeout_s=BACKUP_S,
    )  # fmt: skip
    partial.rename(base / name)
    return await asyncio.to_thread(_size, base / name)


def seal(archive: Path, backup: Backup) -> None:
    """From now on it may be restored from."""
    wal.write_durably(archive / "base" / f"{backup.name}.json", encode(backup).decode())


def prepare(archive: Path) -> None:
    """Make the folders of a new cluster's archive, writable for Postgres' user.

    `Refused` if that cannot be, or if there is the history of another cluster.
    """
    user = unprivileged()
    try:
        for folder in (archive, archive / "wal", archive / "base"):
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            if not any(folder.iterdir()):
                give_tree(folder, user)
        used = any((archive / "wal").iterdir()) or any((archive / "base").iterdir())
    except OSError as error:
        raise Refused(f"the archive {archive} cannot be made: {error.strerror}") from error
    if used:
        raise Refused(
            f"the archive {archive} has the WAL of another cluster",
            hint="a new or restored cluster needs another name, or the old archive moved away",
        )
    require_reachable(archive, user)


def _told(error: Exception) -> str:
    hint = error.hint if isinstance(error, FlydError) else ""
    return f"{error}: {hint}" if hint else str(error)


def _size(path: Path) -> int:
    return sum(
        os.lstat(os.path.join(root, name)).st_size for root, _, names in os.walk(path) for name in names
    )
