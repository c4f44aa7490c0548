"""How machines look in the public API, and how a caller's configuration becomes ours. Pure.

`machine_config` also refuses what can never work, so that nothing of it reaches a host: sizes below
one, unknown words, names and numbers out of bounds.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping

from flyd.errors import InvalidInput
from flyd.machines.leases import MachineLease
from flyd.machines.schedule import SCHEDULES
from flyd.machines.states import MAX_STOP_TIMEOUT_S
from flyd.model import (
    Check,
    CheckStatus,
    Concurrency,
    ExitStatus,
    Guest,
    Machine,
    MachineConfig,
    MachineEvent,
    MachineStatus,
    Mount,
    RestartPolicy,
    Service,
    ServicePort,
    StopConfig,
)
from flyd.model.machine import Process
from flyd.v1 import machines_pb2 as pb

POLICIES = ("no", "on-failure", "always")
CPU_KINDS = ("shared", "performance")
CHECK_KINDS = ("tcp", "http")
MAX_CPUS = 1024
MAX_MEMORY_MB = 16 * 1024 * 1024
MAX_VOLUME_GB = 1024 * 1024
MAX_ENTRIES = 1000  # of words, variables, services, checks, metadata
MAX_TEXT = 64 * 1024
MAX_NAME = 256
MAX_CHECK_S = 3600.0

# --------------------------------------------------------------------------- ours, as shown


def machine(value: Machine, status: MachineStatus | None, host_alive: bool) -> pb.Machine:
    """A machine: what is wanted and what its host last said. Without a status it is `created`."""
    return pb.Machine(
        id=value.id,
        name=value.name,
        app_name=value.app,
        state=status.state if status else "created",
        desired_state=value.desired,
        region=value.region,
        host=value.host,
        instance_id=value.instance_id,
        private_ip=value.private_ip,
        process_group=value.config.process_group,
        release_version=value.release,
        pid=status.pid if status else 0,
        restarts=status.restarts if status else 0,
        cordoned=value.cordoned,
        host_status="ok" if host_alive else "unreachable",
        created_at=value.created_at_s,
        started_at=status.started_at_s if status else 0.0,
        detail=status.detail if status else "waits for its host",
        checks=[_check_status(c) for c in status.checks] if status else [],
        events=[_event(e) for e in status.events] if status else [],
        config=config(value.config),
        retry_at=status.retry_at_s if status else 0.0,
        recent_exits=status.recent_exits if status else 0,
        next_start_at=(status.next_start_s if status else 0.0) or value.starts_at_s,
    )


def config(value: MachineConfig) -> pb.MachineConfig:
    """A configuration, whole: sent back by an update it changes nothing."""
    return pb.MachineConfig(
        image=value.image,
        cmd=value.cmd,
        env=value.env,
        guest=pb.MachineGuest(
            cpu_kind=value.guest.cpu_kind, cpus=value.guest.cpus, memory_mb=value.guest.memory_mb
        ),
        mounts=[
            pb.MachineMount(volume=m.volume, path=m.path, name=m.name, size_gb=m.size_gb)
            for m in value.mounts
        ],
        restart_policy=value.restart.policy,
        max_retries=value.restart.max_retries,
        metadata=value.metadata,
        services=[_service(s) for s in value.services],
        checks={name: _check(c) for name, c in value.checks.items()},
        stop=pb.MachineStop(signal=value.stop.signal, timeout=value.stop.timeout_s),
        auto_destroy=value.auto_destroy,
        schedule=value.schedule,
        process_group=value.process_group,
        host_labels=value.host_labels,
    )


def process(value: Process) -> pb.MachineProcess:
    """A process of a machine."""
    return pb.MachineProcess(
        pid=value.pid,
        command=value.command,
        memory_kb=value.memory_kb,
        cpu=value.cpu_s,
        listen_sockets=[
            pb.MachineSocket(proto=s.protocol, address=s.address, port=s.port) for s in value.listens
        ],
    )


def lease(value: MachineLease, *, with_nonce: bool) -> pb.MachineLease:
    """A lease; its nonce is for its holder alone."""
    return pb.MachineLease(
        machine_id=value.machine,
        nonce=value.nonce if with_nonce else "",
        owner=value.owner,
        description=value.description,
        expires_at=value.expires_at_s,
    )


def _exit(value: ExitStatus) -> pb.MachineExit:
    return pb.MachineExit(
        exit_code=value.code,
        signal=value.signal,
        oom_killed=value.oom_killed,
        requested_stop=value.requested,
        exited_at=value.at_s,
    )


def _event(value: MachineEvent) -> pb.MachineEvent:
    return pb.MachineEvent(
        type=value.type,
        status=value.status,
        source=value.source,
        timestamp=value.at_s,
        exit_event=_exit(value.exit) if value.exit else None,
        detail=value.detail,
    )


def _check_status(value: CheckStatus) -> pb.MachineCheck:
    return pb.MachineCheck(
        name=value.name, status=value.status, output=value.output, updated_at=value.updated_at_s
    )


def _service(value: Service) -> pb.MachineService:
    return pb.MachineService(
        internal_port=value.internal_port,
        protocol=value.protocol,
        ports=[
            pb.MachinePort(port=p.port, handlers=p.handlers, force_https=p.force_https) for p in value.ports
        ],
        checks=[_check(c) for c in value.checks],
        concurrency=pb.MachineConcurrency(
            type=value.concurrency.type,
            soft_limit=value.concurrency.soft_limit,
            hard_limit=value.concurrency.hard_limit,
        ),
    )


def _check(value: Check) -> pb.MachineHealthCheck:
    return pb.MachineHealthCheck(
        type=value.kind,
        port=value.port,
        interval=value.interval_s,
        timeout=value.timeout_s,
        grace_period=value.grace_period_s,
        method=value.method,
        path=value.path,
        protocol=value.protocol,
        headers=value.headers,
        restart_limit=value.restart_limit,
    )


# --------------------------------------------------------------------------- a caller's, as ours


def machine_config(value: pb.MachineConfig) -> MachineConfig:
    """A caller's configuration as ours; what is not given is the default. InvalidInput says what can't be."""
    for what, count in (
        ("words of cmd", len(value.cmd)),
        ("variables", len(value.env)),
        ("mounts", len(value.mounts)),
        ("services", len(value.services)),
        ("checks", len(value.checks)),
        ("metadata", len(value.metadata)),
        ("host labels", len(value.host_labels)),
    ):
        if count > MAX_ENTRIES:
            raise InvalidInput(f"{count} {what} are too many: at most {MAX_ENTRIES}")
    return MachineConfig(
        image=_text("image", value.image or "host:", MAX_NAME),
        cmd=tuple(_text("cmd", word) for word in value.cmd),
        env={_name("variable", k): _text(f"variable {k}", v) for k, v in sorted(value.env.items())},
        guest=_guest(value.guest),
        mounts=tuple(_mount(m) for m in value.mounts),
        restart=RestartPolicy(
            policy=_word("restart_policy", value.restart_policy or "on-failure", POLICIES),
            max_retries=int(_bounded("max_retries", value.max_retries, 0, 1_000_000))
            or RestartPolicy().max_retries,
        ),
        metadata=metadata(value.metadata),
        services=tuple(_own_service(s) for s in value.services),
        checks={_name("check", k): _own_check(v) for k, v in sorted(value.checks.items())},
        stop=stop_config(value.stop.signal, value.stop.timeout if value.stop.HasField("timeout") else None)
        or StopConfig(),
        auto_destroy=value.auto_destroy,
        schedule=_schedule(value),
        process_group=_name("process_group", value.process_group or "app"),
        host_labels={
            _name("host label", k): _text("host label", v, MAX_NAME)
            for k, v in sorted(value.host_labels.items())
        },
    )


def _schedule(value: pb.MachineConfig) -> str:
    if not value.schedule:
        return ""
    never = "is destroyed once it has ended" if value.auto_destroy else ""
    never = "never rests with restart policy 'always'" if value.restart_policy == "always" else never
    if never:
        raise InvalidInput(
            f"a schedule would never start this machine: it {never}",
            hint="Use restart policy 'no' or 'on-failure', and no auto_destroy.",
        )
    return _word("schedule", value.schedule, SCHEDULES)


def stop_config(name: str, timeout_s: float | None) -> StopConfig | None:
    """How to stop a machine, as far as a caller says; None if not at all."""
    if not name and timeout_s is None:
        return None
    default = StopConfig()
    return StopConfig(
        signal=signal_name(name) if name else default.signal,
        timeout_s=_bounded(
            "timeout", default.timeout_s if timeout_s is None else timeout_s, 0, MAX_STOP_TIMEOUT_S
        ),
    )


def stop_of(machine: Machine, request: pb.StopMachineRequest | pb.RestartMachineRequest) -> StopConfig | None:
    """How a stop or restart is asked for; what is not said is as the machine's configuration says."""
    timeout_s = request.timeout if request.HasField("timeout") else None
    if not request.signal and timeout_s is None:
        return None
    usual = machine.config.stop
    return stop_config(request.signal or usual.signal, usual.timeout_s if timeout_s is None else timeout_s)


