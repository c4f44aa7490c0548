"""Seeing that nobody in a Postgres server goes by an older `synchronous_standby_names` any more.

A reload is asynchronous and leaves no trace: each walsender reads the new configuration when it comes to it,
and until then goes on releasing commits by the old one. One that is held up does so minutes later. So those
that were there when the postmaster had read it are ended; a standby is back 0.1 s later, served by a process
that was born with the new configuration. Copies under way go on: their names are in no list.

Called by pgha/postgres.py.
"""

from __future__ import annotations

import asyncio
import re
import signal
from pathlib import Path

from flyd.errors import Unavailable
from pgha import pgconf
from pgha.process_table import send, server_pids
from pgha.session import SqlSession

EFFECT_S = 3.0  # less than the agent may leave Postgres unobserved (term.py, HEALTH_S)
POLL_S = 0.01
SENDERS_SQL = "SELECT pid, application_name FROM pg_stat_replication"
# The titles of a walsender, and of a connection that may still become one.
SENDER = re.compile(
    rb"postgres: (?:[^ ]+: )?"
    rb"(?:walsender |%b |.*\b(?:authentication|initializing)$)" % pgconf.REPLICATION_USER.encode()
)


async def take_effect(
    config: pgconf.PostgresConfig, data_dir: Path, text: str, names: frozenset[str]
) -> None:
    """Return once every process goes by `text`; `names`: whose word counted before or counts now."""
    try:
        async with asyncio.timeout(EFFECT_S):
            while await _asked_afresh(config, "SHOW synchronous_standby_names") != text:
                await asyncio.sleep(POLL_S)
            await _end_senders(config, data_dir, names)
    except TimeoutError:
        raise Unavailable(f"synchronous_standby_names is not {text} everywhere after {EFFECT_S} s") from None


async def _asked_afresh(config: pgconf.PostgresConfig, sql: str) -> object:
    """By a new process, which has what the postmaster has."""
    session = _session(config)
    try:
        return (await session.query(sql))[0][0]
    finally:
        await session.close()


def may_send(title: bytes) -> bool:
    """Whether a server process with this title is a walsender, or may become one."""
    return SENDER.match(title.rstrip(b"\0 ")) is not None


async def _end_senders(config: pgconf.PostgresConfig, data_dir: Path, names: frozenset[str]) -> None:
    session = _session(config)
    old, told = set(server_pids(data_dir)), set[int]()
    try:
        while True:
            strangers = {pid for pid, name in await session.query(SENDERS_SQL) if name not in names}
            left = [p for p in old & set(server_pids(data_dir)) if p not in strangers and _may_send(p)]
            if not left:
                return
            for pid in left:
                if pid not in told:
                    send(pid, signal.SIGTERM)
            told.update(left)
            await asyncio.sleep(POLL_S)
    finally:
        await session.close()


def _may_send(pid: int) -> bool:
    try:
        return may_send(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def _session(config: pgconf.PostgresConfig) -> SqlSession:
    return SqlSession(config.socket_dir, config.port, pgconf.SUPERUSER)
