"""One member's Postgres, for real: ports.Postgres over the server's own programs.

On disk, under the member's directory:

    pgdata/         the data directory
    promise         lease revision of the newest vote begun (durable)
    damaged         there while a copy or rewind is under way: pgdata is not to be started
    upstream.pass   the password for streaming, there only while following

Fencing (I3, T5): the walreceiver's password file is removed first, so whatever starts to connect from
then on fails, even if the startup process has not read the new configuration yet; then the receiver's
process must be gone. All SQL runs over a socket in a private directory, by one connection.
Called by pgha/agent.py (made in pgha/main.py) and tests/conformance/test_postgres.py. Decides nothing.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from pathlib import Path

from flyd.errors import InvariantBroken, Refused, Unavailable
from pgha import backups, newdata, pgconf, wal
from pgha.archive import push_command, push_script
from pgha.archive_owner import owned_file
from pgha.exits import Exits
from pgha.membership import settled
from pgha.model import Data, DataState, Position, Replica, Status, Synchronous
from pgha.pgconf import PostgresConfig
from pgha.process_table import send, walreceivers
from pgha.processes import Tools, bound_command, give_tree, kill_all, require_reachable, unprivileged
from pgha.session import SqlSession, probe
from pgha.synchronous import take_effect

START_S = 20.0
FENCE_S = 5.0
FENCE_SIGTERM_S = 0.5  # then the receiver is told directly
FENCE_KILL_S = 1.5  # then all of Postgres is killed: it starts again fenced
PROMOTE_S = 15.0
CHECKPOINT_S = 120.0
REWIND_S = 600.0
CATCH_UP_S = 60.0
COPY_S = 6 * 3600.0
STOP_FOR_REWIND_S = 20.0
POLL_S = 0.003
START_POLL_S = 0.02


class RealPostgres:
    """ports.Postgres. One object per data directory at a time."""

    def __init__(self, config: PostgresConfig) -> None:
        self._config = config
        self._user = unprivileged()
        self._base = Path(config.directory)
        self._data = self._base / "pgdata"
        self._promise = self._base / "promise"
        self._damaged = self._base / "damaged"
        self._passfile = self._base / "upstream.pass"
        self._process: asyncio.subprocess.Process | None = None
        self._sql = SqlSession(config.socket_dir, config.port, pgconf.SUPERUSER)
        self._exits = Exits()
        self._upstream = ""
        self._configured: tuple[str, str] | None = None  # upstream and own name, as last written
        self._read_only = False
        self._wanted = settled(config.members).synchronous
        self._in_force = Synchronous()
        for folder in (self._base, Path(config.socket_dir)):
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            if os.geteuid() == 0:
                os.chown(folder, self._user.pw_uid, self._user.pw_gid)
            elif folder.stat().st_uid != os.geteuid():
                raise Refused(f"{folder} belongs to another user", hint="remove it or give it to this user")
            require_reachable(folder, self._user)
        Path(config.socket_dir).chmod(0o700)
        self._tools = Tools(config.bin_dir, self._base)

    @property
    def data_dir(self) -> str:
        """Where the server runs; its processes are known by it."""
        return str(self._data)

    # ----------------------------------------------------------------------- disk

    async def data(self) -> Data:
        """What is on disk."""
        promised = int(self._promise.read_text()) if self._promise.exists() else 0
        if self._damaged.exists():
            return Data(state=DataState.DAMAGED, promised=promised)
        if not (self._data / "PG_VERSION").exists():
            return Data(promised=promised)
        return Data(state=DataState.READY, system_id=wal.system_id(self._data), promised=promised)

    async def save_promise(self, revision: int) -> None:
        """Durable on return."""
        wal.write_durably(self._promise, str(revision))

    async def initialise(self) -> None:
        """initdb beside, then one rename."""
        if (self._data / "PG_VERSION").exists():
            raise Refused(f"{self._data} has data already", hint="initdb never runs over data")
        partial = self._base / "pgdata.new"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(self._data, ignore_errors=True)
        if self._config.archive_dir:
            backups.prepare(Path(self._config.archive_dir))
        password = self._base / "initdb.pass"
        self._write(password, self._config.superuser_password + "\n")
        try:
            if self._config.restore_from:
                await newdata.from_backup(self._tools, self._config, partial, self._user)
            else:
                await newdata.initdb(self._tools, self._config, partial, password)
        finally:
            password.unlink()
        partial.rename(self._data)

    # ----------------------------------------------------------------------- up and down

    async def start(self) -> None:
        """As a standby without upstream."""
        if self._running():
            return
        await self.kill()
        self._close_upstream()
        await self._launch("", self._config.node)

    async def _launch(self, upstream: str, name: str) -> None:
        wal.drop_placeholders(self._data)
        (self._data / "standby.signal").touch()
        (self._data / "postmaster.pid").unlink(missing_ok=True)  # all its processes are dead: see `kill`
        self._configure(upstream, name)
        give_tree(self._data, self._user)
        self._data.chmod(0o700)
        binary = str(Path(self._config.bin_dir) / "postgres")
        self._process = process = await asyncio.create_subprocess_exec(
            *bound_command((binary, "-D", str(self._data)), self._user, signal.SIGQUIT),
            cwd=self._base, env=self._tools.env(), start_new_session=True, stdin=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        self._exits.watch("server", process.pid)
        self._in_force = self._wanted
        socket = Path(self._config.socket_dir) / f".s.PGSQL.{self._config.port}"
        try:
            async with asyncio.timeout(START_S):
                while not (socket.exists() and wal.postmaster_pid(self._data) == process.pid):
                    if process.returncode is not None:
                        raise Unavailable(f"Postgres ended with {process.returncode} as it started")
                    await asyncio.sleep(START_POLL_S)
        except TimeoutError:
            raise Unavailable(f"Postgres did not start within {START_S} s") from None

    async def stop(self, timeout_s: float) -> bool:
        """Fast shutdown, then the hard way."""
        clean = True
        if self._process is not None and self._process.returncode is None:
            await self._sql.close()
            self._process.send_signal(signal.SIGINT)
            try:
                async with asyncio.timeout(timeout_s):
                    await self._process.wait()
            except TimeoutError:
                clean = False
        await self.kill()
        return clean

    async def kill(self) -> None:
        """Every process of the data directory."""
        await kill_all(self._data)
        if self._process is not None:
            if self._process.returncode is None:
                send(self._process.pid, signal.SIGKILL)  # it may not have entered the directory yet
            await self._process.wait()
            self._process = None

    def _running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    # ----------------------------------------------------------------------- what it is

    async def status(self) -> Status:
        """One row, or that it takes no connections."""
        if not self._running():
            return Status()
        try:
            row = (await self._sql.query(wal.STATUS_SQL))[0]
        except Unavailable:
            return Status(running=self._running(), upstream=self._upstream)
        in_recovery, received, replayed, flushed, timeline, waiting, receiver = row
        self._exits.watch("walreceiver", receiver or 0)
        end = flushed if not in_recovery else max(received or 0, replayed or 0)
        timeline = timeline or wal.timeline_at(self._data, end)
        return Status(
            running=True,
            ready=True,
            in_recovery=in_recovery,
            timeline=timeline,
            began_lsn=wal.began_lsn(self._data, timeline),
            flushed_lsn=end,
            replayed_lsn=end if not in_recovery else replayed or 0,
            idle=bool(in_recovery) and waiting in wal.IDLE_WAITS,
            upstream=self._upstream,
            streaming=bool(receiver),
            synchronous=self._in_force,
        )

    async def wait_ended(self) -> None:
        """See exits.py."""
        await self._exits.wait()

    async def replicas(self) -> tuple[Replica, ...]:
        """From pg_stat_replication; of two connections of one name, the one that is further."""
        rows = await self._sql.query(wal.REPLICAS_SQL)
        best: dict[str, Replica] = {}
        for name, flushed, streaming in rows:
            best[name] = Replica(name=name, flushed_lsn=flushed or 0, streaming=streaming)
        return tuple(best[name] for name in sorted(best))

    # ----------------------------------------------------------------------- streaming

    async def follow(self, address: str) -> None:
        """Password file first, then the configuration."""
        self._open_upstream(address)
        self._configure(address, self._config.node)
        self._reload()

    async def fence(self) -> Position:
        """See the module's head for why this holds."""
        if not self._running():
            raise Unavailable("Postgres is down: nothing to fence")
        self._close_upstream()
        self._configure("", self._config.node)
        self._reload()
        loop = asyncio.get_running_loop()
        began_s, told = loop.time(), False
        while pids := walreceivers(self._data):
            waited_s = loop.time() - began_s
            if waited_s > FENCE_KILL_S:
                await self.kill()
                raise Unavailable(f"walreceiver {pids} did not end: Postgres was killed")
            if waited_s > FENCE_SIGTERM_S and not told:
                told = True
                for pid in pids:
                    send(pid, signal.SIGTERM)
            await asyncio.sleep(POLL_S)
        while loop.time() - began_s < FENCE_S:
            status = await self.status()
            if not status.running or (status.ready and not status.in_recovery):
                raise Unavailable("Postgres is no standby: nothing to fence")
            if status.ready and status.idle:
                return Position(timeline=status.timeline, lsn=status.flushed_lsn)
            await asyncio.sleep(POLL_S)
        raise Unavailable(f"local WAL is not replayed within {FENCE_S} s")

    # ----------------------------------------------------------------------- becoming another

    async def synchronise(self, wanted: Synchronous) -> int:
        """See synchronous.py for why a reload is not enough."""
        counted = frozenset((*self._wanted.names, *wanted.names))
        self._wanted, self._in_force = wanted, Synchronous()
        self._configure(self._upstream, self._config.node)
        self._reload()
        text = pgconf.synchronous_names(self._config.node, wanted)
        await take_effect(self._config, self._data, text, counted)
        self._in_force = wanted
        return (await self.status()).flushed_lsn

    async def promote(self, timeline: int) -> int:
        """Out of recovery; the placeholders make Postgres choose `timeline` (T9)."""
        status = await self.status()
        if not status.ready:
            raise Unavailable("Postgres takes no connections: cannot promote")
        if status.in_recovery:
            wal.write_placeholders(self._data, status.timeline + 1, timeline)
            give_tree(self._data / "pg_wal", self._user)
            await self._sql.query("SELECT pg_promote(wait => false)")
            await self._wait_promoted()
            status = await self.status()
        if status.timeline != timeline:
            raise InvariantBroken(f"promoted to timeline {status.timeline}, epoch is {timeline}")
        return wal.switch_lsn(self._data, timeline)

    async def _wait_promoted(self) -> None:
        try:
            async with asyncio.timeout(PROMOTE_S):
                while (await self._sql.query("SELECT pg_is_in_recovery()"))[0][0]:
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise Unavailable(f"Postgres did not leave recovery within {PROMOTE_S} s") from None

    async def checkpoint(self) -> None:
        """On a connection of its own: it may take long."""
        session = SqlSession(self._config.socket_dir, self._config.port, pgconf.SUPERUSER)
        try:
            await session.query("CHECKPOINT", timeout_s=CHECKPOINT_S)
        finally:
            await session.close()

    async def rewind(self, address: str) -> bool:
        """pg_rewind, then stream until consistent under a name that acknowledges nothing."""
        await probe(address, pgconf.SUPERUSER, self._config.superuser_password, "CHECKPOINT")
        wal.write_durably(self._damaged, "rewind\n")
        await self.stop(STOP_FOR_REWIND_S)
        source = pgconf.conninfo(address, pgconf.SUPERUSER, f"{self._config.node}-rewind", "")
        env = {"PGPASSWORD": self._config.superuser_password}
        code, output = await self._tools.attempt(
            "pg_rewind", "-D", str(self._data), f"--source-server={source}", env=env, timeout_s=REWIND_S
        )
        if code != 0 or "no rewind required" in output:
            return False
        await self.kill()
        self._open_upstream(address)
        await self._launch(address, f"{self._config.node}-rewind")
        if not await self._wait_consistent():
            return False
        await self.stop(STOP_FOR_REWIND_S)
        self._close_upstream()
        wal.remove_durably(self._damaged)
        return True

    async def _wait_consistent(self) -> bool:
        """A rewound server takes connections once it has got all the WAL that makes it whole."""
        deadline_s = asyncio.get_running_loop().time() + CATCH_UP_S
        while asyncio.get_running_loop().time() < deadline_s and self._running():
            if (await self.status()).ready:
                return True
            await asyncio.sleep(START_POLL_S)
        await self.kill()
        return False

    async def copy(self, address: str) -> None:
        """pg_basebackup into an emptied directory."""
        await probe(address, pgconf.SUPERUSER, self._config.superuser_password, "SELECT 1")
        wal.write_durably(self._damaged, "copy\n")
        await self.kill()
        shutil.rmtree(self._data, ignore_errors=True)
        source = pgconf.conninfo(address, pgconf.REPLICATION_USER, f"{self._config.node}-copy", "")
        env = {"PGPASSWORD": self._config.replication_password}
        await self._tools.run(
            "pg_basebackup", "-D", str(self._data), "-d", source, "-X", "stream", "-c", "fast",
            env=env, timeout_s=COPY_S,
        )  # fmt: skip
        wal.remove_durably(self._damaged)

    def set_read_only(self, on: bool) -> None:
        """In the configuration as it stands, and in every later one."""
        self._read_only = on
        if self._running() and self._configured is not None:
            self._configure(*self._configured)
            self._reload()

    # ----------------------------------------------------------------------- small parts

    def _open_upstream(self, address: str) -> None:
        self._upstream = address
        self._write(self._passfile, f"*:*:*:*:{wal.passfile_escaped(self._config.replication_password)}\n")

    def _close_upstream(self) -> None:
        self._upstream = ""
        self._passfile.unlink(missing_ok=True)

    def _configure(self, upstream: str, name: str) -> None:
        config = self._config
        user, passfile = pgconf.REPLICATION_USER, str(self._passfile)
        conninfo = pgconf.conninfo(upstream, user, name, passfile) if upstream else ""
        text = pgconf.server_config(
            me=config.node,
            synchronous=self._wanted,
            host=config.host,
            port=config.port,
            socket_dir=config.socket_dir,
            primary_conninfo=conninfo,
            archive_command=self._archive_command(),
        )
        self._configured = (upstream, name)
        self._write(self._data / "pgha.conf", text + (pgconf.READ_ONLY if self._read_only else ""))

    def _archive_command(self) -> str:
        """Its script is written anew with the configuration; empty without an archive."""
        config, script = self._config, self._base / "archive.sh"
        if not config.archive_dir:
            return ""
        folder, owned = Path(config.archive_dir) / "wal", owned_file(self._base)
        self._write(script, push_script(folder, config.node, owned, wal.SEGMENT_BYTES))
        return push_command(script)

    def _reload(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGHUP)

    def _write(self, path: Path, text: str) -> None:
        """A private file of Postgres' user, replaced in one step."""
        partial = path.with_name(path.name + ".new")
        partial.unlink(missing_ok=True)
        partial.touch(mode=0o600)
        partial.write_text(text)
        if os.geteuid() == 0:
            os.chown(partial, self._user.pw_uid, self._user.pw_gid)
        partial.rename(path)
