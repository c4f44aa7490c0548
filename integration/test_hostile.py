"""10,000 hostile calls against three real flyds: a typed status each, nothing breaks, nothing is left.

FLY_HOSTILE_SEED=n replays the calls of another run; a call that goes wrong is printed with its bytes.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from flyd.cluster import local, processes
from flyd.cluster.layout import API_PORT, ETCD_CLIENT_PORT, LocalHost
from flyd.identity.credentials import Credentials
from flyd.identity.folder import CERTIFICATE, KEY
from flyd.identity.subjects import ANY_HOST, host_dns_name
from flyd.machines import leases
from flyd.model import decode
from flyd.storage.records import DESTROYED, Destroyed
from flyd.store import keys
from integration.cluster import Fly, wait_for
from integration.hostile_calls import LARGEST_BYTES, REGIONS, Known
from integration.hostile_calls import Generator as Calls
from integration.hostile_outcome import Channels, is_typed, outcome, outcome_again
from integration.hostile_upkeep import Upkeep

pytestmark = pytest.mark.timeout(600)  # of which 60 s on a machine that does nothing else

BASE = 155
SEED = int(os.environ.get("FLY_HOSTILE_SEED", "20261123"))
CALLS = int(os.environ.get("FLY_HOSTILE_CALLS", "3000"))  # `make soak` sends 10,000
WARM_UP_CALLS = CALLS * 2 // 5
AT_ONCE = 32
OVERSIZED = (LARGEST_BYTES + 1, 8 * LARGEST_BYTES, 16 * LARGEST_BYTES)
# Of one flyd, from the warm-up's end to the last call's. After a short warm-up the high tide of calls at once
# is still to come, in one half of the rest or the other (47 MB seen); a leak of 27 KB a call grows in both.
MORE_MEMORY_MB = 24.0
SHORT = CALLS < 10_000
MORE_FILES = 40  # open at a flyd's: connections come and go
LOG_ERRORS = ("Traceback", "api.bug", "api.invariant_broken", "was never retrieved", "never awaited")
# What may be there afterwards: what hosts keep, tokens until they end, idempotency and volumes for a day.
KEPT = (
    keys.EVENTS,
    keys.TOKENS,
    keys.LEADERS,
    keys.SETTINGS,
    keys.ROOT + "requests/",
    leases.LEASES,  # of destroyed machines too: each ends with its time, a day at most
    keys.HOSTS,
    keys.ALIVE,
    keys.MEMBERSHIPS,
    keys.RESERVATIONS,
    DESTROYED,
)


class Victims:
    """Three hosts of processes, for these tests alone."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="flyd-hostile-"))
        self.home.chmod(0o755)
        self.name = self.home.name
        addresses = [f"127.{BASE + i}.0.1:{API_PORT}" for i in range(len(REGIONS))]
        self.fly = Fly(self.home, ",".join(addresses))
        os.environ["FLYD_HOME"] = self.fly.env["FLYD_HOME"]  # for LocalCluster
        self.fly("cluster", "up", "--name", self.name, "--base", str(BASE))
        self.local = local.LocalCluster.load(self.name)
        self.credentials = Credentials(self.home / "flyd" / "clusters" / self.name / "user")

    def pids(self) -> dict[str, int]:
        """Each flyd's."""
        return {host.name: self.local.flyd_pid(host) for host in self.local.plan.hosts}

    def memory_mb(self) -> dict[str, float]:
        """Each flyd's resident memory."""
        found: dict[str, float] = {}
        for name, pid in self.pids().items():
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            found[name] = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))
        return found

    def open_files(self) -> dict[str, int]:
        """How many each flyd has."""
        return {name: len(list(Path(f"/proc/{pid}/fd").iterdir())) for name, pid in self.pids().items()}

    def log_errors(self) -> list[str]:
        """Lines of the flyds' logs that no call may cause."""
        return [
            f"{host.name}: {line[:400]}"
            for host in self.local.plan.hosts
            for line in (self.local.root / host.name / "flyd.log").read_text(errors="replace").splitlines()
            if any(word in line for word in LOG_ERRORS)
        ]

    def etcd(self, prefix: str, what: str) -> list[str]:
        """The keys, or the values, under a prefix."""
        host = self.local.plan.hosts[0]
        identity = self.local.root / host.name / "data" / "identity"
        command = [
            *(Path(sys.executable).parent / "etcdctl", "get", prefix, "--prefix", what),
            *(
                "--endpoints",
                f"https://{host.address}:{ETCD_CLIENT_PORT}",
                "--cacert",
                identity / "hosts.pem",
            ),
            *("--cert", identity / CERTIFICATE, "--key", identity / KEY),
        ]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return [line for line in out.splitlines() if line]

    def stored(self) -> set[str]:
        """The keys in etcd that calls may make and must not leave."""
        return {key for key in self.etcd(keys.ROOT, "--keys-only") if not key.startswith(KEPT)}

    def kept_gb(self) -> Counter[str]:
        """The disk of destroyed volumes, which may be wanted back for a day, by host."""
        kept: Counter[str] = Counter()
        for text in self.etcd(DESTROYED, "--print-value-only"):
            volume = decode(text.encode(), Destroyed).volume
            kept[volume.host] += volume.size_gb
        return kept

    def leftovers(self) -> list[str]:
        """Files and folders of machines and half-received sources."""
        found: list[str] = []
        for host in self.local.plan.hosts:
            data = self.local.root / host.name / "data"
            for folder in ("machines", "sources/tmp"):
                found += [str(path) for path in (data / folder).glob("*")]
        return found

    def running(self) -> Counter[str]:
        """The programs that run of this cluster."""
        return Counter(
            Path(line.split()[0]).name for line in processes.find_marked(self.local.mark()).values()
        )

    def destroy(self) -> None:
        """End it; nothing may be left."""
        try:
            self.fly("cluster", "down", "--name", self.name)
        finally:
            processes.kill_marked(self.local.mark())
            shutil.rmtree(self.home)


