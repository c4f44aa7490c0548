"""What flyd adds to Docker: a machine through the API against the same container by `docker`, in pairs.

    python bench/docker_machine.py

One host of its own, on this machine's engine: a single etcd member, one flyd, no edge, no mesh. Each pair
makes and starts a container of flyd-base:bookworm (scripts/base-image.sh) twice, on the same network: with
`docker run -d`, the whole command, and with CreateMachine and WaitMachine(started) on an open channel. Both
are then stopped and started again: `docker start` against StartMachine and WaitMachine(started). Who is
first changes with each pair. Exit code 1 if the median overhead (of the medians, or of the pairs'
differences, whichever is greater) is over 120 ms for create and start, or over 60 ms for a start.

Refused on an engine that already holds images of a flyd's: this one's would think them forgotten.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import support
from flyd.cluster import processes
from flyd.cluster.identities import write_files, write_identities
from flyd.cluster.layout import Layout, LocalHost, etcd_command
from flyd.cluster.readiness import open_channel, serves
from flyd.cluster.registry import user_folder
from flyd.hosts.config import HostConfig, config_text
from flyd.images.engine import MARK
from flyd.model.image import IMAGE_PREFIX
from flyd.v1 import apps_pb2, apps_pb2_grpc, machines_pb2, machines_pb2_grpc

PAIRS = 20
WARM_UP = 1
MAX_CREATE_MS = 120.0
MAX_START_MS = 60.0
IMAGE = "flyd-base:bookworm"
COMMAND = ("sleep", "1000")
APP = "bench"
TIMEOUT_S = 30.0
START_TIMEOUT_S = 60.0

HOST = LocalHost(
    name=f"bench-{os.getpid()}",
    region="ams",
    subnet="10.141",
    capacity=support.CAPACITY,
    public_address="127.131.0.1",
)
PLAN = Layout(name="bench", base=131, hosts=(HOST,), provider="docker")
NETWORK = f"flyd-{HOST.name}"
PLAIN = f"flyd-{HOST.name}-plain"
PLAIN_ADDRESS = f"{HOST.subnet}.255.1"  # far from those that flyd gives

NAMES = {
    "docker_run": "docker run -d",
    "create": "CreateMachine to started",
    "docker_start": "docker start",
    "start": "StartMachine to started",
}


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def config(data_dir: Path) -> str:
    return config_text(
        HostConfig(
            name=HOST.name,
            region=HOST.region,
            address=HOST.private_address,
            public_address=HOST.address,
            subnet=HOST.subnet,
            etcd=PLAN.etcd,
            data_dir=str(data_dir),
            driver="docker",
            http_port=0,
            capacity=HOST.capacity,
        )
    )


@contextmanager
def one_host(image_id: str) -> Generator[None]:
    """etcd and flyd on this machine's engine; processes, containers, network and marks gone at the end."""
    if marked := docker("images", "-q", MARK):
        sys.exit(f"this engine holds a flyd's images ({', '.join(marked.split())}): not here")
    root = Path(tempfile.mkdtemp(prefix="flyd-bench-"))
    mark = str(root)
    os.environ["FLYD_HOME"] = mark  # where this machine's own identity in the cluster is kept
    binary = str(Path(sys.executable).parent / "etcd")
    (root / "flyd.toml").write_text(config(root / "data"))
    try:
        identity = root / "data" / "identity"
        write_identities(PLAN, lambda _, files: write_files(identity, files), user_folder(PLAN.name))
        etcd = etcd_command(binary, PLAN, HOST, root / "etcd", identity)
        processes.start_detached(etcd, os.environ, root / "etcd.log", mark)
        flyd = [sys.executable, "-m", "flyd.daemon", "--config", str(root / "flyd.toml")]
        environment = {**os.environ, "PYTHONPATH": str(support.ROOT)}
        processes.start_detached(flyd, environment, root / "flyd.log", mark)
        support.wait_for("flyd serves", lambda: serves(PLAN.name, HOST.address), START_TIMEOUT_S)
        yield
    except BaseException:
        if (log := root / "flyd.log").exists():
            print(log.read_text()[-2000:], file=sys.stderr)
        raise
    finally:
        processes.kill_marked(mark)
        own = docker("ps", "-aq", "--filter", f"network={NETWORK}").split()
        for thing in (
            ["rm", "-f", *own] if own else [],
            ["network", "rm", NETWORK],
            ["rmi", _mark(image_id)],
        ):
            if thing:
                subprocess.run(["docker", *thing], check=False, capture_output=True)
        shutil.rmtree(root)


def _mark(image_id: str) -> str:
    return f"{MARK}:{image_id}"


