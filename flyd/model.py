"""The nouns of the product, as frozen values.

Everything that is stored in etcd or in a host's run log, and everything that decisions
read, is one of these. They are encoded as JSON by `encode`/`decode` (unknown fields are
ignored, so an older flyd can read a newer one's records). No behaviour lives here beyond
what follows from the value itself; nothing here reads a clock or makes an id.

Field names and meanings follow Fly's Machines API where there is one.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


def encode(value: msgspec.Struct) -> bytes:
    """A value as JSON."""
    return msgspec.json.encode(value)


def decode(data: bytes, kind: type[T]) -> T:
    """JSON as a value of `kind`; raises msgspec.ValidationError with the path of a wrong field."""
    return msgspec.json.decode(data, type=kind)


class Value(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of all stored values."""


# --------------------------------------------------------------------------- machine configuration


class Guest(Value, frozen=True, kw_only=True):
    """The size of a machine."""

    cpus: int = 1
    memory_mb: int = 256
    cpu_kind: str = "shared"


class RestartPolicy(Value, frozen=True, kw_only=True):
    """When a machine whose process ended is started again. `no`, `on-failure` or `always`."""

    policy: str = "on-failure"
    max_retries: int = 10  # within RESTART_WINDOW_S (flyd/machines/restart.py)


class StopConfig(Value, frozen=True, kw_only=True):
    """How a machine is asked to end, and how long it may take before SIGKILL."""

    signal: str = "SIGINT"
    timeout_s: float = 5.0


class Mount(Value, frozen=True, kw_only=True):
    """A volume at a path. `volume` is its id once placed; `name` is what fly.toml says."""

    path: str
    volume: str = ""
    name: str = ""
    size_gb: int = 1


class Check(Value, frozen=True, kw_only=True):
    """A health check, run by the machine's host against its private address."""

    kind: str  # "tcp" or "http"
    port: int
    interval_s: float = 15.0
    timeout_s: float = 2.0
    grace_period_s: float = 1.0
    method: str = "GET"
    path: str = "/"
    protocol: str = "http"
    headers: dict[str, str] = {}


class ServicePort(Value, frozen=True, kw_only=True):
    """A port on the edge. Handlers: `http`, `tls`, `pg_tls`, `proxy_proto`; none is raw TCP."""

    port: int
    handlers: tuple[str, ...] = ()
    force_https: bool = False


class Concurrency(Value, frozen=True, kw_only=True):
    """Load a machine should (soft) and may at most (hard) have. hard 0: no limit."""

    type: str = "connections"
    soft_limit: int = 20
    hard_limit: int = 0


class Service(Value, frozen=True, kw_only=True):
    """A machine's port that the edge forwards to."""

    internal_port: int
    protocol: str = "tcp"
    ports: tuple[ServicePort, ...] = ()
    checks: tuple[Check, ...] = ()  # gate routing
    concurrency: Concurrency = Concurrency()


class MachineConfig(Value, frozen=True, kw_only=True):
    """What a machine is to be: what it runs, with which size, services and volumes."""

    image: str  # "source:sha256:<hex>" (a tree, process driver) or "host:" (the host's own programs)
    cmd: tuple[str, ...] = ()
    env: dict[str, str] = {}
    guest: Guest = Guest()
    services: tuple[Service, ...] = ()
    checks: dict[str, Check] = {}  # named top-level checks: shown, gate deploys, not routing
    mounts: tuple[Mount, ...] = ()
    restart: RestartPolicy = RestartPolicy()
    stop: StopConfig = StopConfig()
    metadata: dict[str, str] = {}
    auto_destroy: bool = False  # destroyed by its host once its process has ended for good
    process_group: str = "app"


# --------------------------------------------------------------------------- machines


class Desired(StrEnum):
    """What a user (or a deploy) wants of a machine."""

    STARTED = "started"
    STOPPED = "stopped"
    DESTROYED = "destroyed"