@pytest.fixture(scope="module")
def victims() -> Generator[Victims]:
    """The cluster under attack."""
    before = os.environ.get("FLYD_HOME")
    made = Victims()
    try:
        yield made
    finally:
        made.destroy()
        if before is not None:
            os.environ["FLYD_HOME"] = before


class Attack:
    """Calls on all flyds at once, and what was answered."""

    def __init__(self, channels: list[Channels], calls: Calls) -> None:
        self._channels = channels
        self._calls = calls
        self.codes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.asked_again = (
            0  # this process serves 32 calls at once beside flyd: sometimes it is too late itself
        )
        self._next = 0

    async def run(self, until: int) -> None:
        """All calls up to a number."""
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(self._work(until))

    async def _work(self, until: int) -> None:
        while self._next < until:
            number, self._next = self._next, self._next + 1
            call = self._calls.call(number)
            channels = self._channels[number % len(self._channels)]
            code, said_by_flyd, details = await outcome(channels, call)
            late = code is grpc.StatusCode.DEADLINE_EXCEEDED and not is_typed(call, code, said_by_flyd)
            if late and not call.client_streams:
                self.asked_again += 1
                code, said_by_flyd, details = await asyncio.to_thread(outcome_again, channels, call)
            self.codes[code.name] += 1
            if not is_typed(call, code, said_by_flyd):
                self.wrong.append(f"{code.name} {details[:300]}: {call}")


async def send_oversized(channels: Channels) -> None:
    """Messages beyond what flyd takes, also in streams."""
    calls = Calls(SEED, Known())
    for number, size in enumerate(OVERSIZED * 3):
        call = calls.call(number * 7)
        large = replace(call, messages=(b"\x0a" + b"x" * size,), manner="whole", may_wait=False)
        code, _, details = await outcome(channels, large)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED, f"{code} {details}: {size} bytes to {call.method}"


def send_garbage(victims: Victims, host: LocalHost) -> None:
    """Bytes that are no HTTP/2, or no gRPC, from somebody with a good certificate."""
    folder = victims.credentials.folder
    context = ssl.create_default_context(cafile=str(folder / "hosts.pem"))
    context.load_cert_chain(folder / CERTIFICATE, folder / KEY)
    context.set_alpn_protocols(["h2"])
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for garbage in (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        os.urandom(4096),
        preface + os.urandom(4096),
        preface + b"\xff\xff\xff\x00\x00\x00\x00\x00\x00",  # a frame of 16 MB
        preface
        + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
        + b"\x00\x00\x05\x01\x04\x00\x00\x00\x01\xff\xff\xff\xff\xff",
        preface[:10],
    ):
        with (
            socket.create_connection((host.address, API_PORT), timeout=5) as plain,
            context.wrap_socket(plain, server_hostname=host_dns_name(ANY_HOST)) as secure,
        ):
            secure.sendall(garbage)
            secure.settimeout(0.2)
            try:
                secure.recv(4096)
            except OSError:
                continue