def signal_name(name: str) -> str:
    """A signal by its name, with or without SIG."""
    full = name if name.startswith("SIG") else f"SIG{name}"
    if full not in signal.Signals.__members__:
        raise InvalidInput(f"there is no signal {name[:MAX_NAME]!r}", hint="Like SIGTERM, SIGINT or SIGHUP.")
    return full


def metadata(values: Mapping[str, str]) -> dict[str, str]:
    """Metadata within its bounds."""
    return {_name("metadata key", k): _text(f"metadata {k}", v, 4096) for k, v in sorted(values.items())}


def _guest(value: pb.MachineGuest) -> Guest:
    default = Guest()
    return Guest(
        cpus=int(_bounded("cpus", value.cpus or default.cpus, 1, MAX_CPUS)),
        memory_mb=int(_bounded("memory_mb", value.memory_mb or default.memory_mb, 1, MAX_MEMORY_MB)),
        cpu_kind=_word("cpu_kind", value.cpu_kind or default.cpu_kind, CPU_KINDS),
    )


def _mount(value: pb.MachineMount) -> Mount:
    path = _text("mount path", value.path, 4096)
    if not path.startswith("/") or not path.strip("/") or ".." in path.split("/"):
        raise InvalidInput(
            f"a volume can not be mounted at {path!r}", hint="Give an absolute path such as /data."
        )
    if not value.volume and not value.name:
        raise InvalidInput(f"the mount at {path} names no volume", hint="Give its volume's id or its name.")
    return Mount(
        path=path,
        volume=_text("volume", value.volume, MAX_NAME),
        name=_text("volume name", value.name, MAX_NAME),
        size_gb=int(_bounded("size_gb", value.size_gb or 1, 1, MAX_VOLUME_GB)),
    )


