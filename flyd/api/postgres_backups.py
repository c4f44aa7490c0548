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
from pgha.model import Backup
from pgha.requests import request_backup, taken

BACKUP_TIMEOUT_S = 3600.0


def _shown(backup: Backup) -> postgres_pb2.Backup:
    return postgres_pb2.Backup(
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
    name = (
        datetime.fromtimestamp(now_s, UTC).strftime("%Y%m%dT%H%M%S") + f"-{context.entropy.token(3).lower()}"
    )
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
    """Oldest first."""
    return [_shown(backup) for backup in await taken(context.kv, cluster)]


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
