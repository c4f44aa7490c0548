"""One plain Postgres under the same clients: what it shows is the measure; what is done to it is found."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import LiteralString

import psycopg
import pytest
from psycopg import sql

from integration.cluster import wait_for
from integration.histories.recording import Here, History, Recording
from integration.test_chat_example import PG_USER, Postgres

pytestmark = [pytest.mark.timeout(120), pytest.mark.soak]  # with the histories that they are the measure of

APPENDS = 200
MANY = 800  # enough for READ COMMITTED to show what it allows, several times
SEED = 5
NONE: Mapping[str, LiteralString] = MappingProxyType({})


@pytest.fixture(scope="module")
def plain() -> Generator[Postgres]:
    folder = Path(tempfile.mkdtemp(prefix="flyd-history-"))
    if PG_USER is not None:
        shutil.chown(folder, PG_USER)
    folder.chmod(0o755)
    postgres = Postgres(folder)
    postgres.start()
    try:
        yield postgres
    finally:
        postgres.stop()
        shutil.rmtree(folder)


def lengths(plain: Postgres, table: str) -> int:
    """How much was appended so far."""
    try:
        with psycopg.connect(plain.url) as connection:
            query = sql.SQL("SELECT coalesce(sum(cardinality(v)), 0) FROM {}").format(sql.Identifier(table))
            row = connection.execute(query).fetchone()
            return int(row[0]) if row else 0
    except psycopg.Error:
        return 0  # not made yet


def record(
    plain: Postgres,
    name: str,
    isolation: str,
    harm: Mapping[str, LiteralString] = NONE,
    appends: int = APPENDS,
) -> History:
    """Two clients for a while; in the middle, by name, statements that no client of ours would give."""
    wait_for(lambda: can_connect(plain), "Postgres starts")
    with Recording(name, SEED, isolation) as recording:
        here = Here(plain.url, recording.folder)
        for _ in range(2):
            recording.launch(here)
        for statement in ("SELECT 1", *harm.values()):
            with psycopg.connect(plain.url, autocommit=True) as connection:
                connection.execute(sql.SQL(statement).format(sql.Identifier(recording.table)))
            enough = lengths(plain, recording.table) + appends
            wait_for(lambda enough=enough: lengths(plain, recording.table) > enough, "clients append")
        history = recording.finish(here)
    print("\n" + history.summary(SEED, []))
    return history


def can_connect(plain: Postgres) -> bool:
    try:
        psycopg.connect(plain.url).close()
    except psycopg.OperationalError:
        return False
    return True


def test_serializable_shows_nothing(plain: Postgres) -> None:
    report = record(plain, "plain-serializable", "SERIALIZABLE").report
    assert not report.anomalies, report.text()
    assert report.unread == 0
    assert report.outcomes["ok"] > APPENDS / 4


def test_read_committed_shows_what_it_allows(plain: Postgres) -> None:
    """The same clients, one word changed: transactions whose statements see different states."""
    kinds = record(plain, "plain-read-committed", "READ COMMITTED", appends=MANY).report.kinds()
    assert "G-single" in kinds or "G2-item" in kinds
    assert not {"G0", "G1a", "G1b", "G1c", "lost", "stale"} & set(kinds)


def test_a_failover_to_an_asynchronous_replica_is_found(plain: Postgres) -> None:
    """The table goes back to what it was some hundred acknowledged appends ago."""
    history = record(
        plain,
        "planted-async-failover",
        "SERIALIZABLE",
        {
            "replica falls behind": "CREATE TABLE behind AS SELECT * FROM {}",
            "fail-over to it": "BEGIN; TRUNCATE {0}; INSERT INTO {0} SELECT * FROM behind; COMMIT",
        },
    )
    kinds = history.report.kinds()
    assert kinds["lost"] > 10
    assert kinds["incompatible-order"] or kinds["stale"]
