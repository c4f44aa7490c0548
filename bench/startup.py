"""How long things take to begin: commands, flyd, a machine.

    python bench/startup.py

Commands: wall time of the process, median of 5. flyd: from starting the process to the gRPC
health check saying SERVING, median of 5 on one host of three, its machines running on (it is
ended by SIGTERM before). A machine: CreateMachine to WaitMachine(started) through the API, from
a fresh source tree on its host, median of 10; the machine is one `sleep`.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import support
from flyd.cluster.local import LocalCluster
from flyd.cluster.readiness import open_channel, serves
from flyd.v1 import apps_pb2, apps_pb2_grpc, machines_pb2, machines_pb2_grpc

BASE = 125
ROUNDS = 5
MACHINES = 10
TIMEOUT_S = 30.0
POLL_S = 0.005


def timed_ms(act: Callable[[], object]) -> float:
    began_s = time.monotonic()
    act()
    return (time.monotonic() - began_s) * 1000


def command_ms(*arguments: str) -> float:
    """Median of a command's wall time, after one run that warms the disk's cache."""

    def run() -> None:
        subprocess.run([support.FLY, *arguments], check=True, capture_output=True, timeout=TIMEOUT_S)

    run()
    return statistics.median(timed_ms(run) for _ in range(ROUNDS))


def flyd_ms(cluster: LocalCluster) -> float:
    """Median of a flyd's start, from exec to serving."""
    host = cluster.plan.hosts[0]

    def start() -> None:
        cluster.start_flyd(host)
        support.wait_for("flyd serves", lambda: serves(cluster.plan.name, host.address), TIMEOUT_S, POLL_S)

    times: list[float] = []
    for _ in range(ROUNDS):
        os.kill(cluster.flyd_pid(host), signal.SIGTERM)
        support.wait_for("flyd ends", lambda: cluster.flyd_pid(host) == 0, TIMEOUT_S)
        times.append(timed_ms(start))
    return statistics.median(times)


def machine_ms(cluster: LocalCluster) -> float:
    """Median of a machine's creation and start, asked of its own host's flyd."""
    host = cluster.plan.hosts[1]
    times: list[float] = []
    with open_channel(cluster.plan.name, host.address) as channel:
        apps_pb2_grpc.AppsServiceStub(channel).CreateApp(
            apps_pb2.CreateAppRequest(app_name="bench", regions=[host.region]), timeout=TIMEOUT_S
        )
        machines = machines_pb2_grpc.MachinesServiceStub(channel)

        def create(number: int) -> str:
            config = machines_pb2.MachineConfig(image="host:", cmd=["sleep", "3600"])
            made = machines.CreateMachine(
                machines_pb2.CreateMachineRequest(
                    app_name="bench", name=f"m{number}", region=host.region, config=config
                ),
                timeout=TIMEOUT_S,
            ).machine
            machines.WaitMachine(
                machines_pb2.WaitMachineRequest(app_name="bench", machine_id=made.id, state="started"),
                timeout=TIMEOUT_S,
            )
            return made.id

        for number in range(MACHINES):
            began_s = time.monotonic()
            machine_id = create(number)
            times.append((time.monotonic() - began_s) * 1000)
            machines.DestroyMachine(
                machines_pb2.DestroyMachineRequest(app_name="bench", machine_id=machine_id, force=True),
                timeout=TIMEOUT_S,
            )
    return statistics.median(times)


def main() -> int:
    figures = {"fly_version_ms": command_ms("version"), "fly_help_ms": command_ms("--help")}
    with support.local_cluster(BASE) as cluster:
        figures["flyd_serving_ms"] = flyd_ms(cluster)
        figures["machine_started_ms"] = machine_ms(cluster)
    print(f"Medians of {ROUNDS} ({MACHINES} machines), wall time.\n")
    for name, value in figures.items():
        print(f"{name:<22}{value:>8.0f}")
    print()
    rounded = {name: round(value, 1) for name, value in figures.items()}
    support.report("startup", rounded, rounds=ROUNDS, machines=MACHINES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
