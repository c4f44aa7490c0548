"""How a cluster's first data directory comes to be: by initdb, or from a base backup and archived WAL.

Both work beside the data directory, and the caller renames the result: a crash leaves nothing. Restored data
has been promoted once by Postgres alone, on a timeline that nobody serves from, like the 1 of an initdb;
the first primary's epoch is the next. Passwords become those of this cluster.

Called by pgha/postgres.py, and by pgha/drill.py for a trial that nobody serves from.
"""

from __future__ import annotations

import asyncio
import pwd
import shutil
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from flyd.errors import Refused, Unavailable
from pgha import archived, pgconf, wal
from pgha.archive import fetch_command
from pgha.model import Backup
from pgha.pgconf import PostgresConfig
from pgha.processes import Tools, bound_command, give_tree, kill_all
from pgha.session import SqlSession

INITDB_S = 60.0
POLL_S = 0.1
RECOVERY_S = 6 * 3600.0


async def initdb(tools: Tools, config: PostgresConfig, target: Path, password_file: Path) -> None:
    """A new, empty database cluster on timeline 1; `password_file` has the superuser's."""
    await tools.run(
        "initdb", "-D", str(target), "-U", pgconf.SUPERUSER, f"--pwfile={password_file}",
        "--auth-local=trust", "--auth-host=scram-sha-256", "--data-checksums",
        "--encoding=UTF8", "--locale=C", timeout_s=INITDB_S,
    )  # fmt: skip
    with (target / "postgresql.conf").open("a") as conf:
        conf.write("\n" + pgconf.INCLUDE)
    (target / "pg_hba.conf").write_text(pgconf.HBA)
    role = f"CREATE ROLE {pgconf.REPLICATION_USER} REPLICATION LOGIN PASSWORD "
    await _single(tools, target, role + wal.sql_literal(config.replication_password))


async def from_backup(tools: Tools, config: PostgresConfig, target: Path, user: pwd.struct_passwd) -> None:
    """The newest base backup that ended before `config.restore_to`, and WAL up to that instant.

    `Refused` if the archive does not have it.
    """
    backup = archived.chosen(Path(config.restore_from), config.restore_to)
    async with recovered(tools, config, backup, target, user) as sql:
        for role, password in (
            (pgconf.SUPERUSER, config.superuser_password),
            (pgconf.REPLICATION_USER, config.replication_password),
        ):
            await sql.query(f"ALTER ROLE {role} PASSWORD {wal.sql_literal(password)}")


@asynccontextmanager
async def recovered(
    tools: Tools, config: PostgresConfig, backup: Backup, target: Path, user: pwd.struct_passwd
) -> AsyncGenerator[SqlSession]:
    """A server without a network over that backup in `target`, out of recovery at `config.restore_to`.

    It ends well with the block; whatever happens its processes are dead at the end.
    """
    source = Path(config.restore_from)
    segments = target.with_name(target.name + ".wal")
    shutil.rmtree(segments, ignore_errors=True)
    base = archived.base_of(source, backup.name)
    timeline = await asyncio.to_thread(archived.lay_out, source, base, segments)
    await asyncio.to_thread(shutil.copytree, source / "base" / backup.name, target, symlinks=True)
    for left in ("standby.signal", "postmaster.pid", "postmaster.opts", "pgha.conf"):
        (target / left).unlink(missing_ok=True)
    (target / "recovery.signal").touch()
    give_tree(segments, user)
    give_tree(target, user)
    target.chmod(0o700)
    log_file = target.with_name("recovery.log")
    command = (str(Path(config.bin_dir) / "postgres"), "-D", str(target))
    settings = _settings(config, timeline, segments)
    with log_file.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *bound_command((*command, *settings), user, signal.SIGQUIT), cwd=target.parent, env=tools.env(),
            start_new_session=True, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    sql = SqlSession(config.socket_dir, config.port, pgconf.SUPERUSER)
    try:
        try:
            async with asyncio.timeout(RECOVERY_S):
                await _promoted(process, sql, log_file, config)
        except TimeoutError:
            raise Unavailable(f"the recovery took longer than {RECOVERY_S} s; see {log_file}") from None
        yield sql
        await sql.close()
        process.send_signal(signal.SIGINT)
        if await process.wait() != 0:
            raise Unavailable(f"Postgres did not end well after the recovery; see {log_file}")
    finally:
        await sql.close()
        await kill_all(target)
        await process.wait()
        shutil.rmtree(segments, ignore_errors=True)


def _settings(config: PostgresConfig, timeline: int, segments: Path) -> list[str]:
    """Words for the server's command line: it reads this WAL, and nobody and nothing reaches it but us."""
    options = {
        "listen_addresses": "",
        "port": str(config.port),
        "unix_socket_directories": config.socket_dir,
        "restore_command": fetch_command(segments),
        "recovery_target_timeline": str(timeline),
        "archive_mode": "off",
        "synchronous_standby_names": "",
        "max_logical_replication_workers": "0",  # its subscriptions are the old cluster's
        "max_connections": pgconf.SETTINGS["max_connections"],  # floors of recovery (T12)
        "max_wal_senders": pgconf.SETTINGS["max_wal_senders"],
    }
    if config.restore_to:
        options |= {"recovery_target_time": config.restore_to, "recovery_target_action": "promote"}
    return [word for name, value in options.items() for word in ("-c", f"{name}={value}")]


async def _promoted(
    process: asyncio.subprocess.Process, sql: SqlSession, log_file: Path, config: PostgresConfig
) -> None:
    """It has left recovery."""
    while True:
        if process.returncode is not None:
            said = log_file.read_text(errors="replace")
            if "before configured recovery target was reached" in said:
                raise Refused(
                    f"the archive {config.restore_from} ends before {config.restore_to}",
                    hint="restore to an earlier instant, or leave the time out for all that there is",
                )
            raise Unavailable(f"Postgres ended during the recovery: {said[-500:]}")
        try:
            if not (await sql.query("SELECT pg_is_in_recovery()"))[0][0]:
                return
        except Unavailable:
            pass  # it takes no connections yet
        await asyncio.sleep(POLL_S)


async def _single(tools: Tools, target: Path, line: str) -> None:
    """One statement, by a server without a network."""
    text = f"SET password_encryption = 'scram-sha-256'\n{line.replace(chr(10), ' ')}\n"
    await tools.run(
        "postgres", "--single", "-D", str(target), "postgres", stdin=text.encode(), timeout_s=INITDB_S
    )