def _own_service(value: pb.MachineService) -> Service:
    default = Concurrency()
    return Service(
        internal_port=_port("internal_port", value.internal_port),
        protocol=_word("protocol", value.protocol or "tcp", ("tcp", "udp")),
        ports=tuple(
            ServicePort(
                port=_port("port", p.port),
                handlers=tuple(_text("handler", h, MAX_NAME) for h in p.handlers),
                force_https=p.force_https,
            )
            for p in value.ports
        ),
        checks=tuple(_own_check(c) for c in value.checks),
        concurrency=Concurrency(
            type=_word(
                "concurrency type", value.concurrency.type or default.type, ("connections", "requests")
            ),
            soft_limit=int(_bounded("soft_limit", value.concurrency.soft_limit, 0, 2**31))
            or default.soft_limit,
            hard_limit=int(_bounded("hard_limit", value.concurrency.hard_limit, 0, 2**31)),
        ),
    )


def _own_check(value: pb.MachineHealthCheck) -> Check:
    default = Check(kind="tcp", port=0)
    return Check(
        kind=_word("check type", value.type, CHECK_KINDS),
        port=_port("check port", value.port),
        interval_s=_bounded("interval", value.interval or default.interval_s, 0.5, MAX_CHECK_S),
        timeout_s=_bounded("timeout", value.timeout or default.timeout_s, 0.1, MAX_CHECK_S),
        grace_period_s=_bounded("grace_period", value.grace_period, 0, MAX_CHECK_S),
        method=_text("method", value.method or default.method, MAX_NAME),
        path=_text("path", value.path or default.path, 4096),
        protocol=_word("protocol", value.protocol or default.protocol, ("http", "https")),
        headers={_name("header", k): _text("header", v, 4096) for k, v in sorted(value.headers.items())},
        restart_limit=int(_bounded("restart_limit", value.restart_limit, 0, 1000)),
    )


def _bounded(what: str, value: float, low: float, high: float) -> float:
    if not math.isfinite(value) or not low <= value <= high:
        raise InvalidInput(f"{what} can not be {value:g}: {low:g} to {high:g} is possible")
    return value


def _port(what: str, value: int) -> int:
    return int(_bounded(what, value, 1, 65535))


def _word(what: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise InvalidInput(f"{what} can not be {value[:MAX_NAME]!r}", hint=f"One of {', '.join(known)}.")
    return value


def _text(what: str, value: str, most: int = MAX_TEXT) -> str:
    if len(value) > most or "\0" in value:
        raise InvalidInput(f"{what[:MAX_NAME]} is too long (at most {most} characters) or holds a NUL byte")
    return value


def _name(what: str, value: str) -> str:
    if not value or "=" in value or any(ord(c) < 33 for c in value):
        raise InvalidInput(f"{value[:MAX_NAME]!r} is no name of a {what}")
    return _text(what, value, MAX_NAME)