class MachineState(StrEnum):
    """What a machine is, as its host last said. Transitions: flyd/machines/states.py."""

    CREATED = "created"
    STARTING = "starting"
    STARTED = "started"
    STOPPING = "stopping"
    STOPPED = "stopped"
    RESTARTING = "restarting"
    FAILED = "failed"
    DESTROYING = "destroying"
    DESTROYED = "destroyed"


class Machine(Value, frozen=True, kw_only=True):
    """The claim: intent for one machine, written by placement, deploys and users; never by hosts.

    `epoch` grows each time the machine is given to a host; a host acts only on the newest
    it knows. `instance_id` names this version of the configuration.
    """

    id: str
    app: str
    name: str
    region: str
    host: str
    instance_id: str
    config: MachineConfig
    private_ip: str
    desired: Desired = Desired.STARTED
    epoch: int = 1
    release: int = 0  # release version, 0: none
    cordoned: bool = False  # kept out of routing
    created_at_s: float = 0.0
    restart_nonce: int = 0  # grows with each requested restart


class ExitStatus(Value, frozen=True, kw_only=True):
    """How a machine's process ended."""

    code: int | None = None  # exit code, None if a signal ended it
    signal: int | None = None
    oom_killed: bool = False
    requested: bool = False  # ended because we asked
    at_s: float = 0.0


class CheckStatus(Value, frozen=True, kw_only=True):
    """The newest result of one check. status: `passing`, `warning` (in grace) or `critical`."""

    name: str
    status: str
    output: str = ""
    updated_at_s: float = 0.0
    gates_routing: bool = False


class MachineEvent(Value, frozen=True, kw_only=True):
    """One line of a machine's history: launch, start, stop, exit, restart, destroy, ..."""

    type: str
    status: str
    at_s: float
    source: str = "flyd"  # "flyd" or "user"
    exit: ExitStatus | None = None
    detail: str = ""


class MachineStatus(Value, frozen=True, kw_only=True):
    """What the machine's host last said of it. Written by that host alone."""

    id: str
    app: str
    host: str
    instance_id: str
    epoch: int
    state: MachineState
    pid: int = 0
    started_at_s: float = 0.0
    checks: tuple[CheckStatus, ...] = ()
    restarts: int = 0
    detail: str = ""
    events: tuple[MachineEvent, ...] = ()  # newest last, at most MAX_EVENTS

    def healthy(self) -> bool:
        """Started, and no check critical or still in grace."""
        return self.state is MachineState.STARTED and all(c.status == "passing" for c in self.checks)

    def routable(self) -> bool:
        """Started, and every check that gates routing passes."""
        return self.state is MachineState.STARTED and all(
            c.status == "passing" for c in self.checks if c.gates_routing
        )


MAX_EVENTS = 20


class MachineSpec(Value, frozen=True, kw_only=True):
    """All that a driver needs to run one machine: the claim made concrete on this host."""

    machine_id: str
    app: str
    instance_id: str
    command: tuple[str, ...]
    env: dict[str, str]
    private_ip: str
    source_path: str = ""  # the unpacked tree to run in; empty: an empty directory
    mounts: tuple[tuple[str, str], ...] = ()  # (path on the host, path in the machine)
    user: str = ""  # run as this user where the driver can; empty: as flyd runs
    guest: Guest = Guest()


class Observed(Value, frozen=True, kw_only=True):
    """What a driver sees of one machine."""

    machine_id: str
    instance_id: str
    running: bool
    pid: int = 0
    started_at_s: float = 0.0
    exit: ExitStatus | None = None  # of the last run, if it has ended


class ExecOutput(Value, frozen=True, kw_only=True):
    """A piece of a command's output, or (last) its exit code."""

    stdout: bytes = b""
    stderr: bytes = b""
    exit_code: int | None = None


