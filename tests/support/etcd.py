"""A real etcd on loopback for tests: one member or three, on ports of their own, killed at exit."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, cast

from etcd3aio import Etcd3Client

from flyd.errors import Unavailable
from flyd.store.etcd import EtcdKV

ETCD = Path(sys.executable).parent / "etcd"
START_TIMEOUT_S = 20.0


def free_ports(count: int) -> list[int]:
    """Ports that are free now, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


class Member:
    """One etcd process, that can be hurt."""

    def __init__(self, name: str, directory: Path, client_port: int, peer_port: int) -> None:
        self.name = name
        self.endpoint = f"127.0.0.1:{client_port}"
        self.peer_url = f"http://127.0.0.1:{peer_port}"
        self.directory = directory
        self._arguments: list[str] = []
        self._process: asyncio.subprocess.Process | None = None

    def configure(self, cluster: str) -> None:
        """Fix the command line."""
        client_url = f"http://{self.endpoint}"
        self._arguments = [
            *("--name", self.name, "--data-dir", str(self.directory)),
            *("--listen-client-urls", client_url, "--advertise-client-urls", client_url),
            *("--listen-peer-urls", self.peer_url, "--initial-advertise-peer-urls", self.peer_url),
            *("--initial-cluster", cluster, "--initial-cluster-state", "new"),
            *("--heartbeat-interval", "100", "--election-timeout", "1000"),
            *("--log-level", "error", "--unsafe-no-fsync"),
        ]

    async def start(self) -> None:
        """Start, or start again over the same data."""
        log = (self.directory.parent / f"{self.name}.log").open("ab")
        with log:
            self._process = await asyncio.create_subprocess_exec(
                str(ETCD), *self._arguments, stdout=log, stderr=log
            )

    async def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def freeze(self) -> None:
        """SIGSTOP: alive for the kernel, silent for everybody."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    async def is_leader(self) -> bool:
        """Whether this member leads."""
        reader, writer = await asyncio.open_connection(*self.endpoint.split(":"))
        try:
            writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
            return b"\netcd_server_is_leader 1" in await reader.read()
        finally:
            writer.close()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)


class EtcdCluster:
    """Members that form one cluster."""

    def __init__(self, members: list[Member]) -> None:
        self.members = members

    @property
    def endpoints(self) -> list[str]:
        """host:port of every member."""
        return [m.endpoint for m in self.members]

    async def leader(self) -> Member:
        """The member that leads, once there is one."""
        async with asyncio.timeout(START_TIMEOUT_S):
            while True:
                for member in self.members:
                    with contextlib.suppress(OSError):
                        if await member.is_leader():
                            return member
                await asyncio.sleep(0.05)

    async def wait_ready(self) -> None:
        """Return once every member answers."""
        async with asyncio.timeout(START_TIMEOUT_S):
            for member in self.members:
                await wait_answers(member.endpoint)


async def wait_answers(endpoint: str) -> None:
    """Return once this member answers a linearizable read."""
    kv = EtcdKV([endpoint])
    try:
        while True:
            with contextlib.suppress(Unavailable):
                await kv.get("/ready")
                return
    finally:
        await kv.close()


@contextlib.asynccontextmanager
async def run_etcd(member_count: int = 1) -> AsyncGenerator[EtcdCluster]:
    """A fresh, ready cluster; all its processes are killed and its files removed at exit."""
    root = Path(tempfile.mkdtemp(prefix="flyd-etcd-"))
    ports = free_ports(2 * member_count)
    members = [Member(f"m{n}", root / f"m{n}", ports[2 * n], ports[2 * n + 1]) for n in range(member_count)]
    for member in members:
        member.configure(",".join(f"{m.name}={m.peer_url}" for m in members))
    cluster = EtcdCluster(members)
    try:
        for member in members:
            await member.start()
        await cluster.wait_ready()
        yield cluster
    finally:
        for member in members:
            await member.kill()
        shutil.rmtree(root, ignore_errors=True)


async def compact(endpoint: str, revision: int) -> None:
    """Make the cluster forget history up to and including `revision`."""
    async with Etcd3Client([endpoint]) as client:
        await cast(Any, client.kv).compact(revision, physical=True)
