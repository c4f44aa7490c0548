"""fly machine against one real host: real gRPC, host loop, run log and processes; etcd in memory.

What a cluster adds (TLS, edges, other hosts) is integration/test_machines.py's.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest
import structlog
from click.testing import CliRunner

from flyd.api.context import ApiContext
from flyd.api.interceptor import ErrorInterceptor
from flyd.api.machines import MachinesServicer
from flyd.cli import connection, machine
from flyd.cli.main import fly
from flyd.drivers.process.driver import ProcessDriver
from flyd.errors import FlydError
from flyd.machines.host import HostLoop
from flyd.machines.probes import probe
from flyd.model import App, Host, Resources, encode
from flyd.store import keys
from flyd.store.memory import MemoryEtcd, MemoryKV
from flyd.store.mirror import Mirror
from flyd.store.runlog import SqliteRunLog
from flyd.store.system import SystemClock, SystemEntropy
from flyd.v1 import machines_pb2 as pb
from flyd.v1 import machines_pb2_grpc
from tests.support.host_world import FakeSources
from tests.support.placing import join
from volumes.directory import DirectoryVolumes

pytestmark = pytest.mark.timeout(60)

HOST = Host(
    name="ams-1", region="ams", api_address="127.0.0.1:1", address="127.11.0.1", subnet="127.11",
    capacity=Resources(cpus=4, memory_mb=4096, disk_gb=10), driver="process", version="test",
)  # fmt: skip
LISTENER = """
import os, signal, socket, sys, time
signal.signal(signal.SIGHUP, lambda *_: print("hup", flush=True))
server = socket.create_server((os.environ["FLY_PRIVATE_IP"], int(sys.argv[1])))
print("up", os.environ.get("MODE", "plain"), flush=True)
while True:
    time.sleep(1)
