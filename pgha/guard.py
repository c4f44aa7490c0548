"""Watches a member's disk and archiver: says what it sees, and stops writes before Postgres has to.

Read-only is `default_transaction_read_only`: each later transaction is refused with SQLSTATE 25006, and a
session whose transaction wrote before that is ended. Who wants to make room says so: `BEGIN READ WRITE`.
It is set by the member's own disk, whatever its role: a replica that is promoted is read-only at once.
What disk.py decides is done here. What is under a size limit that statvfs does not show (btrfs quota
groups) is not seen.

Made by pgha/main.py; a loop of its own.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Protocol

import structlog

from flyd.errors import Unavailable
from flyd.model import encode
from flyd.ports import KV, Clock
from pgha import disk, keys, pgconf
from pgha.disk import MB, Archiver, Level, Room, Storage
from pgha.journal import Journal
from pgha.model import AgentConfig
from pgha.pgconf import PostgresConfig
from pgha.session import SqlSession

log = structlog.get_logger(__name__)

LOOK_S = 1.0
ARCHIVER_S = 10.0
TELL_PART = 0.02  # of the disk: less is no news


# A transaction that began a second after the configuration was loaded has seen it; who writes then means it.
END_WRITERS_SQL = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE backend_type = 'client backend' AND backend_xid IS NOT NULL
  AND xact_start < pg_conf_load_time() + interval '1 second'
"""
ARCHIVER_SQL = """
SELECT coalesce(extract(epoch FROM last_failed_time), 0)::float8, coalesce(last_failed_wal, ''),
       coalesce(extract(epoch FROM last_archived_time), 0)::float8
FROM pg_stat_archiver
"""


class Server(Protocol):
    """What the guard needs of pgha/postgres.py."""

    @property
    def data_dir(self) -> str:
        """Where it writes."""
        ...

    def set_read_only(self, on: bool) -> None:
        """From the next transaction on, and after every start."""
        ...


class Guard:
    """One member's."""

    def __init__(
        self,
        config: AgentConfig,
        settings: PostgresConfig,
        server: Server,
        kv: KV,
        clock: Clock,
        journal: Journal,
    ) -> None:
        self._config = config
        self._server = server
        self._sql = SqlSession(settings.socket_dir, settings.port, pgconf.SUPERUSER)
        self._kv = kv
        self._clock = clock
        self._journal = journal
        self._archives = bool(settings.archive_dir)
        self._level = Level.OK
        self._looked_s = 0.0  # at the archiver
        self._failing = (0.0, "", False)
        self._told: Storage | None = None

    async def keep(self) -> None:
        """For ever."""
        while True:
            storage = self.look()
            try:
                if storage.level is Level.READ_ONLY:
                    await self.end_writers()
                if self._archives and self._clock.monotonic_s() >= self._looked_s + ARCHIVER_S:
                    await self.look_at_archiver()
                await self._tell(self.look())
            except Unavailable as error:  # Postgres is down, or etcd away: the next look is soon
                log.debug("pgha.guard_waits", node=self._config.node, error=str(error))
            await asyncio.sleep(LOOK_S)

    async def close(self) -> None:
        """Forget its connection."""
        await self._sql.close()

    async def end_writers(self) -> None:
        """The sessions whose transactions began before it was read-only and have written."""
        ended = await self._sql.query(END_WRITERS_SQL)
        if ended:
            log.warning("pgha.writers_ended", node=self._config.node, count=len(ended))

    def look(self) -> Storage:
        """Measure, and close or open at once."""
        rooms = [found for found in (room(path) for path in self._places()) if found is not None]
        before, self._level = self._level, disk.level(rooms, self._level)
        least = min(rooms, key=lambda r: r.free_bytes, default=Room(0, 0))
        if self._level is not before:
            self._changed(before, least)
        since_s, segment, said = self._failing
        return Storage(
            node=self._config.node,
            level=self._level,
            free_bytes=least.free_bytes,
            total_bytes=least.total_bytes,
            failing_since_s=since_s if said else 0.0,
            failing_segment=segment if said else "",
            waiting=self._waiting() if said else 0,
        )

    def _places(self) -> tuple[Path, ...]:
        data = Path(self._server.data_dir)
        return (data.parent, data / "pg_wal")

    def _changed(self, before: Level, least: Room) -> None:
        text = f"{least.free_bytes // MB} MB of {least.total_bytes // MB} MB are free"
        if Level.READ_ONLY in (before, self._level):
            self._server.set_read_only(self._level is Level.READ_ONLY)
        if self._level is Level.READ_ONLY:
            text += f": no writes until {least.opens() // MB} MB are"
            self._journal.record("postgres.disk_full", text)
        elif before is Level.READ_ONLY:
            self._journal.record("postgres.disk_writable", text)
        else:
            self._journal.record(f"postgres.disk_{self._level}", text)

    async def look_at_archiver(self) -> None:
        """Say when it has failed for too long, and when that is over."""
        found = Archiver(*(await self._sql.query(ARCHIVER_SQL))[0])
        self._looked_s = self._clock.monotonic_s()
        since_s, _, said = self._failing
        began_s, due = disk.failing_since_s(found, since_s, self._clock.wall_s())
        if due and not said:
            text = f"{found.failed_segment} is not archived, {self._waiting()} wait: see the machine's log"
            self._journal.record("postgres.archive_failing", text)
        if said and not began_s:
            self._journal.record("postgres.archive_works", "segments are archived again")
        self._failing = (began_s, found.failed_segment, due)

    def _waiting(self) -> int:
        folder = Path(self._server.data_dir) / "pg_wal" / "archive_status"
        return sum(1 for _ in folder.glob("*.ready"))

    async def _tell(self, storage: Storage) -> None:
        told = self._told
        if told is not None and not _news(told, storage):
            return
        await self._kv.put(keys.storage(self._config.cluster, self._config.node), encode(storage))
        self._told = storage


def room(path: Path) -> Room | None:
    """Of the file system that it is on; None if it is not there."""
    try:
        found = os.statvfs(path)
    except FileNotFoundError:
        return None
    return Room(found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize)


def _news(old: Storage, new: Storage) -> bool:
    if (old.level, old.failing_since_s, old.total_bytes) != (new.level, new.failing_since_s, new.total_bytes):
        return True
    return abs(old.free_bytes - new.free_bytes) > TELL_PART * new.total_bytes