class LogLine(Value, frozen=True, kw_only=True):
    """One line a machine printed."""

    machine_id: str
    at_s: float
    text: str


class RunEvent(Value, frozen=True, kw_only=True):
    """One event of an operation's log on a host (flyd/machines/saga.py).

    kind: begin, done (a step), failed (a step), undone (a step), end.
    """

    run_id: str
    sequence: int
    kind: str
    step: str = ""
    data: dict[str, Any] = {}


# --------------------------------------------------------------------------- hosts and placement


class Resources(Value, frozen=True, kw_only=True):
    """An amount of capacity, or of its use."""

    cpus: int = 0
    memory_mb: int = 0
    disk_gb: int = 0


class Host(Value, frozen=True, kw_only=True):
    """A host as it described itself when it last joined. Stays when the host is lost."""

    name: str
    region: str
    api_address: str  # host:port of its flyd
    address: str  # the host's own address on the private network; endpoints listen here
    subnet: str  # first octets of its machines' addresses, e.g. "127.11"
    capacity: Resources
    driver: str
    version: str
    http_port: int = 0  # the edge's public HTTP port, 0: no edge
    cordoned: bool = False
    joined_at_s: float = 0.0


class Reservations(Value, frozen=True, kw_only=True):
    """What is promised on one host. Placement commits by comparing this record's revision."""

    host: str
    machines: dict[str, Resources] = {}
    volumes_gb: dict[str, int] = {}
    addresses: dict[str, int] = {}  # machine id -> number of its address in the subnet


class Volume(Value, frozen=True, kw_only=True):
    """A volume: on one host, attached to at most one machine; `epoch` grows with each attach."""

    id: str
    name: str
    app: str
    region: str
    host: str
    size_gb: int
    attached_machine: str = ""
    epoch: int = 0
    created_at_s: float = 0.0


# --------------------------------------------------------------------------- applications


class AppKind(StrEnum):
    """What an application is to flyd."""

    APP = "app"
    POSTGRES = "postgres"


class App(Value, frozen=True, kw_only=True):
    """An application: a name that machines, releases, volumes and secrets belong to."""

    name: str
    kind: AppKind = AppKind.APP
    created_at_s: float = 0.0
    regions: tuple[str, ...] = ()  # where a deploy puts machines; first is the primary region
    endpoint_port: int = 0  # Postgres: the port, on every host's own address, that follows the primary


class Secrets(Value, frozen=True, kw_only=True):
    """An application's secrets. They override env; names in them are resolved on the host."""

    app: str
    values: dict[str, str] = {}


class Event(Value, frozen=True, kw_only=True):
    """One line of the cluster's history, for incident reports. Times are the writer's wall clock."""

    at_s: float
    app: str
    source: str  # host or machine id
    kind: str  # e.g. "postgres.detected", "machine.exit", "host.lost"
    message: str
    fields: dict[str, str] = {}


# --------------------------------------------------------------------------- Postgres, as the rest of flyd sees it


class PostgresLeader(Value, frozen=True, kw_only=True):
    """Key pg/<cluster>/leader: who may be primary. Changed only by a take-over's compare-and-set.

    The endpoint forwards to `address` only while `serving` is true: the primary is complete
    and open for writes in `epoch`.
    """

    cluster: str
    epoch: int
    node: str  # member name, e.g. "chat-db-1"
    address: str  # ip:port of its Postgres
    serving: bool = False
    since_s: float = 0.0


class PostgresMember(Value, frozen=True, kw_only=True):
    """Key pg/<cluster>/members/<node>: what one member last said of itself."""

    node: str
    region: str
    address: str  # ip:port of its Postgres
    machine_id: str = ""
    role: str = "starting"  # starting, primary, replica, fenced, rewinding, copying, stopped
    epoch: int = 0
    timeline: int = 0
    flushed_lsn: int = 0
    streaming: bool = False
    detail: str = ""
    updated_at_s: float = 0.0
