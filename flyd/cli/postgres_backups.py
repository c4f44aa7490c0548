"""fly postgres backup and restore."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import click

from flyd.cli.connection import app_name, call
from flyd.cli.options import json_option, split
from flyd.cli.output import ago, done, emit, note, table, waiting
from flyd.cli.postgres_common import cluster_argument, stub
from flyd.deploy.appconfig.units import duration_s
from flyd.errors import InvalidInput
from flyd.v1 import postgres_pb2

LONG_S = 3700.0
MB = 1 << 20
DAY_S = 86400.0


@click.group()
def backup() -> None:
    """Base backups in a cluster's archive. WAL goes there by itself."""


@backup.command(epilog="Example: fly postgres backup create -a chat-db")
@cluster_argument
@json_option
def create(cluster: str | None, json_output: bool) -> None:
    """Take a base backup and wait until it is there."""
    request = postgres_pb2.CreateBackupRequest(cluster_name=app_name(cluster))
    with waiting("the primary copies its data into the archive"):
        made = call(stub().CreateBackup, request, LONG_S)
    if json_output:
        emit(made)
    else:
        done(f"backup {made.backup.name}: {made.backup.size_bytes / MB:.0f} MB, taken by {made.backup.node}")


@backup.command("list", epilog="Example: fly postgres backup list -a chat-db --json")
@cluster_argument
@json_option
def list_backups(cluster: str | None, json_output: bool) -> None:
    """Base backups, oldest first, and between which instants each can be restored."""
    request = postgres_pb2.ListBackupsRequest(cluster_name=app_name(cluster))
    found = call(stub().ListBackups, request)
    if json_output:
        emit(found)
        return
    table(
        ["BACKUP", "STATE", "AGE", "MB", "BY", "RESTORABLE FROM", "TO", "TRIAL RESTORE"],
        [
            (
                b.name,
                f"failed: {b.error}" if b.error else "complete" if b.finished_at else "under way",
                ago(b.finished_at or b.requested_at),
                f"{b.size_bytes / MB:.0f}",
                b.node,
                instant(math.ceil(b.finished_at)),
                latest(b),
                trial(b),
            )
            for b in found.backups
        ],
        empty="No backup yet: `fly postgres backup create`.",
    )
    if found.HasField("schedule"):
        plan = found.schedule
        tried = f", one tried every {spoken(plan.verify_every_s)}" if plan.verify_every_s else ", none tried"
        note(f"one is taken every {spoken(plan.every_s)}, {plan.keep} are kept{tried}")
    else:
        note("none is taken by itself: `fly postgres backup schedule --every 24h --keep 7`")


@backup.command(epilog="Example: fly postgres backup schedule -a db --every 24h --keep 7 --verify-every 7d")
@cluster_argument
@click.option("--every", help="How often one is taken: 12h, 24h, 7d.")
@click.option("--keep", type=click.IntRange(min=1), default=7, show_default=True, help="How many stay.")
@click.option("--verify-every", help="How often a replica tries the newest; default: never.")
@click.option("--off", is_flag=True, help="Take, try and drop nothing by itself any more.")
@json_option
def schedule(
    cluster: str | None, every: str | None, keep: int, verify_every: str | None, off: bool, json_output: bool
) -> None:
    """Have the primary take backups, and drop old ones with the WAL that only they need.

    A backup that was missed is made up for once. What cannot be restored is none of those kept.
    """
    if off == bool(every):
        raise InvalidInput("give --every or --off", hint="fly postgres backup schedule --every 24h --keep 7")
    request = postgres_pb2.SetBackupScheduleRequest(cluster_name=app_name(cluster))
    if every:
        request.schedule.every_s = duration("--every", every)
        request.schedule.keep = keep
        request.schedule.verify_every_s = duration("--verify-every", verify_every) if verify_every else 0.0
    made = call(stub().SetBackupSchedule, request)
    if json_output:
        emit(made)
    else:
        done(f"one every {every}, {keep} are kept" if every else "no backup is taken by itself any more")


@backup.command(epilog="Example: fly postgres backup verify -a chat-db")
@click.argument("name", default="")
@cluster_argument
@json_option
@click.pass_context
def verify(ctx: click.Context, name: str, cluster: str | None, json_output: bool) -> None:
    """Restore a backup (default: the newest) on a replica's volume, check all of it, leave nothing.

    Ends with 1 if it cannot be restored.
    """
    request = postgres_pb2.VerifyBackupRequest(cluster_name=app_name(cluster), backup_name=name)
    with waiting("a replica restores it and reads every row"):
        tried = call(stub().VerifyBackup, request, LONG_S).backup
    if json_output:
        emit(tried)
    elif tried.verify_error:
        note(f"backup {tried.name}, tried by {tried.verified_by}: {tried.verify_error}")
    else:
        done(f"backup {tried.name} was restored by {tried.verified_by}: every row and checksum is right")
    if tried.verify_error:
        ctx.exit(1)


def instant(at_s: float) -> str:
    """As `restore --to` takes it."""
    return datetime.fromtimestamp(at_s, UTC).isoformat() if at_s else "-"


def latest(backup: postgres_pb2.Backup) -> str:
    """Up to when it can be restored."""
    if backup.missing_wal:
        return f"lacks {backup.missing_wal}"
    if 0 < backup.restorable_to <= backup.finished_at:
        return "its end: no commit since"
    return instant(math.floor(backup.restorable_to))


def trial(backup: postgres_pb2.Backup) -> str:
    """What a trial restore found, and when."""
    if not backup.verified_at:
        return "never"
    return f"{'FAILED: ' + backup.verify_error if backup.verify_error else 'ok'} {ago(backup.verified_at)}"


def duration(option: str, text: str) -> float:
    """Seconds of 90m, 24h or 7d."""
    try:
        days = text.removesuffix("d")
        found = float(days) * DAY_S if days != text else duration_s(text, bare_s=1.0)
    except ValueError as error:
        raise InvalidInput(f"{option}: {error}", hint="Like 12h or 7d.") from None
    if found is None or not 0 < found < math.inf:
        raise InvalidInput(f"{option}: {text!r} is no duration", hint="Like 12h or 7d.")
    return found


def spoken(seconds: float) -> str:
    """A duration as a person would give it."""
    for size, unit in ((DAY_S, "d"), (3600.0, "h"), (60.0, "m")):
        if seconds % size == 0:
            return f"{seconds / size:g}{unit}"
    return f"{seconds:g}s"


@click.command(epilog="Example: fly postgres restore chat-db-copy -a chat-db --to 2026-11-23T21:04:05+00:00")
@click.argument("new_name")
@cluster_argument
@click.option(
    "--to", default="", help="The instant, ISO 8601 with its offset from UTC; default: all there is."
)
@click.option("--regions", default="", help="Of the new cluster; default: those of the old one.")
@json_option
def restore(new_name: str, cluster: str | None, to: str, regions: str, json_output: bool) -> None:
    """Make a NEW cluster with what the old one had at an instant. The old one is not touched.

    Up to a minute of the newest writes may not be archived yet.
    """
    request = postgres_pb2.RestoreClusterRequest(
        cluster_name=app_name(cluster), new_name=new_name, to=to, regions=split(regions)
    )
    with waiting(f"restoring {request.cluster_name} as {new_name}"):
        made = call(stub().RestoreCluster, request, LONG_S)
    if json_output:
        emit(made)
    else:
        done(f"Postgres {made.cluster_name} takes writes; endpoint port {made.endpoint_port} on every host")
