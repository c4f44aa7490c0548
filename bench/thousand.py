"""A thousand machines on 20 hosts, through the API of three real flyds over three real etcd members.

    python bench/thousand.py

What is real: etcd (3 members), flyd (3 processes with all their loops and their Envoy), mutual TLS
everywhere, gRPC, the placer, and for each of the 20 hosts the HostLoop with its statuses and a lease.
What is not: the 20 hosts' drivers and run logs are in memory (a machine starts at once), and their
loops run in one process with one connection to etcd and one mirror, as 20 flyds on 20 hosts would
not have to. The three flyds' own hosts are cordoned. Everything shares this machine's cores.

- create: 1,000 CreateMachine, CLIENTS at a time, a third of them to each flyd; from the first request to
  the last answer. Then until all of them are started.
- etcd writes: by how much etcd's revision has grown when all are started (a transaction is one);
  and entries of etcd's raft log, refused transactions included.
- list: ListMachines of the app, all 1,000 in one answer, decoded by the client; one after the other,
  round the flyds, at rest. Once more while machines' statuses change (informative).
- watch: a status is put into etcd; from before the put until a client of WatchMachines has it, of each
  of the three flyds; CHANGES_PER_S changes a second.

Exit code 1 if one of the limits below is broken.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import grpc.aio
import msgspec
import structlog

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import support
from flyd.cluster.layout import ETCD_CLIENT_PORT
from flyd.cluster.local import LocalCluster
from flyd.cluster.registry import user_folder
from flyd.hosts.membership import keep_membership
from flyd.identity.credentials import Credentials
from flyd.identity.folder import CERTIFICATE, HOSTS_CA, KEY
from flyd.identity.subjects import ANY_HOST, host_dns_name
from flyd.machines.host import HostLoop
from flyd.model import Host, MachineStatus, Resources, decode, encode
from flyd.store import keys
from flyd.store.etcd import EtcdKV
from flyd.store.memory import MemoryRunLog
from flyd.store.mirror import Mirror
from flyd.store.system import SystemClock, SystemEntropy
from flyd.v1 import apps_pb2, apps_pb2_grpc, machines_pb2, machines_pb2_grpc
from tests.support.host_world import FakeDriver, FakeSources, FakeVolumes

BASE = 131
APP = "thousand"
HOSTS = 20
MACHINES = 1000
CLIENTS = 48
LISTS = 300
CHANGES = 600
CHANGES_PER_S = 60
TIMEOUT_S = 60.0
MIN_CREATES_PER_S = 150
MAX_P99_MS = 100
MAX_WRITES = 4
MIRRORED = (keys.HOSTS, keys.ALIVE, keys.APPS, keys.SECRETS, keys.MACHINES, keys.STATUS, keys.VOLUMES)


# --------------------------------------------------------------------------- the 20 hosts, a process


def simulated(number: int) -> Host:
    return Host(
        name=f"simulated-{number:02d}",
        region=support.REGIONS[number % len(support.REGIONS)],
        api_address="127.0.0.1:1",
        address="127.0.0.1",
        subnet=f"10.{100 + number}",
        capacity=Resources(cpus=64, memory_mb=64 * 1024, disk_gb=100),
        driver="simulated",
        version="0",
    )


async def probe(_check: object, _address: str) -> tuple[bool, str]:
    return True, "ok"


async def run_hosts(endpoints: list[str], identity: Path) -> None:
    """Twenty hosts, until standard input ends."""
    kv = EtcdKV(endpoints, Credentials(identity))
    mirror = Mirror(kv, MIRRORED)
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(mirror.keep())]
        await mirror.wait_synced()
        for number in range(HOSTS):
            host = simulated(number)
            tasks.append(group.create_task(keep_membership(kv, host)))
            host_loop = HostLoop(
                host=host,
                kv=kv,
                mirror=mirror,
                driver=FakeDriver(),
                run_log=MemoryRunLog(),
                volumes=FakeVolumes(),
                sources=FakeSources(),
                clock=SystemClock(),
                entropy=SystemEntropy(),
                probe=probe,
            )
            tasks.append(group.create_task(host_loop.run()))
        await loop.run_in_executor(None, sys.stdin.read)
        for task in tasks:
            task.cancel()
    await kv.close()


# --------------------------------------------------------------------------- the clients


class Clients:
    """One channel to each flyd, with the user's certificate."""

    def __init__(self, cluster: LocalCluster) -> None:
        credentials = Credentials(user_folder(cluster.plan.name)).for_channel()
        name = (("grpc.ssl_target_name_override", host_dns_name(ANY_HOST)),)
        self.channels = [
            grpc.aio.secure_channel(address, credentials, options=name) for address in cluster.plan.api
        ]
        self.machines = [
            machines_pb2_grpc.MachinesServiceStub(cast(Any, channel)) for channel in self.channels
        ]
        self.apps: list[Any] = [
            apps_pb2_grpc.AppsServiceStub(cast(Any, channel)) for channel in self.channels
        ]

    async def close(self) -> None:
        for channel in self.channels:
            await channel.close(None)


