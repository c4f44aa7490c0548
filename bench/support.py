"""What the benchmarks share: a cluster of its own, its processes' use, and the line of JSON at the end.

Everything is measured on real parts: etcd, flyd, Envoy and Postgres as `fly cluster up`
starts them, on loopback networks that no other cluster of this machine uses. `local_cluster`
leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flyd.cluster.layout import layout
from flyd.cluster.local import LocalCluster
from flyd.cluster.processes import find_marked
from flyd.cluster.readiness import open_channel
from flyd.cluster.registry import user_folder
from flyd.model import Resources
from flyd.v1 import postgres_pb2, postgres_pb2_grpc

ROOT = Path(__file__).resolve().parent.parent
FLY = str(Path(sys.executable).parent / "fly")
REGIONS = ("ams", "iad", "sin")
CAPACITY = Resources(cpus=4, memory_mb=4096, disk_gb=50)
COMMAND_TIMEOUT_S = 180.0
POLL_S = 0.05


@contextmanager
def local_cluster(base: int) -> Generator[LocalCluster]:
    """Three regions of their own at 127.<base>.0.0/16 and the two after; gone at the end."""
    home = tempfile.mkdtemp(prefix="flyd-bench-")
    Path(home).chmod(0o755)  # Postgres runs as another user and must get through
    os.environ["FLYD_HOME"] = home
    cluster = LocalCluster(layout("bench", REGIONS, base, CAPACITY))
    os.environ["FLY_API"] = ",".join(cluster.plan.api)
    os.environ["FLY_IDENTITY"] = str(user_folder(cluster.plan.name))
    try:
        cluster.up(lambda _text: None)
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(home, ignore_errors=True)


def fly(*arguments: str, cwd: Path = ROOT) -> str:
    """Run `fly`; what it printed. A failure ends the benchmark with the command's own words."""
    done = subprocess.run(
        [FLY, *arguments], cwd=cwd, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
    )
    if done.returncode:
        sys.exit(f"fly {' '.join(arguments)} failed ({done.returncode}):\n{done.stderr}{done.stdout}")
    return done.stdout


def deploy_chat() -> None:
    """The example chat in three regions with a Postgres of three members, as the demo has it."""
    regions = ",".join(REGIONS)
    fly("postgres", "create", "chat-db", "--regions", regions)
    fly("apps", "create", "chat", "--regions", regions)
    fly("postgres", "attach", "chat-db", "--app", "chat")
    fly("deploy", cwd=ROOT / "examples" / "chat")


def postgres_status() -> dict[str, Any]:
    """What `fly postgres status` says of chat-db."""
    answer: dict[str, Any] = json.loads(fly("postgres", "status", "-a", "chat-db", "--json"))
    return answer


def connection_uri(cluster: LocalCluster, region: str) -> str:
    """A superuser's connection to chat-db through the edge of one region."""
    request = postgres_pb2.GetConnectionRequest(cluster_name="chat-db")
    with open_channel(cluster.plan.name, cluster.plan.host(region).address) as channel:
        answer = postgres_pb2_grpc.PostgresServiceStub(channel).GetConnection(request, timeout=5.0)
    return answer.uri


def wait_for(what: str, holds: Callable[[], bool], timeout_s: float, poll_s: float = POLL_S) -> float:
    """Wait until `holds`; how long it took. Past the deadline the benchmark ends."""
    began_s = time.monotonic()
    while not holds():
        if time.monotonic() - began_s > timeout_s:
            sys.exit(f"not within {timeout_s:g} s: {what}")
        time.sleep(poll_s)
    return time.monotonic() - began_s


def parts(cluster: LocalCluster) -> dict[int, str]:
    """The cluster's processes by what they are: pid -> "flyd ams-1", "envoy ams-1", ..."""
    found: dict[int, str] = {}
    for host in cluster.plan.hosts:
        for pid, command in find_marked(cluster.mark(host)).items():
            found[pid] = f"{_part(command)} {host.name}"
    return found


def _part(command: str) -> str:
    program = Path(command.split()[0]).name if command.split() else ""
    signs = (
        ("flyd.daemon", "flyd"),
        ("shim", "shim"),
        ("pgha", "pgha"),
        ("uvicorn", "chat"),
        ("killer", "pgha"),
    )
    return next((name for sign, name in signs if sign in command), program.rstrip(":") or "other")


def cpu_s(pid: int) -> float:
    """User and system time that a process has used; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mb(pid: int) -> float:
    """Resident memory of a process; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:")), 0.0)


def report(name: str, figures: Mapping[str, object], **conditions: object) -> None:
    """The last line of every benchmark."""
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "kernel": platform.release()}
    print(json.dumps({"name": name, "figures": dict(figures), "conditions": {**machine, **conditions}}))
