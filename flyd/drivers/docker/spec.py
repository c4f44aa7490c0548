"""What a machine is in the Docker engine's own words, and what the engine's words say of a machine.

Owns the names, labels and settings of the containers and of the network that flyd makes, and the
reading of what the engine tells of them. Invariants: the same spec gives the same container, and
another spec another digest (label `flyd.spec`), so that a changed machine is made anew; the labels
alone are enough to know a container again without flyd's database.

Pure. Called by driver.py and engine.py.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec

from flyd.errors import InvalidInput
from flyd.model import OWN_IMAGE, ExitStatus, Guest, LogLine, MachineSpec, Observed, Value
from flyd.network.addresses import address6, bridge, mac, network6

LABEL_MACHINE = "flyd.machine"
LABEL_APP = "flyd.app"
LABEL_INSTANCE = "flyd.instance"
LABEL_HOST = "flyd.host"
LABEL_SPEC = "flyd.spec"

IMAGE_PREFIX = "image:"
FOREIGN_PREFIXES = ("source:", OWN_IMAGE)  # what the process driver runs
OWN_ADDRESS_NAME = "fly-local-6pn"  # the machine's own private address, in its /etc/hosts

LOG_MAX_SIZE = "8m"  # each of a machine's log files
LOG_MAX_FILES = "2"
CPU_SHARES = 1024  # of one whole CPU, when CPUs are scarce
SHARED_PART = 16  # a shared CPU is sure of this part of one
NANO = 1_000_000_000
MIB = 1024 * 1024
SHM_PART = 2  # of a machine's memory may be shared memory, as on a machine of its own
EXIT_SIGNALLED = 128  # plus the signal's number, as init and shells say it


class HostNetwork(Value, frozen=True, kw_only=True):
    """The network of one host's machines: a bridge with the host's /16 and /64."""

    host_name: str
    subnet: str  # first octets, e.g. "10.211"
    gateway: str  # the host's own address on the bridge; flyd answers DNS there
    mtu: int = 1500

    @property
    def name(self) -> str:
        """The network's name in the engine."""
        return f"flyd-{self.host_name}"

    @property
    def cidr(self) -> str:
        """The subnet as the engine and the kernel write it."""
        return f"{self.subnet}.0.0/16"

    @property
    def cidr6(self) -> str:
        """The same in IPv6."""
        return str(network6(self.subnet))

    @property
    def gateway6(self) -> str:
        """The host's own IPv6 address on the bridge."""
        return str(network6(self.subnet)[1])

    @property
    def bridge(self) -> str:
        """The bridge's name in the kernel, for routes and nftables (at most 15 characters)."""
        return bridge(self.host_name)


class OwnPrograms(Value, frozen=True, kw_only=True):
    """How flyd's own programs (pgha) run in a container: its installation, mounted on a plain image."""

    image: str
    folders: tuple[str, ...]  # mounted read-only where they are
    env: dict[str, str]


class Seen(Value, frozen=True, kw_only=True):
    """One container of flyd's, as the engine describes it."""

    container_id: str
    machine_id: str
    app: str
    instance_id: str
    spec_digest: str
    running: bool
    ever_started: bool
    pid: int
    started_at: str  # as the engine writes it: names this run of the container
    finished_at_s: float
    exit_code: int
    oom_killed: bool

    @property
    def run_key(self) -> str:
        """Names one run of the machine, also after flyd's restart."""
        return f"{self.container_id} {self.started_at}"

    @property
    def started_ns(self) -> int:
        """When this run began, by the engine's clock."""
        return nanoseconds(self.started_at)


def container_name(machine_id: str) -> str:
    """The container of a machine."""
    return f"flyd-{machine_id}"


def image_reference(spec: MachineSpec) -> str:
    """The image as the engine knows it: an id, a digest or a name with a tag."""
    reference = spec.image.removeprefix(IMAGE_PREFIX)
    if not reference or reference.startswith(FOREIGN_PREFIXES):
        raise InvalidInput(
            f"machine {spec.machine_id} of app {spec.app} has no container image but "
            f"{spec.image or 'nothing'!r}, and this host runs machines in Docker",
            hint="Deploy with a Dockerfile or with `[build] image = ...` in fly.toml.",
        )
    return reference


def network_options(network: HostNetwork) -> dict[str, str]:
    """What the bridge is told: a name that the kernel's rules can use, and an MTU that fits the mesh."""
    return {
        "com.docker.network.bridge.name": network.bridge,
        "com.docker.network.bridge.enable_ip_masquerade": "false",  # flyd/network/firewall.py does that
        "com.docker.network.driver.mtu": str(network.mtu),
    }


