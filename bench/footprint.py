"""What flyd costs its host with machines on it: memory, CPU at rest, the time of a start.

    python bench/footprint.py

Three regions as `fly cluster up` makes them. One host gets 100 machines (process driver, one `sleep`
each, without checks); its flyd's memory (VmRSS) before and after says what 100 machines cost, its CPU
(user + system, from /proc) over WINDOW_S without requests what they cost at rest. Then etcd gets
claims and statuses of 900 machines of a host that is no more, and the flyd is ended (SIGTERM) and
started ROUNDS times, its 100 machines running on: from exec until its API shows all 1,000 machines
(median; its CPU time too, which other work on this machine changes less).

Exit code 1 above 120 MB, 2 % of a core, 2 s.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import support
from flyd.cluster.layout import LocalHost
from flyd.cluster.local import LocalCluster
from flyd.cluster.readiness import open_channel
from flyd.identity.credentials import Credentials
from flyd.model import Machine, MachineStatus, decode, encode
from flyd.ports import Put
from flyd.store import keys
from flyd.store.etcd import EtcdKV
from flyd.v1 import apps_pb2, apps_pb2_grpc, machines_pb2, machines_pb2_grpc

BASE = 137
APP = "footprint"
MACHINES = 100
RECORDS = 1000
SETTLE_S = 8.0
WINDOW_S = 20.0
ROUNDS = 3
TIMEOUT_S = 120.0
MAX_RSS_MB = 120.0
MAX_CPU_PERCENT = 2.0
MAX_START_S = 2.0


class Api:
    """One host's flyd, asked over a connection that outlives its restarts."""

    def __init__(self, cluster: LocalCluster, host: LocalHost) -> None:
        self.channel = open_channel(cluster.plan.name, host.address)
        self.apps: Any = apps_pb2_grpc.AppsServiceStub(self.channel)
        self.machines: Any = machines_pb2_grpc.MachinesServiceStub(self.channel)

    def count(self, state: str = "") -> int:
        """Machines that it shows; none while it does not answer."""
        request = machines_pb2.ListMachinesRequest(app_name=APP, state=state)
        try:
            return len(self.machines.ListMachines(request, timeout=1.0).machines)
        except grpc.RpcError:
            return 0


def create_machines(api: Api, region: str) -> None:
    """A hundred, all started."""
    api.apps.CreateApp(apps_pb2.CreateAppRequest(app_name=APP, regions=[region]), timeout=TIMEOUT_S)
    guest = machines_pb2.MachineGuest(cpus=1, memory_mb=32)
    config = machines_pb2.MachineConfig(image="host:", cmd=["sleep", "3600"], guest=guest)
    support.wait_for("the app is known", lambda: APP in _apps(api), TIMEOUT_S)
    for number in range(MACHINES):
        request = machines_pb2.CreateMachineRequest(
            app_name=APP, name=f"m{number}", region=region, config=config
        )
        api.machines.CreateMachine(request, timeout=TIMEOUT_S)
    support.wait_for("all are started", lambda: api.count("started") == MACHINES, TIMEOUT_S)


def _apps(api: Api) -> list[str]:
    return [app.name for app in api.apps.ListApps(apps_pb2.ListAppsRequest(), timeout=TIMEOUT_S).apps]


async def put_records(cluster: LocalCluster, number: int) -> None:
    """Claims and statuses like those that are there, of a host that is no more."""
    identity = cluster.root / cluster.plan.hosts[0].name / "data" / "identity"
    kv = EtcdKV(cluster.plan.etcd, Credentials(identity))
    try:
        claim = decode((await kv.list(f"{keys.MACHINES}{APP}/")).items[0].value, Machine)
        status = decode((await kv.list(f"{keys.STATUS}{APP}/")).items[0].value, MachineStatus)
        puts: list[Put] = []
        for count in range(number):
            machine_id = f"record{count:08d}"
            other = msgspec.structs.replace(claim, id=machine_id, name=machine_id, host="gone")
            said = msgspec.structs.replace(status, id=machine_id, host="gone")
            puts.append(Put(keys.machine(APP, machine_id), encode(other)))
            puts.append(Put(keys.status(APP, machine_id), encode(said)))
        for first in range(0, len(puts), 100):
            await kv.txn((), puts[first : first + 100])
    finally:
        await kv.close()


def start_s(cluster: LocalCluster, host: LocalHost, api: Api) -> tuple[float, float]:
    """End the flyd and start it again: seconds from exec until it shows all machines, and of its CPU."""
    os.kill(cluster.flyd_pid(host), signal.SIGTERM)
    support.wait_for("flyd ends", lambda: cluster.flyd_pid(host) == 0, TIMEOUT_S)
    began_s = time.monotonic()
    cluster.start_flyd(host)
    while api.count() != RECORDS:
        if time.monotonic() - began_s > TIMEOUT_S:
            sys.exit(f"flyd does not show {RECORDS} machines after its start")
        api.channel.close()
        api = Api(cluster, host)  # at once, without the back-off of a connection that was refused
        time.sleep(0.01)
    return time.monotonic() - began_s, support.cpu_s(cluster.flyd_pid(host))


def main() -> int:
    with support.local_cluster(BASE) as cluster:
        host = cluster.plan.hosts[0]
        pid = cluster.flyd_pid(host)
        api = Api(cluster, host)
        time.sleep(SETTLE_S)
        before_mb = support.rss_mb(pid)
        create_machines(api, host.region)
        time.sleep(SETTLE_S)
        with_mb, cpu_s, began_s = support.rss_mb(pid), support.cpu_s(pid), time.monotonic()
        time.sleep(WINDOW_S)
        cpu_percent = (support.cpu_s(pid) - cpu_s) / (time.monotonic() - began_s) * 100
        asyncio.run(put_records(cluster, RECORDS - MACHINES))
        support.wait_for("all records are shown", lambda: api.count() == RECORDS, TIMEOUT_S)
        records_mb = support.rss_mb(pid)
        starts_s = [start_s(cluster, host, Api(cluster, host)) for _ in range(ROUNDS)]
        time.sleep(SETTLE_S)
        restarted_mb = support.rss_mb(cluster.flyd_pid(host))
    start, start_cpu = (statistics.median(column) for column in zip(*starts_s, strict=True))
    figures = {
        "rss_mb_without_machines": before_mb,
        f"rss_mb_with_{MACHINES}": with_mb,
        f"rss_mb_per_{MACHINES}": with_mb - before_mb,
        f"rss_mb_with_{RECORDS}_records": records_mb,
        "rss_mb_restarted": restarted_mb,
        f"cpu_percent_with_{MACHINES}": cpu_percent,
        f"start_s_with_{RECORDS}_records": start,
        f"start_cpu_s_with_{RECORDS}_records": start_cpu,
    }
    for name, value in figures.items():
        print(f"{name:<32}{value:>10.2f}")
    over = [
        name
        for name, breaks in {
            "memory": max(with_mb, records_mb, restarted_mb) > MAX_RSS_MB,
            "CPU": cpu_percent > MAX_CPU_PERCENT,
            "start": start > MAX_START_S,
        }.items()
        if breaks
    ]
    print(f"\n{'Over the limit: ' + ', '.join(over) if over else 'Within the limits.'}\n")
    support.report("footprint", {name: round(value, 2) for name, value in figures.items()}, window_s=WINDOW_S)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
