"""What a machine is to be. Names and meanings follow Fly's Machines API where there is one."""

from __future__ import annotations

from flyd.model.value import Value


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


class VolumeRule(Value, frozen=True, kw_only=True):
    """How volumes of a name are copied to other hosts, and come back from one, as fly.toml says it."""

    replicas: int
    copy_every_s: float = 900.0
    recover_max_age_s: float = 0.0  # 0: never by itself


class Mount(Value, frozen=True, kw_only=True):
    """A volume at a path. `volume` is its id once placed; `name` is what fly.toml says."""

    path: str
    volume: str = ""
    name: str = ""
    size_gb: int = 1
    rule: VolumeRule | None = None  # given to the volume by each placing; None: the volume's stays as it is


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
    restart_limit: int = 0  # failures in a row after which the machine is restarted; 0: never


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


OWN_IMAGE = "host:"
"""The image of flyd's own programs: they run from the host's installation, and may speak to etcd."""


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
    schedule: str = ""  # how often it is started once it has ended (flyd/machines/schedule.py)
    process_group: str = "app"
    host_labels: dict[str, str] = {}  # what its host's labels must say