@dataclass(frozen=True)
class Api:
    """The calls of one machine after the other, each ended by what it waits for."""

    machines: machines_pb2_grpc.MachinesServiceStub
    image: str

    def create(self, number: int) -> str:
        made = self.machines.CreateMachine(
            machines_pb2.CreateMachineRequest(
                app_name=APP,
                name=f"m{number}",
                region=HOST.region,
                config=machines_pb2.MachineConfig(image=self.image, cmd=COMMAND),
            ),
            timeout=TIMEOUT_S,
        ).machine
        self.wait(made.id, "started")
        return made.id

    def start(self, machine_id: str) -> None:
        request = machines_pb2.StartMachineRequest(app_name=APP, machine_id=machine_id)
        self.machines.StartMachine(request, timeout=TIMEOUT_S)
        self.wait(machine_id, "started")

    def stop(self, machine_id: str) -> None:
        request = machines_pb2.StopMachineRequest(app_name=APP, machine_id=machine_id)
        self.machines.StopMachine(request, timeout=TIMEOUT_S)
        self.wait(machine_id, "stopped")

    def destroy(self, machine_id: str) -> None:
        request = machines_pb2.DestroyMachineRequest(app_name=APP, machine_id=machine_id, force=True)
        self.machines.DestroyMachine(request, timeout=TIMEOUT_S)
        self.wait(machine_id, "destroyed")

    def wait(self, machine_id: str, state: str) -> None:
        request = machines_pb2.WaitMachineRequest(app_name=APP, machine_id=machine_id, state=state)
        self.machines.WaitMachine(request, timeout=TIMEOUT_S)


def timed_ms(act: Callable[[], object]) -> float:
    began_s = time.monotonic()
    act()
    return (time.monotonic() - began_s) * 1000


def must_run(*containers: str) -> None:
    """What was measured as started has to run."""
    for container in containers:
        if docker("inspect", "--format", "{{.State.Running}}", container) != "true":
            sys.exit(f"{container} does not run")


def pair(api: Api, number: int) -> dict[str, float]:
    """One container of each kind, made, stopped, started again and removed."""
    taken: dict[str, float] = {}
    machine_id = ""

    def run_plain() -> None:
        docker("run", "-d", "--name", PLAIN, "--network", NETWORK, "--ip", PLAIN_ADDRESS, IMAGE, *COMMAND)

    def create() -> None:
        nonlocal machine_id
        machine_id = api.create(number)

    def measure(name: str, plain: Callable[[], object], ours_name: str, ours: Callable[[], object]) -> None:
        both = ((name, plain), (ours_name, ours))
        for key, act in both if number % 2 else reversed(both):
            taken[key] = timed_ms(act)
        must_run(PLAIN, f"flyd-{machine_id}")

    measure("docker_run", run_plain, "create", create)
    docker("kill", PLAIN)
    api.stop(machine_id)
    measure("docker_start", lambda: docker("start", PLAIN), "start", lambda: api.start(machine_id))
    docker("rm", "-f", PLAIN)
    api.destroy(machine_id)
    return taken


def overhead_ms(ours: list[float], plain: list[float]) -> float:
    """The greater of the two ways to say it."""
    of_medians = statistics.median(ours) - statistics.median(plain)
    of_pairs = statistics.median(a - b for a, b in zip(ours, plain, strict=True))
    return max(of_medians, of_pairs)


def measured() -> dict[str, list[float]]:
    image_id = docker("image", "inspect", "--format", "{{.Id}}", IMAGE).removeprefix("sha256:")
    with one_host(image_id), open_channel(PLAN.name, HOST.address) as channel:
        apps_pb2_grpc.AppsServiceStub(channel).CreateApp(
            apps_pb2.CreateAppRequest(app_name=APP, regions=[HOST.region]), timeout=TIMEOUT_S
        )
        api = Api(machines_pb2_grpc.MachinesServiceStub(channel), IMAGE_PREFIX + image_id)
        pairs = [pair(api, number) for number in range(WARM_UP + PAIRS)][WARM_UP:]
    return {key: [taken[key] for taken in pairs] for key in NAMES}


def main() -> int:
    subprocess.run([str(support.ROOT / "scripts" / "base-image.sh")], check=True)
    load_before = os.getloadavg()[0]
    taken = measured()
    print(f"{PAIRS} pairs; milliseconds.\n")
    print(f"{'':<28}{'MIN':>8}{'MEDIAN':>8}{'MAX':>8}")
    for key, name in NAMES.items():
        values = taken[key]
        print(f"{name:<28}{min(values):>8.0f}{statistics.median(values):>8.0f}{max(values):>8.0f}")
    create_ms = overhead_ms(taken["create"], taken["docker_run"])
    start_ms = overhead_ms(taken["start"], taken["docker_start"])
    print(f"\noverhead: create and start {create_ms:.0f} ms (at most {MAX_CREATE_MS:.0f}), ", end="")
    print(f"start {start_ms:.0f} ms (at most {MAX_START_MS:.0f})\n")
    figures = {f"{key}_ms": round(statistics.median(values), 1) for key, values in taken.items()}
    figures |= {"create_overhead_ms": round(create_ms, 1), "start_overhead_ms": round(start_ms, 1)}
    support.report(
        "docker_machine",
        figures,
        pairs=PAIRS,
        max_create_ms=MAX_CREATE_MS,
        max_start_ms=MAX_START_MS,
        load_before=round(load_before, 2),
    )
    return 1 if create_ms > MAX_CREATE_MS or start_ms > MAX_START_MS else 0


if __name__ == "__main__":
    sys.exit(main())
