"""fly postgres backup and restore."""

from __future__ import annotations

import click

from flyd.cli.connection import app_name, call
from flyd.cli.options import json_option, split
from flyd.cli.output import ago, done, emit, table, waiting
from flyd.cli.postgres_common import cluster_argument, stub
from flyd.v1 import postgres_pb2

LONG_S = 3700.0
MB = 1 << 20


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
    """Base backups, oldest first. Any instant after the end of one can be restored."""
    request = postgres_pb2.ListBackupsRequest(cluster_name=app_name(cluster))
    found = call(stub().ListBackups, request)
    if json_output:
        emit(found)
        return
    table(
        ["BACKUP", "STATE", "ASKED FOR", "ENDED", "BY", "EPOCH", "MB"],
        [
            (
                b.name,
                f"failed: {b.error}" if b.error else "complete" if b.finished_at else "under way",
                ago(b.requested_at),
                ago(b.finished_at),
                b.node,
                b.epoch,
                f"{b.size_bytes / MB:.0f}",
            )
            for b in found.backups
        ],
        empty="No backup yet: `fly postgres backup create`.",
    )


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