async def create_app(clients: Clients) -> None:
    """The app, known to each flyd."""
    request = apps_pb2.CreateAppRequest(app_name=APP, regions=support.REGIONS)
    await clients.apps[0].CreateApp(request, timeout=TIMEOUT_S)
    for stub in clients.apps:
        while APP not in [app.name for app in (await stub.ListApps(apps_pb2.ListAppsRequest())).apps]:
            await asyncio.sleep(support.POLL_S)


async def create_all(clients: Clients) -> tuple[float, list[float]]:
    """Seconds for all, and each one's ms."""
    numbers = itertools.count()
    times_ms: list[float] = []

    async def client(stub: Any) -> None:
        while (number := next(numbers)) < MACHINES:
            began_s = time.monotonic()
            await stub.CreateMachine(
                machines_pb2.CreateMachineRequest(
                    app_name=APP,
                    name=f"m{number:04d}",
                    config=machines_pb2.MachineConfig(image="host:", cmd=["sleep", "3600"]),
                ),
                timeout=TIMEOUT_S,
            )
            times_ms.append((time.monotonic() - began_s) * 1000)

    began_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(client(clients.machines[number % len(clients.machines)]))
    return time.monotonic() - began_s, times_ms


async def wait_started(clients: Clients) -> None:
    """Watch until all machines are started."""
    started: dict[str, bool] = {}
    call = cast(Any, clients.machines[0]).WatchMachines(
        machines_pb2.WatchMachinesRequest(app_name=APP), timeout=TIMEOUT_S
    )
    async for news in call:
        started.update({machine.id: machine.state == "started" for machine in news.machines})
        if sum(started.values()) == MACHINES:
            call.cancel()
            return


async def list_all(clients: Clients) -> list[float]:
    """Each list's ms."""
    times_ms: list[float] = []
    for number in range(LISTS):
        stub = cast(Any, clients.machines[number % len(clients.machines)])
        began_s = time.monotonic()
        answer = await stub.ListMachines(machines_pb2.ListMachinesRequest(app_name=APP), timeout=TIMEOUT_S)
        times_ms.append((time.monotonic() - began_s) * 1000)
        assert len(answer.machines) == MACHINES
    return times_ms


async def change_statuses(kv: EtcdKV, sent_s: dict[str, float], changes: int) -> None:
    """Put statuses that differ in their detail alone, evenly in time."""
    items = (await kv.list(f"{keys.STATUS}{APP}/")).items
    loop = asyncio.get_running_loop()
    first_s = loop.time()
    for number in range(changes):
        await asyncio.sleep(first_s + number / CHANGES_PER_S - loop.time())
        item = items[number * 7 % len(items)]
        mark = f"change {number}"
        status = msgspec.structs.replace(decode(item.value, MachineStatus), detail=mark)
        sent_s[mark] = time.monotonic()
        await kv.put(item.key, encode(status))


async def watch_delays(clients: Clients, kv: EtcdKV) -> list[float]:
    """Ms from before each put until each flyd's watcher has it."""
    sent_s: dict[str, float] = {}
    delays_ms: list[float] = []

    async def watch(stub: Any, ready: asyncio.Event) -> None:
        seen: dict[str, None] = {}
        call = stub.WatchMachines(machines_pb2.WatchMachinesRequest(app_name=APP), timeout=TIMEOUT_S)
        async for news in call:
            now_s = time.monotonic()
            ready.set()
            for machine in news.machines:
                if machine.detail in sent_s and machine.detail not in seen:
                    seen[machine.detail] = None
                    delays_ms.append((now_s - sent_s[machine.detail]) * 1000)
            if len(seen) == CHANGES:
                call.cancel()
                return

    async with asyncio.TaskGroup() as group:
        events = [asyncio.Event() for _ in clients.machines]
        for stub, event in zip(clients.machines, events, strict=True):
            group.create_task(watch(stub, event))
        for event in events:
            await event.wait()
        await change_statuses(kv, sent_s, CHANGES)
    return delays_ms


# --------------------------------------------------------------------------- the run


def raft_entries(cluster: LocalCluster, identity: Path) -> int:
    """Proposals that etcd's members have committed: all that went through the raft log."""
    trust = ssl.create_default_context(cafile=identity / HOSTS_CA)
    trust.load_cert_chain(identity / CERTIFICATE, identity / KEY)
    trust.check_hostname = False
    url = f"https://{cluster.plan.hosts[0].address}:{ETCD_CLIENT_PORT}/metrics"
    with urllib.request.urlopen(url, context=trust) as answer:
        lines = answer.read().decode().splitlines()
    name = "etcd_server_proposals_committed_total"
    return int(float(next(line.split()[1] for line in lines if line.startswith(name + " "))))


