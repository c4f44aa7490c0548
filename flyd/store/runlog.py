"""A host's own durable memory in one SQLite file: the real ports.RunLog.

Owns the file and its schema. Invariants: `append` and `put_record` return only after the
transaction is synced to disk (WAL with synchronous=FULL); events are never changed; one
process has the file open at a time (a second one is refused, not queued). The calls block
for one fsync, a few milliseconds, on purpose: an operation may not go on before.

Called by flyd/daemon.py, which hands it to the machine loops. Decides nothing: what an
event means is flyd/machines/saga.py's.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from flyd.errors import FlydError, InvariantBroken, Refused, Unavailable
from flyd.model import RunEvent, decode, encode
from flyd.ports import KEPT_ENDED_RUNS

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE events (
    position INTEGER PRIMARY KEY,
    run_id TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    kind TEXT NOT NULL,
    event BLOB NOT NULL,
    UNIQUE (run_id, sequence)
);
CREATE INDEX ended ON events (position) WHERE kind = 'end';
CREATE TABLE records (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
"""
OPEN_RUNS = """
SELECT run_id FROM events AS begun WHERE sequence = 0 AND kind = 'begin'
AND NOT EXISTS (SELECT 1 FROM events WHERE run_id = begun.run_id AND kind = 'end')
ORDER BY position
"""
FORGET_OLD_RUNS = """
DELETE FROM events WHERE run_id IN
(SELECT run_id FROM events WHERE kind = 'end' ORDER BY position DESC LIMIT -1 OFFSET ?)
"""


class SqliteRunLog:
    """ports.RunLog in the file at `path`, which is created if it is not there."""

    def __init__(self, path: str | Path) -> None:
        self._path = str(path)
        with self._explained("open"):
            self._db = sqlite3.connect(self._path, timeout=0, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    def append(self, event: RunEvent) -> None:
        """Add one event; sequences of a run count from 0 without gaps."""
        with self._transaction("append to"):
            (following,) = self._row("SELECT count(*) FROM events WHERE run_id = ?", event.run_id)
            if event.sequence != following:
                raise InvariantBroken(
                    f"run {event.run_id}: event {event.sequence} ({event.kind}) appended, "
                    f"but {following} is the next",
                    hint="two tasks drive the same run, or one resumed from an old copy of its events",
                )
            self._db.execute(
                "INSERT INTO events (run_id, sequence, kind, event) VALUES (?, ?, ?, ?)",
                (event.run_id, event.sequence, event.kind, encode(event)),
            )
            if event.kind == "end":
                self._db.execute(FORGET_OLD_RUNS, (KEPT_ENDED_RUNS,))

    def events(self, run_id: str) -> tuple[RunEvent, ...]:
        """All events of one run, in order."""
        with self._explained("read"):
            rows = self._db.execute("SELECT event FROM events WHERE run_id = ? ORDER BY sequence", (run_id,))
            return tuple(decode(data, RunEvent) for (data,) in rows)

    def open_runs(self) -> tuple[str, ...]:
        """Runs begun and not ended, oldest first."""
        with self._explained("read"):
            return tuple(run_id for (run_id,) in self._db.execute(OPEN_RUNS))

    def put_record(self, key: str, value: bytes) -> None:
        """Durably set one record."""
        with self._transaction("write to"):
            self._db.execute("INSERT OR REPLACE INTO records VALUES (?, ?)", (key, value))

    def delete_record(self, key: str) -> None:
        """Durably remove one record; absent is no error."""
        with self._transaction("write to"):
            self._db.execute("DELETE FROM records WHERE key = ?", (key,))

    def records(self, prefix: str) -> Mapping[str, bytes]:
        """All records under the prefix, in key order."""
        with self._explained("read"):
            rows = self._db.execute(
                "SELECT key, value FROM records WHERE substr(key, 1, ?) = ? ORDER BY key",
                (len(prefix), prefix),
            )
            return dict(rows.fetchall())

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def _prepare(self) -> None:
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        (version,) = self._row("PRAGMA user_version")
        if version == 0:
            self._db.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        elif version != SCHEMA_VERSION:
            raise Refused(
                f"run log {self._path} has schema {version}; this flyd knows only {SCHEMA_VERSION}",
                hint="run the flyd version that wrote it, or a newer one",
            )
        (verdict,) = self._row("PRAGMA quick_check(1)")
        if verdict != "ok":
            raise self._damaged(verdict)

    def _row(self, query: str, *values: Any) -> Any:
        return self._db.execute(query, values).fetchone()

    @contextmanager
    def _transaction(self, action: str) -> Generator[None]:
        with self._explained(action):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    @contextmanager
    def _explained(self, action: str) -> Generator[None]:
        """SQLite's errors as ours, with what to do about them."""
        try:
            yield
        except msgspec.DecodeError as e:
            raise self._damaged(str(e)) from e
        except sqlite3.Error as e:
            code = getattr(e, "sqlite_errorcode", 0) & 0xFF
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise self._damaged(str(e)) from e
            raise Unavailable(f"cannot {action} run log {self._path}: {e}", hint=_hint(code)) from e

    def _damaged(self, reason: str) -> FlydError:
        return InvariantBroken(
            f"run log {self._path} is damaged: {reason}",
            hint="check the disk; machines go on running. To start anew, move the file (and its -wal) away: "
            "flyd then rebuilds what it knows from etcd and the driver, but forgets half-done operations",
        )


def _hint(code: int) -> str:
    return {
        sqlite3.SQLITE_FULL: "the disk is full: free space; nothing that was acknowledged is lost",
        sqlite3.SQLITE_IOERR: "the disk failed, or is full: see the kernel's log",
        sqlite3.SQLITE_BUSY: "another flyd has it open: only one may run on a host's data directory",
        sqlite3.SQLITE_CANTOPEN: "the directory must exist and be writable for flyd",
        sqlite3.SQLITE_READONLY: "the file or its disk is read-only",
    }.get(code, "see SQLite's message")
