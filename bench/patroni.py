"""Patroni as a rig for bench/failover.py: three members on loopback, tuned to its minimum, quorum commit.

    ./scripts/patroni-env.sh                 # makes the environment, prints the program's path
    python bench/failover.py --patroni "$(./scripts/patroni-env.sh)"

Settings: ttl 20, loop_wait 1, retry_timeout 3 (the least it takes), synchronous_mode quorum with one
synchronous node, so that a commit waits for what ours waits for. All of it runs as Postgres' user.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import shutil
import signal
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg

from bench import cables
from bench.cables import Cables
from pgha.binaries import find_binaries
from pgha.process_table import server_pids
from pgha.processes import bound_command, give_tree, kill_all, unprivileged
from tests.support.etcd import EtcdCluster, Member, free_ports, run_etcd

PASSWORD = "a superuser's secret"
WHOLE_S = 180.0
NAMES = ("p1", "p2", "p3")


class PatroniRig:
    """bench.rig.Rig over Patroni."""

    name = "patroni"
    password = PASSWORD

    def __init__(
        self, program: Path, root: Path, etcd: EtcdCluster, bin_dir: Path, first_group: int | None
    ) -> None:
        self._program = program
        self._root = root
        self.etcd = etcd
        self.lost_etcd: Member | None = None
        port, api = free_ports(2)
        self._rest = {name: f"127.0.41.{n + 1}:{api}" for n, name in enumerate(NAMES)}
        self.addresses = {name: f"127.0.41.{n + 1}:{port}" for n, name in enumerate(NAMES)}
        self.cables = Cables(self.addresses, cables.groups(NAMES))
        self._first_group = first_group
        self._agents: dict[str, asyncio.subprocess.Process] = {}
        for name in NAMES:
            self._socket_dir(name).mkdir()  # of its own: all have the same port
            config = self._config(name, bin_dir)
            (root / f"{name}.yml").write_text(json.dumps(config))  # JSON is YAML

    def _config(self, name: str, bin_dir: Path) -> dict[str, Any]:
        address = self.addresses[name]
        rest = self._rest[name]
        tuned = {
            "ttl": 20,
            "loop_wait": 1,
            "retry_timeout": 3,
            "synchronous_mode": "quorum",
            "synchronous_node_count": 1,
            "postgresql": {
                "use_pg_rewind": True,
                "parameters": {"shared_buffers": "32MB", "wal_log_hints": "on"},
            },
        }
        return {
            "scope": "bench",
            "name": name,
            "restapi": {"listen": rest, "connect_address": rest},
            "etcd3": {"hosts": self.etcd.endpoints},
            "bootstrap": {"dcs": tuned, "initdb": [{"encoding": "UTF8"}, {"locale": "C"}, "data-checksums"]},
            "postgresql": {
                "listen": address,
                "connect_address": address,
                "data_dir": str(self._data(name)),
                "bin_dir": str(bin_dir),
                "pgpass": str(self._root / f"{name}.pgpass"),
                "authentication": {
                    "superuser": {"username": "postgres", "password": PASSWORD},
                    "replication": {"username": "replicator", "password": "another"},
                },
                "pg_hba": [
                    "local all all trust",
                    "host replication replicator all md5",
                    "host all all all md5",
                ],
                "parameters": {"unix_socket_directories": str(self._socket_dir(name))},
            },
        }

    def _socket_dir(self, name: str) -> Path:
        return self._root / f"{name}-socket"

    def _data(self, name: str) -> Path:
        return self._root / f"{name}-data"

    async def start(self, node: str) -> None:
        """Its agent, as the unprivileged user."""
        command = bound_command(
            (str(self._program), str(self._root / f"{node}.yml")), self._user(node), signal.SIGKILL
        )
        with (self._root / f"{node}.log").open("ab") as log:
            self._agents[node] = await asyncio.create_subprocess_exec(
                *command, cwd=self._root, stdout=log, stderr=log, env=os.environ | {"HOME": str(self._root)}
            )

    def _user(self, node: str) -> pwd.struct_passwd:
        """Postgres' user, in the member's own group if it is to be told by that."""
        user = unprivileged()
        if self._first_group is None:
            return user
        fields = list(user)
        fields[3] = self._first_group + NAMES.index(node)
        return pwd.struct_passwd(fields)

    def _pids(self, node: str) -> list[int]:
        agent = self._agents.get(node)
        alive = [agent.pid] if agent is not None and agent.returncode is None else []
        return alive + server_pids(self._data(node))

    def signal(self, node: str, number: signal.Signals) -> None:
        """To the agent and all of Postgres."""
        for pid in self._pids(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    async def kill(self, node: str) -> None:
        """SIGKILL until nothing is left."""
        while self._pids(node):
            self.signal(node, signal.SIGKILL)
            await asyncio.sleep(0.01)

    async def kill_postgres(self, node: str) -> None:
        """SIGKILL to Postgres alone."""
        await kill_all(self._data(node))

    async def switch_over(self, node: str) -> None:
        """Hand over as planned."""
        url = f"http://{self._rest[node]}/switchover"
        async with httpx.AsyncClient(timeout=WHOLE_S) as client:
            (await client.post(url, json={"leader": node})).raise_for_status()

    async def wait_whole(self) -> str:
        """The primary, once both others stream from it and one of them is synchronous."""
        async with asyncio.timeout(WHOLE_S):
            while True:
                for node in NAMES:
                    if await self._streams(node) == [True, True]:
                        return node
                await asyncio.sleep(0.2)

    async def _streams(self, node: str) -> list[object]:
        host, _, port = self.addresses[node].rpartition(":")
        uri = f"host={host} port={port} user=postgres dbname=postgres"
        sql = "SELECT state = 'streaming' AND sync_state = 'quorum' FROM pg_stat_replication"
        try:
            async with asyncio.timeout(2.0):
                connection = await psycopg.AsyncConnection.connect(uri, password=PASSWORD, autocommit=True)
                async with connection:
                    return [row[0] for row in await (await connection.execute(sql)).fetchall()]
        except (psycopg.Error, OSError, TimeoutError):
            return []


@asynccontextmanager
async def run_patroni(program: Path, first_group: int | None = None) -> AsyncGenerator[PatroniRig]:
    """A cluster from nothing; gone at the end."""
    root = Path(tempfile.mkdtemp(prefix="patroni-bench-"))
    root.chmod(0o755)
    try:
        async with run_etcd(3) as etcd:
            bin_dir = find_binaries("", unprivileged(), root)
            rig = PatroniRig(program.absolute(), root, etcd, bin_dir, first_group)
            give_tree(root, unprivileged())
            try:
                for name in NAMES:
                    await rig.start(name)
                yield rig
            finally:
                for name in NAMES:
                    await rig.kill(name)
    finally:
        shutil.rmtree(root, ignore_errors=True)