async def wait_hosts(cluster: LocalCluster, kv: EtcdKV) -> None:
    """The 20 hosts have joined, and the three that flyd runs on are cordoned."""
    for local in cluster.plan.hosts:
        record = await kv.get(keys.host(local.name))
        assert record is not None
        host = msgspec.structs.replace(decode(record.value, Host), cordoned=True)
        await kv.put(record.key, encode(host))
    while len((await kv.list(keys.ALIVE)).items) < HOSTS + len(cluster.plan.hosts):
        await asyncio.sleep(support.POLL_S)


@contextmanager
def simulated_hosts(cluster: LocalCluster) -> Generator[int]:
    """The process of the 20 hosts; its pid."""
    command = [sys.executable, __file__, "--hosts", str(identity_of(cluster)), *cluster.plan.etcd]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        yield process.pid
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(TIMEOUT_S)


def identity_of(cluster: LocalCluster) -> Path:
    """The first host's: etcd speaks to hosts alone."""
    return cluster.root / cluster.plan.hosts[0].name / "data" / "identity"


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


async def measure(cluster: LocalCluster, hosts_pid: int) -> dict[str, float]:
    identity = identity_of(cluster)
    kv = EtcdKV(cluster.plan.etcd, Credentials(identity))
    clients = Clients(cluster)
    figures: dict[str, float] = {}
    pids = {host.name: cluster.flyd_pid(host) for host in cluster.plan.hosts}
    try:
        await wait_hosts(cluster, kv)
        await create_app(clients)
        before = (await kv.list(keys.ALIVE)).revision, raft_entries(cluster, identity)
        cpu_s = {name: support.cpu_s(pid) for name, pid in pids.items()}
        hosts_cpu_s = support.cpu_s(hosts_pid)
        began_s = time.monotonic()
        created_s, creates_ms = await create_all(clients)
        await wait_started(clients)
        started_s = time.monotonic() - began_s
        revision, entries = (await kv.list(keys.ALIVE)).revision, raft_entries(cluster, identity)
        figures["creates_per_s"] = MACHINES / created_s
        figures["create_p50_ms"] = quantile(creates_ms, 0.5)
        figures["create_p99_ms"] = quantile(creates_ms, 0.99)
        figures["all_started_s"] = started_s
        figures["etcd_writes_per_create"] = (revision - before[0]) / MACHINES
        figures["raft_entries_per_create"] = (entries - before[1]) / MACHINES
        used_s = sum(support.cpu_s(pid) - cpu_s[name] for name, pid in pids.items())
        figures["flyd_cpu_ms_per_create"] = used_s * 1000 / MACHINES
        figures["hosts_cpu_ms_per_create"] = (support.cpu_s(hosts_pid) - hosts_cpu_s) * 1000 / MACHINES
        lists_ms = await list_all(clients)
        figures["list_p50_ms"] = quantile(lists_ms, 0.5)
        figures["list_p99_ms"] = quantile(lists_ms, 0.99)
        async with asyncio.TaskGroup() as group:
            changing = group.create_task(change_statuses(kv, {}, CHANGES * 100))
            busy_ms = await list_all(clients)
            changing.cancel()
        figures["busy_list_p99_ms"] = quantile(busy_ms, 0.99)
        delays_ms = await watch_delays(clients, kv)
        figures["watch_p50_ms"] = quantile(delays_ms, 0.5)
        figures["watch_p99_ms"] = quantile(delays_ms, 0.99)
        figures["flyd_rss_mb"] = max(support.rss_mb(pid) for pid in pids.values())
    finally:
        await clients.close()
        await kv.close()
    return figures


def main() -> int:
    if sys.argv[1:2] == ["--hosts"]:
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
        asyncio.run(run_hosts(sys.argv[3:], Path(sys.argv[2])))
        return 0
    with support.local_cluster(BASE) as cluster, simulated_hosts(cluster) as hosts_pid:
        figures = asyncio.run(measure(cluster, hosts_pid))
    print(
        f"{MACHINES} machines on {HOSTS} hosts, {CLIENTS} clients, 3 flyds, 3 etcd members; "
        f"{LISTS} lists of all, {CHANGES} changes at {CHANGES_PER_S}/s to 3 watchers.\n"
    )
    for name, value in figures.items():
        print(f"{name:<26}{value:>10.1f}")
    broken = [
        name
        for name, holds in {
            "creates_per_s": figures["creates_per_s"] >= MIN_CREATES_PER_S,
            "list_p99_ms": figures["list_p99_ms"] <= MAX_P99_MS,
            "watch_p99_ms": figures["watch_p99_ms"] <= MAX_P99_MS,
            "etcd_writes_per_create": figures["etcd_writes_per_create"] <= MAX_WRITES,
        }.items()
        if not holds
    ]
    print(f"\n{'Over the limit: ' + ', '.join(broken) if broken else 'Within the limits.'}\n")
    rounded = {name: round(value, 2) for name, value in figures.items()}
    support.report("thousand", rounded, hosts=HOSTS, machines=MACHINES, clients=CLIENTS)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
