"""Hosts, capacity, volumes and applications: what a cluster holds besides machines."""

from __future__ import annotations

from enum import StrEnum

from flyd.model.value import Value


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
    address: str  # the host's own address on the private network; Postgres endpoints listen here
    public_address: str = ""  # where the edge listens; empty: at `address`
    subnet: str  # first octets of its machines' addresses, e.g. "127.11"
    capacity: Resources
    driver: str
    version: str
    http_port: int = 0  # the edge's public HTTP port, 0: no edge
    wg_public_key: str = ""  # of this host's end of the mesh; its private key never leaves the host
    wg_endpoint: str = ""  # ip:port at which the other hosts reach that end
    cordoned: bool = False
    labels: dict[str, str] = {}  # what machines may ask of their host, e.g. {"disk": "nvme"}
    joined_at_s: float = 0.0

    @property
    def edge_address(self) -> str:
        """Where the edge listens."""
        return self.public_address or self.address


class LossRule(Value, frozen=True, kw_only=True):
    """When a host that gives no sign of life loses its machines (flyd/placement/loss.py)."""

    grace_s: float = 60.0  # of silence


class Loss(Value, frozen=True, kw_only=True):
    """What became of a lost host, for people. Written by the leader of repairs while the host is lost.

    Times are the writer's wall clock: shown, never decided on.
    """

    host: str
    since_s: float
    moves_at_s: float  # when its machines are placed elsewhere
    held: str = ""  # why nothing is moved although that time has passed
    left: dict[str, str] = {}  # machine id -> why it is still there


class DrainState(StrEnum):
    """How far a drain has come."""

    DRAINING = "draining"
    DRAINED = "drained"  # nothing is left but what `left` names
    CANCELLED = "cancelled"  # uncordoned before its end: what it had begun is being taken back


class DrainLine(Value, frozen=True, kw_only=True):
    """One thing that a drain did."""

    at_s: float
    text: str


class Drain(Value, frozen=True, kw_only=True):
    """Moving everything off a host, one machine of a group at a time (flyd/placement/drain.py)."""

    id: str
    host: str
    begun_at_s: float
    state: DrainState = DrainState.DRAINING
    force: bool = False  # stop, where they are, the machines that can not move
    doing: tuple[str, ...] = ()  # one line for each group at work
    left: dict[str, str] = {}  # machine id -> why it stays
    replacing: dict[str, str] = {}  # machine here -> its replacement elsewhere, from before that is placed
    taken_out: tuple[str, ...] = ()  # those of `replacing` that the drain took out of routing
    retired: tuple[str, ...] = ()  # those of `replacing` that the drain destroys
    lines: tuple[DrainLine, ...] = ()  # newest last


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
    replicas: int = 0  # how many other hosts are to have copies
    copy_every_s: float = 900.0  # how old the newest of them may become
    extend_percent: int = 0  # so full, it grows by itself; 0: it does not
    extend_gb: int = 1  # by so much
    extend_limit_gb: int = 0  # to no more than this
    recover_max_age_s: float = 0.0  # a lost host's comes back by itself from a copy no older; 0: never
    verify_every_s: float = 0.0  # so often its newest copy is restored and looked at; 0: when somebody asks


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
    counts: dict[str, dict[str, int]] = {}  # group -> region -> machines, where said; flyd/deploy/counts.py
    endpoint_port: int = 0  # Postgres: the port, on every host's own address, that follows the primary
    network: str = ""  # machines of one network reach and name only each other; "" is the default one

    @property
    def read_port(self) -> int:
        """Postgres: the port, on every host's own address, of the nearest member; 0 without an endpoint."""
        return self.endpoint_port + 1 if self.endpoint_port else 0


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