def container_body(
    spec: MachineSpec, network: HostNetwork, base_env: Mapping[str, str], own: OwnPrograms | None = None
) -> dict[str, Any]:
    """The request that makes the machine's container."""
    _check(spec)
    environment = {**base_env, **spec.env}
    mounts = [{"Type": "bind", "Source": s, "Target": t} for s, t in spec.mounts]
    if own is not None and spec.image == OWN_IMAGE:
        environment |= own.env
        mounts += [{"Type": "bind", "Source": f, "Target": f, "ReadOnly": True} for f in own.folders]
    body: dict[str, Any] = {
        "Image": own.image if own is not None and spec.image == OWN_IMAGE else image_reference(spec),
        "Hostname": spec.machine_id,
        "Env": [f"{name}={environment[name]}" for name in sorted(environment)],
        "Labels": {
            LABEL_MACHINE: spec.machine_id,
            LABEL_APP: spec.app,
            LABEL_INSTANCE: spec.instance_id,
            LABEL_HOST: network.host_name,
        },
        "HostConfig": {
            "Init": True,  # signals end a program that has no handler for them, and orphans are reaped
            "NetworkMode": network.name,
            "Dns": [network.gateway],
            "ExtraHosts": [f"{OWN_ADDRESS_NAME}:{spec.private_ip}"] if spec.private_ip else [],
            "RestartPolicy": {"Name": "no"},  # flyd restarts
            "LogConfig": {
                "Type": "json-file",
                "Config": {"max-size": LOG_MAX_SIZE, "max-file": LOG_MAX_FILES},
            },
            # A bind whose source is missing is refused; the engine's older `Binds` would make an empty one.
            "Mounts": mounts,
            **_limits(spec.guest),
        },
        "NetworkingConfig": {"EndpointsConfig": {network.name: _endpoint(spec.private_ip)}},
    }
    if spec.command:
        body["Cmd"] = list(spec.command)
    if spec.user:
        body["User"] = spec.user
    body["Labels"][LABEL_SPEC] = _digest(body)
    return body


def spec_digest(body: Mapping[str, Any]) -> str:
    """Which spec a container was made from."""
    return body["Labels"][LABEL_SPEC]


def seen(inspected: Mapping[str, Any]) -> Seen:
    """A container as `docker inspect` shows it."""
    labels: Mapping[str, str] = inspected["Config"]["Labels"] or {}
    state = inspected["State"]
    return Seen(
        container_id=inspected["Id"],
        machine_id=labels.get(LABEL_MACHINE, ""),
        app=labels.get(LABEL_APP, ""),
        instance_id=labels.get(LABEL_INSTANCE, ""),
        spec_digest=labels.get(LABEL_SPEC, ""),
        running=state["Running"],
        ever_started=nanoseconds(state["StartedAt"]) > 0,
        pid=state["Pid"],
        started_at=state["StartedAt"],
        finished_at_s=nanoseconds(state["FinishedAt"]) / NANO,
        exit_code=state["ExitCode"],
        oom_killed=state["OOMKilled"],
    )


def observed(container: Seen, requested: bool) -> Observed:
    """A container as the driver's caller sees it; `requested`: its last run was stopped by flyd."""
    ended = container.ever_started and not container.running
    return Observed(
        machine_id=container.machine_id,
        instance_id=container.instance_id,
        running=container.running,
        pid=container.pid,
        started_at_s=container.started_ns / NANO if container.ever_started else 0.0,
        exit=_exit_status(container, requested) if ended else None,
    )


def nanoseconds(stamp: str) -> int:
    """A time as the engine writes it, since the epoch; 0 for its `0001-01-01T00:00:00Z` (never)."""
    whole, _, fraction = stamp.rstrip("Z").partition(".")
    seconds = int(datetime.fromisoformat(whole + "+00:00").timestamp())
    return seconds * NANO + int(fraction.ljust(9, "0")[:9] or 0) if seconds > 0 else 0


def log_line(machine_id: str, message: bytes) -> tuple[str, LogLine]:
    """One message of the engine's log (`<time> <text>`) as a line, with the time as written."""
    stamp, _, text = message.partition(b" ")
    written = stamp.decode("ascii", "replace")
    line = LogLine(
        machine_id=machine_id,
        at_s=nanoseconds(written) / NANO,
        text=text.rstrip(b"\r\n").decode("utf-8", "replace"),
    )
    return written, line


def _limits(guest: Guest) -> dict[str, Any]:
    """Memory is a hard limit without swap; a performance CPU is had whole, a shared one only if free."""
    memory_bytes = guest.memory_mb * MIB
    limits: dict[str, Any] = {
        "Memory": memory_bytes,
        "MemorySwap": memory_bytes,
        "ShmSize": memory_bytes // SHM_PART,
    }
    if guest.cpu_kind == "performance":
        return {**limits, "NanoCpus": guest.cpus * NANO, "CpuShares": guest.cpus * CPU_SHARES}
    return {**limits, "CpuShares": guest.cpus * CPU_SHARES // SHARED_PART}


def _exit_status(container: Seen, requested: bool) -> ExitStatus:
    number = container.exit_code - EXIT_SIGNALLED
    by_signal = number in frozenset(s.value for s in signal.Signals)
    return ExitStatus(
        code=None if by_signal else container.exit_code,
        signal=number if by_signal else None,
        oom_killed=container.oom_killed,
        requested=requested,
        at_s=container.finished_at_s,
    )


def _endpoint(address: str) -> dict[str, Any]:
    """A machine's addresses, all by its IPv4 one. Engines before 25 choose this MAC address by themselves."""
    if not address:
        return {}
    both = {"IPv4Address": address, "IPv6Address": address6(address)}
    return {"IPAMConfig": both, "MacAddress": mac(address)}


def _check(spec: MachineSpec) -> None:
    texts = (*spec.command, *spec.env, *spec.env.values())
    if any("\0" in text for text in texts):
        raise InvalidInput(f"a NUL byte in the command or environment of machine {spec.machine_id}")
    if any("=" in name or not name for name in spec.env):
        raise InvalidInput(f"a variable of machine {spec.machine_id} has no name, or one with '=' in it")


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(msgspec.json.encode(body, order="sorted")).hexdigest()[:16]
