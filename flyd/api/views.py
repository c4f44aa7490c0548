"""How the model looks in the public API; machines: machine_views.py. Pure."""

from __future__ import annotations

from flyd.model import App, Event, Host, MachineStatus, PostgresMember, Reservations, Volume
from flyd.v1 import apps_pb2, events_pb2, hosts_pb2, postgres_pb2, volumes_pb2
from pgha.disk import Storage


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
        network=value.network,
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
        replicas=value.replicas,
        copy_every_s=value.copy_every_s,
        extend_percent=value.extend_percent,
        extend_gb=value.extend_gb,
        extend_limit_gb=value.extend_limit_gb,
        recover_max_age_s=value.recover_max_age_s,
        verify_every_s=value.verify_every_s,
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


def postgres_member(
    value: PostgresMember, alive: bool, storage: Storage | None = None
) -> postgres_pb2.PostgresMember:
    """A member of a Postgres cluster, and what it last said of its disk."""
    disk = storage or Storage(node=value.node)
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
        disk_state=str(disk.level) if storage else "",
        disk_free_bytes=disk.free_bytes,
        disk_total_bytes=disk.total_bytes,
        archive_failing_since=disk.failing_since_s,
        archive_failing_segment=disk.failing_segment,
        archive_waiting=disk.waiting,
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