async def attack(victims: Victims) -> tuple[Attack, list[dict[str, float]]]:
    """All calls; each flyd's memory after the warm-up, half-way and at the end."""
    hosts = victims.local.plan.hosts
    channels = [Channels(victims.credentials, f"{host.address}:{API_PORT}") for host in hosts]
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(AT_ONCE))
    known = Known()
    upkeep = Upkeep(channels[0].steady, known)
    against = Attack(channels, Calls(SEED, known))
    memory: list[dict[str, float]] = []
    await upkeep.once()
    async with asyncio.TaskGroup() as group:
        tending = group.create_task(upkeep.keep())
        for until in (WARM_UP_CALLS, (WARM_UP_CALLS + CALLS) // 2, CALLS):
            for host, to in zip(hosts, channels, strict=True):
                await send_oversized(to)
                await asyncio.to_thread(send_garbage, victims, host)
            await against.run(until)  # behind the large messages, whose buffers are gone by its end
            memory.append(victims.memory_mb())
        tending.cancel()
    await upkeep.delete_all()
    for to in channels:
        await to.close()
    return against, memory


def wait_none(look: Callable[[], list[str]], what: str) -> None:
    """Return once nothing is left; say what is, if it stays."""
    try:
        wait_for(lambda: not look(), what)
    except AssertionError:
        assert look() == [], f"{what} are left"


def test_thousands_of_hostile_calls(victims: Victims, capsys: pytest.CaptureFixture[str]) -> None:
    pids, files, programs, stored = (
        victims.pids(),
        victims.open_files(),
        victims.running(),
        victims.stored(),
    )
    against, memory = asyncio.run(attack(victims))
    warm, half_way, after = memory
    with capsys.disabled():
        shown = ", ".join(f"{name} {count}" for name, count in against.codes.most_common())
        print(
            f"\nseed {SEED}: {sum(against.codes.values())} calls ({against.asked_again} asked again): {shown}"
        )
        for name in warm:
            print(f"{name}: " + " -> ".join(f"{then[name]:.1f} MB" for then in memory))
    assert not against.wrong, f"seed {SEED}, {len(against.wrong)} calls:\n" + "\n".join(against.wrong[:10])
    assert sum(against.codes.values()) == CALLS
    assert against.asked_again <= CALLS / 100
    assert against.codes["OK"] > CALLS / 20, "too few calls got as far as to be carried out"
    assert not victims.log_errors()
    assert victims.pids() == pids
    wait_none(lambda: sorted(victims.stored() - stored), "keys in etcd")
    wait_none(victims.leftovers, "files")
    wait_none(lambda: sorted((victims.running() - programs).elements()), "processes")
    for host in victims.fly("hosts", "list", "--json").json():
        held = {name: host[name] for name in ("state", "memory_mb_used", "disk_gb_used", "machine_count")}
        kept_gb = victims.kept_gb()[host["name"]]
        assert held == {"state": "up", "memory_mb_used": 0, "disk_gb_used": kept_gb, "machine_count": 0}
    grown = {
        name: min(half_way[name] - warm[name], after[name] - half_way[name])
        if SHORT
        else after[name] - warm[name]
        for name in warm
    }
    assert max(grown.values()) <= MORE_MEMORY_MB, grown
    assert all(count <= files[name] + MORE_FILES for name, count in victims.open_files().items())


def test_flyd_answers_as_ever(victims: Victims) -> None:
    fly = victims.fly
    fly("apps", "create", "after")
    for region in REGIONS:
        options = ("-a", "after", "--region", region, "--command", "sleep 60")
        made = fly("machine", "run", "host:", *options, "--json").json()
        assert fly("machine", "exec", made["id"], "--", "echo", "fine").out == "fine\n"
    fly("apps", "destroy", "after", "--yes")
    assert not victims.log_errors()
