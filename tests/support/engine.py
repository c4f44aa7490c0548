"""The Docker driver's rig, over the engine of this machine; everything it makes is gone at the end."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from docker import APIClient
from docker.errors import DockerException, NotFound

from flyd.drivers.docker.driver import DockerDriver
from flyd.drivers.docker.engine import DEFAULT_URL
from flyd.drivers.docker.spec import LABEL_HOST, HostNetwork
from flyd.store.system import SystemClock
from tests.support.drivers import ShellCommands

MAKE_IMAGE = Path(__file__).parent.parent.parent / "scripts" / "base-image.sh"
IMAGE_TIMEOUT_S = 600
FIRST_SUBNET = 64  # 10.<n>: one for each test process, since several may run at the same time
SUBNETS = 64


@cache
def engine() -> Any:
    """The engine of this machine with the base image; without one the test is skipped."""
    try:
        client = APIClient(version="auto", timeout=60)
    except DockerException as error:
        pytest.skip(f"no Docker engine answers on this machine: {error}")
    made = subprocess.run(
        [str(MAKE_IMAGE)], capture_output=True, text=True, timeout=IMAGE_TIMEOUT_S, check=False
    )
    if made.returncode:
        pytest.fail(f"scripts/base-image.sh failed:\n{made.stderr}")
    return client


class DockerRig(ShellCommands):
    """The Docker driver with a network of its own on this machine's engine."""

    def __init__(self, client: Any, top: Path, network: HostNetwork) -> None:
        self.client = client
        self.network = network
        self.state_dir = top
        self._drivers: list[DockerDriver] = []

    def driver(self, url: str = DEFAULT_URL) -> DockerDriver:
        """A driver over the one host; the one before is forgotten, as if flyd had been restarted."""
        self.close()
        driver = DockerDriver(self.network, self.state_dir, SystemClock(), {"FLYD_HOST": "rig"}, url=url)
        self._drivers.append(driver)
        return driver

    def close(self) -> None:
        """Forget the driver; machines run on."""
        while self._drivers:
            self._drivers.pop().close()

    def containers(self) -> list[dict[str, Any]]:
        """This host's containers, as `docker ps -a` lists them."""
        filters = {"label": f"{LABEL_HOST}={self.network.host_name}"}
        return self.client.containers(all=True, filters=filters)

    def remove_all(self) -> None:
        """Leave nothing of this host on the engine."""
        for container in self.containers():
            self.client.remove_container(container["Id"], v=True, force=True)
        with suppress(NotFound):
            self.client.remove_network(self.network.name)


class Wire:
    """A socket in front of the engine's that can be cut, as when the engine is restarted."""

    def __init__(self, path: Path) -> None:
        self.url = f"unix://{path}"
        self._path = path
        self._server: asyncio.Server | None = None
        self._ends: list[asyncio.StreamWriter] = []

    async def join(self) -> None:
        """Let calls through."""
        self._server = await asyncio.start_unix_server(self._forward, self._path)

    async def cut(self) -> None:
        """End every call, and refuse new ones."""
        assert self._server is not None
        self._server.close()
        self._path.unlink()
        while self._ends:
            self._ends.pop().transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_engine, from_engine = await asyncio.open_unix_connection(DEFAULT_URL.removeprefix("unix://"))
        self._ends += [writer, from_engine]
        with suppress(OSError):
            await asyncio.gather(_pump(reader, from_engine), _pump(to_engine, writer))


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(65536):
        sink.write(data)
        await sink.drain()
    if sink.can_write_eof():
        sink.write_eof()


@contextmanager
def docker_host() -> Generator[DockerRig, None, None]:
    """A host whose containers and network are all gone at the end."""
    client = engine()
    top = Path(tempfile.mkdtemp(prefix="flyd-docker-"))
    number = os.getpid() % SUBNETS
    network = HostNetwork(
        host_name=f"test-{os.getpid()}",
        subnet=f"10.{FIRST_SUBNET + number}",
        gateway=f"10.{FIRST_SUBNET + number}.0.1",
    )
    rig = DockerRig(client, top, network)
    try:
        yield rig
    finally:
        rig.close()
        rig.remove_all()
        shutil.rmtree(top)
