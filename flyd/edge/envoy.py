"""The Envoy process of this host: started apart from flyd, adopted, restarted.

Owns `Envoy` and the folder it works in: `bootstrap.json` (what Envoy is started with),
`envoy.pid` (for people and tests), `envoy.log`, `admin.address` (its admin page, on a free loopback
port). Invariants: Envoy runs in a session of its own, so ending flyd in any way leaves it
serving; Envoy inherits the lock on `envoy.lock` and so holds it exactly as long as it
lives, so that there is no moment at which flyd can be killed and then start a second one (a
new flyd finds the first by its command line, which names this folder); a dead one is noticed
by its pidfd, at once, and started again with a back-off.

Built and run by flyd/daemon.py. Knows nothing of what Envoy routes.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import msgspec
import structlog

from flyd.edge.envoy_config import ADS
from flyd.edge.resources import Body
from flyd.errors import Unavailable
from flyd.ports import Clock

log = structlog.get_logger(__name__)

RESTART_MIN_S = 0.1
RESTART_MAX_S = 5.0
SETTLED_S = 10.0  # an Envoy that lived this long did not fail because of how it was started
STOP_TIMEOUT_S = 5.0
ADOPT_RETRY_S = 0.02  # a process that is just becoming Envoy has no command line for a moment
LOG_TAIL_BYTES = 2000
ADS_RECONNECT_MIN = "0.050s"
ADS_RECONNECT_MAX = "1s"


def bootstrap(node: str, region: str, ads_address: str) -> bytes:
    """What Envoy is started with: who it is and where its configuration comes from."""
    if ads_address.startswith("unix:"):
        ads: Body = {"pipe": {"path": ads_address.removeprefix("unix:")}}
    else:
        host, _, port = ads_address.rpartition(":")
        ads = {"socket_address": {"address": host, "port_value": int(port)}}
    back_off = {"base_interval": ADS_RECONNECT_MIN, "max_interval": ADS_RECONNECT_MAX}
    config: Body = {
        "node": {"id": node, "cluster": "flyd", "locality": {"region": region}},
        "admin": {
            "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}},
            "ignore_global_conn_limit": True,
        },
        "dynamic_resources": {
            "ads_config": {
                "api_type": "GRPC",
                "transport_api_version": "V3",
                "set_node_on_first_message_only": True,
                "grpc_services": [
                    {"envoy_grpc": {"cluster_name": "ads", "retry_policy": {"retry_back_off": back_off}}}
                ],
            },
            "cds_config": ADS,
            "lds_config": ADS,
        },
        "static_resources": {
            "clusters": [
                {
                    "name": "ads",
                    "type": "STATIC",
                    "connect_timeout": "1s",
                    "typed_extension_protocol_options": {
                        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                            "@type": "type.googleapis.com/"
                            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                            "explicit_http_config": {"http2_protocol_options": {}},
                        }
                    },
                    "load_assignment": {
                        "cluster_name": "ads",
                        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": ads}}]}],
                    },
                }
            ]
        },
    }
    return msgspec.json.format(msgspec.json.encode(config), indent=2)


class Envoy:
    """This host's Envoy, working in `folder`, fed from `ads_address`."""

    def __init__(self, folder: Path, node: str, region: str, ads_address: str, clock: Clock) -> None:
        self._folder = folder.absolute()
        self._config = self._folder / "bootstrap.json"
        self._bootstrap = bootstrap(node, region, ads_address)
        self._clock = clock
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The running Envoy's process id, 0 if none runs."""
        return find(self._config)

    async def keep(self) -> None:
        """Have one Envoy run, for ever. `Unavailable` if there is no envoy program at all."""
        program = _program()
        back_off_s = RESTART_MIN_S
        while True:
            pid = await self._adopt_or_start(program)
            began_s = self._clock.monotonic_s()
            await _wait_exit(pid)
            if self._clock.monotonic_s() - began_s > SETTLED_S:
                back_off_s = RESTART_MIN_S
            log.error(
                "edge.envoy_ended", pid=pid, code=self._reap(), again_in_s=back_off_s, log=self._log_tail()
            )
            await asyncio.sleep(back_off_s)
            back_off_s = min(back_off_s * 2, RESTART_MAX_S)

    async def stop(self) -> None:
        """End Envoy: for taking the host down, never for ending flyd. Cancel `keep` first."""
        pid = await self._lock_or_pid()
        if not isinstance(pid, int):
            pid.close()
            return
        os.kill(pid, signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await _wait_exit(pid)
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            await _wait_exit(pid)
        self._reap()

    async def _adopt_or_start(self, program: str) -> int:
        found = await self._lock_or_pid()
        if isinstance(found, int):
            log.info("edge.envoy_adopted", pid=found)
            return found
        with found:
            return self._start(program, found.fileno())

    async def _lock_or_pid(self) -> BinaryIO | int:
        """The process id of the Envoy that lives, else the lock that the next one is to inherit."""
        self._folder.mkdir(parents=True, exist_ok=True)
        while True:
            lock = open(self._folder / "envoy.lock", "ab")  # noqa: SIM115 - the caller's to close
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except BlockingIOError:
                lock.close()
            if pid := self.pid:
                return pid
            await asyncio.sleep(ADOPT_RETRY_S)

    def _start(self, program: str, lock: int) -> int:
        self._config.write_bytes(self._bootstrap)
        command = [
            program,
            *("--config-path", str(self._config)),
            *("--admin-address-path", str(self._folder / "admin.address")),
            *("--log-path", str(self._folder / "envoy.log")),
            *("--log-level", "warning"),
            *("--concurrency", "1"),
            *("--drain-time-s", "0"),  # a replaced Postgres listener cuts its sessions at once
            "--disable-hot-restart",
        ]
        with open(self._folder / "envoy.out", "ab") as out:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                pass_fds=(lock,),
            )
        (self._folder / "envoy.pid").write_text(f"{self._child.pid}\n")
        log.info("edge.envoy_started", pid=self._child.pid)
        return self._child.pid

    def _reap(self) -> int | None:
        """The exit code, where it is known: only a process that we started tells us."""
        child, self._child = self._child, None
        return child.wait() if child else None

    def _log_tail(self) -> str:
        for name in ("envoy.log", "envoy.out"):
            path = self._folder / name
            if path.exists() and path.stat().st_size:
                return path.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
        return ""


def find(config: Path) -> int:
    """The process id of the Envoy that was started with this bootstrap file, 0 if none runs."""
    mark = f"\0--config-path\0{config}\0".encode()
    for entry in sorted(Path("/proc").iterdir()):
        if entry.name.isdigit() and mark in _command_line(entry):
            return int(entry.name)
    return 0


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()  # empty for a zombie
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""


def _program() -> str:
    beside = os.path.dirname(sys.executable)  # where the wheel puts it, also off PATH
    program = shutil.which("envoy") or shutil.which("envoy", path=beside)
    if program is None:
        raise Unavailable(
            f"there is no `envoy` program on PATH or in {beside}",
            hint="install Envoy 1.31 or newer, or flyd[local] for its wheel",
        )
    return program


async def _wait_exit(pid: int) -> None:
    """Return when the process has ended (it may be an unreaped child of ours)."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    loop.add_reader(fd, lambda: ended.done() or ended.set_result(None))
    try:
        await ended
    finally:
        loop.remove_reader(fd)
        os.close(fd)
