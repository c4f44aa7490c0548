"""Machines: what is wanted of one, what its host says of it, what a driver needs and sees."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from flyd.model.config import Guest, MachineConfig, StopConfig
from flyd.model.value import Value


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
    REPLACING = "replacing"  # by a newer version of its configuration
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
    starts_at_s: float = 0.0  # its schedule's next start, if it came to its host at rest
    stop: StopConfig | None = None  # how the newest stop or restart was asked for; None: as `config` says


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
    recent_exits: int = 0  # failures within the restart window, as of the last one
    retry_at_s: float = 0.0  # when it is started again, by its host's clock; 0: nothing waits
    next_start_s: float = 0.0  # by its schedule, should it have ended by then; 0: no schedule

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
    command: tuple[str, ...]  # empty: the image's own
    env: dict[str, str]
    private_ip: str
    image: str = ""  # as the claim names it; what a container is made from
    source_path: str = ""  # the unpacked tree to run in; empty: an empty directory
    mounts: tuple[tuple[str, str], ...] = ()  # (path on the host, path in the machine)
    user: str = ""  # run as this user where the driver can; empty: as flyd runs, or as the image says
    guest: Guest = Guest()


class Observed(Value, frozen=True, kw_only=True):
    """What a driver sees of one machine."""

    machine_id: str
    instance_id: str
    running: bool
    pid: int = 0
    started_at_s: float = 0.0
    exit: ExitStatus | None = None  # of the last run, if it has ended


class ListenSocket(Value, frozen=True, kw_only=True):
    """A TCP or UDP socket that a machine's process receives on."""

    protocol: str  # tcp, tcp6, udp, udp6
    address: str
    port: int


class Process(Value, frozen=True, kw_only=True):
    """One process of a machine, as the host's kernel shows it."""

    pid: int  # on the host
    command: str
    memory_kb: int = 0  # resident
    cpu_s: float = 0.0  # used since its start
    listens: tuple[ListenSocket, ...] = ()


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
