"""How the model looks in the public API. Pure."""

from __future__ import annotations

from flyd.model import (
    App,
    CheckStatus,
    Event,
    ExitStatus,
    Guest,
    Host,
    Machine,
    MachineConfig,
    MachineEvent,
    MachineStatus,
    Mount,
    PostgresMember,
    Reservations,
    RestartPolicy,
    Volume,
)
from flyd.v1 import apps_pb2, events_pb2, hosts_pb2, machines_pb2, postgres_pb2, volumes_pb2


def app(value: App, statuses: list[MachineStatus]) -> apps_pb2.App:
    """An application with its machines counted."""
    return apps_pb2.App(
        name=value.name,
        kind=value.kind,
        regions=value.regions,
        created_at=value.created_at_s,
        endpoint_port=value.endpoint_port,
        machine_count=len(statuses),
        started_count=sum(1 for s in statuses if s.state == "started"),
    )


def _exit(value: ExitStatus) -> machines_pb2.MachineExit:
    return machines_pb2.MachineExit(
        exit_code=value.code,
        signal=value.signal,
        oom_killed=value.oom_killed,
        requested_stop=value.requested,
        exited_at=value.at_s,
    )


def _event(value: MachineEvent) -> machines_pb2.MachineEvent:
    return machines_pb2.MachineEvent(
        type=value.type,
        status=value.status,
        source=value.source,
        timestamp=value.at_s,
        exit_event=_exit(value.exit) if value.exit else None,
        detail=value.detail,
    )


def _check(value: CheckStatus) -> machines_pb2.MachineCheck:
    return machines_pb2.MachineCheck(
        name=value.name, status=value.status, output=value.output, updated_at=value.updated_at_s
    )


def _config(value: MachineConfig) -> machines_pb2.MachineConfig:
    return machines_pb2.MachineConfig(
        image=value.image,
        cmd=value.cmd,
        env=value.env,
        guest=machines_pb2.MachineGuest(
            cpu_kind=value.guest.cpu_kind, cpus=value.guest.cpus, memory_mb=value.guest.memory_mb
        ),
        mounts=[
            machines_pb2.MachineMount(volume=m.volume, path=m.path, name=m.name, size_gb=m.size_gb)
            for m in value.mounts
        ],
        restart_policy=value.restart.policy,
        metadata=value.metadata,
    )


def machine_config(value: machines_pb2.MachineConfig) -> MachineConfig:
    """A caller's configuration as ours; sizes not given are the defaults."""
    default = Guest()
    return MachineConfig(
        image=value.image or "host:",
        cmd=tuple(value.cmd),
        env=dict(value.env),
        guest=Guest(
            cpus=value.guest.cpus or default.cpus,
            memory_mb=value.guest.memory_mb or default.memory_mb,
            cpu_kind=value.guest.cpu_kind or default.cpu_kind,
        ),
        mounts=tuple(
            Mount(path=m.path, volume=m.volume, name=m.name, size_gb=m.size_gb or 1) for m in value.mounts
        ),
        restart=RestartPolicy(policy=value.restart_policy or RestartPolicy().policy),
        metadata=dict(value.metadata),
    )


def machine(value: Machine, status: MachineStatus | None, host_alive: bool) -> machines_pb2.Machine:
    """A machine: what is wanted and what its host last said. Without a status it is `created`."""
    return machines_pb2.Machine(
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
        checks=[_check(c) for c in status.checks] if status else [],
        events=[_event(e) for e in status.events] if status else [],
        config=_config(value.config),
    )


def volume(value: Volume) -> volumes_pb2.Volume:
    """A volume."""
    return volumes_pb2.Volume(
        id=value.id,
        name=value.name,
        app_name=value.app,
        region=value.region,
        host=value.host,
        size_gb=value.size_gb,
        attached_machine_id=value.attached_machine,
        epoch=value.epoch,
        created_at=value.created_at_s,
    )


def host(value: Host, reserved: Reservations, alive: bool) -> hosts_pb2.Host:
    """A host with what is promised on it."""
    machines = reserved.machines.values()
    return hosts_pb2.Host(
        name=value.name,
        region=value.region,
        state="up" if alive else "lost",
        api_address=value.api_address,
        address=value.address,
        driver=value.driver,
        version=value.version,
        http_port=value.http_port,
        cpus=value.capacity.cpus,
        memory_mb=value.capacity.memory_mb,
        disk_gb=value.capacity.disk_gb,
        cpus_used=sum(m.cpus for m in machines),
        memory_mb_used=sum(m.memory_mb for m in machines),
        disk_gb_used=sum(reserved.volumes_gb.values()),
        machine_count=len(reserved.machines),
        joined_at=value.joined_at_s,
    )


def postgres_member(value: PostgresMember, alive: bool) -> postgres_pb2.PostgresMember:
    """A member of a Postgres cluster."""
    return postgres_pb2.PostgresMember(
        node=value.node,
        region=value.region,
        machine_id=value.machine_id,
        role=value.role,
        epoch=value.epoch,
        timeline=value.timeline,
        flushed_lsn=value.flushed_lsn,
        streaming=value.streaming,
        detail=value.detail,
        address=value.address,
        host_status="ok" if alive else "unreachable",
    )


def event(value: Event) -> events_pb2.Event:
    """A line of history."""
    return events_pb2.Event(
        timestamp=value.at_s,
        app_name=value.app,
        source=value.source,
        kind=value.kind,
        message=value.message,
        fields=value.fields,
    )
