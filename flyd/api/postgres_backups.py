"""PostgresService's part about backups: asked for and shown here, taken by pgha. Restores too."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import PurePosixPath

from flyd.api.apps import check_name, check_regions
from flyd.api.context import ApiContext
from flyd.errors import InvalidInput, Refused, Unavailable
from flyd.model import App, Machine
from flyd.postgres import clusters
from flyd.store import keys
from flyd.v1 import postgres_pb2
from pgha import backup_requests
from pgha.backup_plan import DrillResult, Reached, Schedule, backup_name
from pgha.backup_requests import archive_state, clear_schedule, drill_results, request_drill, schedule_of
from pgha.model import Backup
from pgha.requests import request_backup, taken

BACKUP_TIMEOUT_S = 3600.0


def _shown(
    backup: Backup, reached: Reached | None = None, tried: DrillResult | None = None
) -> postgres_pb2.Backup:
    return postgres_pb2.Backup(
        restorable_to=reached.last_commit_s if reached else 0.0,
        missing_wal=reached.missing if reached else "",
        verified_at=tried.finished_at_s if tried else 0.0,
        verify_error=tried.error if tried else "",
        verified_by=tried.node if tried else "",
        name=backup.name,
        requested_at=backup.requested_at_s,
        finished_at=backup.finished_at_s,
        node=backup.node,
        epoch=backup.epoch,
        size_bytes=backup.size_bytes,
        error=backup.error,
    )


def archive_of(context: ApiContext, cluster: str) -> tuple[str, clusters.MachineConfig]:
    """The cluster's archive and what one of its members is; `Refused` if it has none."""
    for item in context.mirror.list(f"{keys.MACHINES}{cluster}/", Machine):
        archive = item.value.config.env.get(clusters.ARCHIVE_ENV, "")
        if archive:
            return archive, item.value.config
    raise Refused(
        f"Postgres cluster {cluster!r} has no archive",
        hint="`fly postgres create --archive-dir PATH` makes one that has.",
    )


async def create_backup(context: ApiContext, cluster: str) -> postgres_pb2.Backup:
    """Wait until it is taken."""
    archive_of(context, cluster)
    now_s = context.clock.wall_s()
    name = backup_name(now_s, context.entropy)
    await request_backup(context.kv, cluster, name, now_s)
    try:
        async with asyncio.timeout(BACKUP_TIMEOUT_S):
            while True:
                version = context.mirror.version
                for backup in await taken(context.kv, cluster):
                    if backup.name == name and (backup.finished_at_s or backup.error):
                        return _settled(cluster, backup)
                await context.mirror.wait_change(version)
    except TimeoutError:
        raise Unavailable(
            f"the backup {name} is not there after {BACKUP_TIMEOUT_S:.0f} s; it goes on",
            hint=f"`fly postgres backup list -a {cluster}` shows when it is.",
        ) from None


def _settled(cluster: str, backup: Backup) -> postgres_pb2.Backup:
    if backup.error:
        raise Unavailable(
            f"the backup {backup.name} of {cluster} failed on {backup.node}: {backup.error}",
            hint="Is there room in the archive, and may Postgres' user write there?",
        )
    return _shown(backup)


async def list_backups(context: ApiContext, cluster: str) -> list[postgres_pb2.Backup]:
    """Oldest first, with what is known of each."""
    reached = {r.backup: r for r in (await archive_state(context.kv, cluster)).reached}
    tried = await drill_results(context.kv, cluster)
    return [
        _shown(backup, reached.get(backup.name), tried.get(backup.name))
        for backup in await taken(context.kv, cluster)
    ]


async def schedule(context: ApiContext, cluster: str) -> postgres_pb2.BackupSchedule | None:
    """The one in force."""
    found = await schedule_of(context.kv, cluster)
    if found is None:
        return None
    return postgres_pb2.BackupSchedule(
        every_s=found.every_s, keep=found.keep, verify_every_s=found.verify_every_s
    )


async def set_schedule(context: ApiContext, request: postgres_pb2.SetBackupScheduleRequest) -> None:
    """Or none, if the request has none."""
    archive_of(context, request.cluster_name)
    if not request.HasField("schedule"):
        await clear_schedule(context.kv, request.cluster_name)
        return
    wanted = request.schedule
    found = Schedule(every_s=wanted.every_s, keep=wanted.keep, verify_every_s=wanted.verify_every_s)
    await backup_requests.set_schedule(context.kv, request.cluster_name, found)


async def verify(context: ApiContext, cluster: str, wanted: str) -> postgres_pb2.Backup:
    """Wait until a replica has tried it. What it found is the answer, not an error."""
    archive_of(context, cluster)
    asked_s = context.clock.wall_s()
    name = await request_drill(context.kv, cluster, wanted, asked_s)
    try:
        async with asyncio.timeout(BACKUP_TIMEOUT_S):
            while True:
                version = context.mirror.version
                tried = (await drill_results(context.kv, cluster)).get(name)
                if tried is not None and tried.requested_at_s >= asked_s:
                    return next(b for b in await list_backups(context, cluster) if b.name == name)
                await context.mirror.wait_change(version)
    except TimeoutError:
        raise Unavailable(
            f"the trial restore of {name} has not ended after {BACKUP_TIMEOUT_S:.0f} s; it goes on",
            hint=f"`fly postgres backup list -a {cluster}` shows what it found.",
        ) from None


async def restore(context: ApiContext, source: App, request: postgres_pb2.RestoreClusterRequest) -> App:
    """A new cluster whose first member begins with the archive of the old one; it archives beside it."""
    check_name(request.new_name)
    archive, config = archive_of(context, source.name)
    if request.new_name == source.name:
        raise InvalidInput("a restored cluster needs a name of its own: its archive goes by it")
    if request.to:
        await _check_instant(context, source.name, request.to)
    regions = list(request.regions) or list(source.regions)
    check_regions(context, regions)
    return await clusters.create(
        context.kv,
        context.placer,
        request.new_name,
        regions,
        memory_mb=config.guest.memory_mb,
        volume_size_gb=config.mounts[0].size_gb,
        network=source.network,
        archive=clusters.archive_options(
            str(PurePosixPath(archive).parent), request.new_name, archive, request.to
        ),
        clock=context.clock,
        entropy=context.entropy,
    )


async def _check_instant(context: ApiContext, cluster: str, to: str) -> None:
    """Refuse here what the new cluster would only say in its log."""
    try:
        when = datetime.fromisoformat(to)
    except ValueError:
        when = None
    if when is None or when.tzinfo is None:
        raise InvalidInput(f"{to!r} is no time", hint="for example 2026-11-23T21:04:05+00:00")
    ends = [b.finished_at_s for b in await taken(context.kv, cluster) if b.finished_at_s]
    if not ends or when.timestamp() < min(ends):
        raise Refused(
            f"no base backup of {cluster!r} ended before {to}",
            hint=f"`fly postgres backup list -a {cluster}` shows those that there are.",
        )
    if when.timestamp() > context.clock.wall_s():
        raise InvalidInput(f"{to} is not over yet")
    reached_s = max(
        (r.last_commit_s for r in (await archive_state(context.kv, cluster)).reached), default=0.0
    )
    if reached_s and when.timestamp() >= reached_s:
        newest = datetime.fromtimestamp(reached_s, UTC).isoformat(timespec="milliseconds")
        raise Refused(
            f"the newest commit in the archive of {cluster!r}, as far as is known, is of {newest}: "
            f"what was at {to} cannot be told",
            hint="Leave --to out for all that there is; a later commit is archived within two minutes.",
        )