"""


class Fly:
    """The command, asking this host."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror

    async def __call__(self, *words: str) -> Any:
        """A `fly machine` verb that must go well; its JSON if it printed any."""
        result = await asyncio.to_thread(lambda: CliRunner().invoke(fly, ["machine", *words]))
        if isinstance(result.exception, FlydError):
            raise result.exception
        assert result.exit_code == 0, (words, result.output, result.exception)
        return json.loads(result.stdout) if "--json" in words else result.stdout

    async def refused(self, kind: str, *words: str) -> str:
        """One that must fail with this error; what it says."""
        with pytest.raises(FlydError) as caught:
            await self(*words)
        assert type(caught.value).__name__ == kind, caught.value
        return caught.value.message

    async def until(self, machine_id: str, so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The machine once it is so; looked at when anything changes."""
        async with asyncio.timeout(15):
            while True:
                version = self._mirror.version
                shown = await self("status", machine_id, "--json")
                if so(shown):
                    return shown
                await self._mirror.wait_change(version)


@asynccontextmanager
async def one_host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Fly]:
    kv = MemoryKV(MemoryEtcd())
    await join(kv, HOST)
    await kv.put(keys.app("web"), encode(App(name="web", regions=("ams",))))
    # The host's log shall not get between the words of the command that is being read.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    mirror, clock, entropy = Mirror(kv, (keys.ROOT,)), SystemClock(), SystemEntropy()
    driver = ProcessDriver(folder / "machines", clock, {"PATH": os.environ["PATH"]})
    run_log = SqliteRunLog(folder / "runs.sqlite")
    loop = HostLoop(
        host=HOST, kv=kv, mirror=mirror, driver=driver, run_log=run_log,
        volumes=DirectoryVolumes(folder / "volumes"), sources=FakeSources(),
        clock=clock, entropy=entropy, probe=probe,
    )  # fmt: skip
    context = ApiContext(
        host=HOST, kv=kv, mirror=mirror, clock=clock, entropy=entropy, driver=driver,
        sources=FakeSources(), peers=cast(Any, None), etcd_endpoints=(),
    )  # fmt: skip
    server = cast(Any, grpc.aio).server(
        interceptors=(ErrorInterceptor(mirror.stale_s, lambda method, context: None),)
    )
    machines_pb2_grpc.add_MachinesServiceServicer_to_server(MachinesServicer(context), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    channel = grpc.insecure_channel(address)
    monkeypatch.setattr(machine, "channel", lambda: channel)
    monkeypatch.setattr(connection, "addresses", lambda: (address,))
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(mirror.keep()), group.create_task(loop.run())]
        await mirror.wait_synced()
        await server.start()
        try:
            yield Fly(mirror)
        finally:
            structlog.reset_defaults()
            for task in tasks:
                task.cancel()
            await server.stop(0)
            channel.close()
            for machine_id in await driver.observe():
                await driver.destroy(machine_id)
            driver.close()
            run_log.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "listener.py"
    path.write_text(LISTENER)
    return f"python3 {path}"


async def test_one_machine_through_all_its_verbs(
    tmp_path: Path, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    async with one_host(tmp_path, monkeypatch) as run:
        words = ("host:", "-a", "web", "--command", f"{program} {port}", "--metadata", "role=db", "--json")
        made = await run("run", *words, "--idempotency-key", "k")
        again = await run("run", *words, "--idempotency-key", "k")
        machine_id = made["id"]
        assert again["id"] == machine_id
        assert [m["id"] for m in await run("list", "--all", "--metadata", "role=db", "--json")] == [
            machine_id
        ]
        assert await run("list", "--all", "--state", "stopped", "--json") == []

        ps = await run("ps", machine_id, "--json")
        listening = [s["port"] for p in ps["processes"] for s in p["listen_sockets"]]
        assert listening in ([port], [])  # it may not have come so far yet

        first = await run.until(machine_id, lambda m: m["state"] == "started")
        updated = await run("update", machine_id, "--env", "MODE=fast", "--memory", "512", "--json")
        assert (updated["state"], updated["config"]["guest"]["memory_mb"]) == ("started", 512)
        assert updated["instance_id"] != first["instance_id"]
        assert updated["pid"] != first["pid"]
        stale = await run.refused("Conflict", "update", machine_id, "--if-version", first["instance_id"])
        assert updated["instance_id"] in stale

        await run("restart", machine_id)
        restarted = await run.until(
            machine_id, lambda m: m["state"] == "started" and m["pid"] != updated["pid"]
        )
        await run("cordon", machine_id)
        assert (await run.until(machine_id, lambda m: m["cordoned"]))["pid"] == restarted["pid"]

        await run("stop", machine_id, "--signal", "SIGTERM", "--timeout", "1h")
        stopped = await run("status", machine_id, "--json")
        ended = stopped["events"][-1]
        assert (ended["type"], ended["exit_event"]["signal"]) == ("stop", 15)
        assert ended["exit_event"]["requested_stop"]
        assert "signal 15, asked for" in await run("status", machine_id)
        await run.refused("Refused", "ps", machine_id)
        await run("start", machine_id)
        await run.refused("Refused", "destroy", machine_id)
        await run("destroy", machine_id, "--force")
        await run("wait", machine_id, "--state", "destroyed", "--timeout", "15")
        await run.refused("NotFound", "status", machine_id)


async def test_leases_and_signals(tmp_path: Path, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with one_host(tmp_path, monkeypatch) as run:
        command = f"{program} {free_port()}"
        made = await run("run", "host:", "-a", "web", "--command", command, "--json")
        lease = await run("lease", "acquire", made["id"], "--owner", "ada", "--json")
        assert "leased by ada" in await run.refused("Conflict", "stop", made["id"])
        assert "leased by ada" in await run.refused("Conflict", "signal", made["id"], "SIGTERM")
        twin = await run("clone", made["id"], "--json")  # makes another, and changes nothing of this one
        assert twin["id"] != made["id"]
        await run("signal", made["id"], "SIGTERM", "--nonce", lease["nonce"])
        await run.until(made["id"], lambda m: m["restarts"] == 1 and m["state"] == "started")
        await run("lease", "release", made["id"], "--nonce", lease["nonce"])
        await run("stop", made["id"], "--timeout", "0")


async def test_a_check_that_fails_restarts_it_and_one_that_is_done_goes(
    tmp_path: Path, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with one_host(tmp_path, monkeypatch) as run:
        check = pb.MachineHealthCheck(type="tcp", port=free_port(), interval=0.5, restart_limit=2)
        config = pb.MachineConfig(
            image="host:",
            cmd=["sleep", "1000"],
            checks={"up": check},
            services=[pb.MachineService(internal_port=1)],
        )
        request = pb.CreateMachineRequest(app_name="web", config=config)
        made = (await asyncio.to_thread(machine.stub().CreateMachine, request)).machine
        sick = await run.until(made.id, lambda m: m["restarts"] >= 1)
        assert "check up failed 2 times in a row" in " ".join(e["detail"] for e in sick["events"])
        await run.until(made.id, lambda m: m["state"] == "started")
        assert "nothing listens on port 1" in (await run("ps", made.id, "--json"))["warnings"][0]

        brief = await run(
            "run", "host:", "-a", "web", "--command", "true", "--rm", "--restart", "no", "--json"
        )
        await run("wait", brief["id"], "--state", "destroyed", "--timeout", "15")
