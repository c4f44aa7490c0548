"""fly apps: create, list and destroy applications."""

from __future__ import annotations

import click

from flyd.cli.connection import call, channel
from flyd.cli.options import json_option, split
from flyd.cli.output import ago, done, emit, table
from flyd.errors import Refused
from flyd.v1 import apps_pb2, apps_pb2_grpc

DESTROY_TIMEOUT_S = 120.0


def stub() -> apps_pb2_grpc.AppsServiceStub:
    """The apps service of the cluster."""
    return apps_pb2_grpc.AppsServiceStub(channel())


@click.group()
def apps() -> None:
    """Applications."""


@apps.command("list")
@json_option
def list_apps(json_output: bool) -> None:
    """All applications."""
    found = call(stub().ListApps, apps_pb2.ListAppsRequest()).apps
    if json_output:
        emit(found)
        return
    table(
        ["NAME", "KIND", "NETWORK", "REGIONS", "STARTED", "CREATED"],
        [
            (
                a.name,
                a.kind,
                a.network or "-",
                ",".join(a.regions),
                f"{a.started_count}/{a.machine_count}",
                ago(a.created_at),
            )
            for a in found
        ],
        empty="No apps yet: `fly launch` makes one.",
    )


@apps.command(epilog="Example: fly apps create chat --regions ams,iad,sin")
@click.argument("name")
@click.option("--regions", help="Where its machines go, by commas; the first is the primary region.")
@click.option(
    "--network", default="", help="A private network apart; machines reach only those of their own."
)
@json_option
def create(name: str, regions: str | None, network: str, json_output: bool) -> None:
    """Make an empty application."""
    request = apps_pb2.CreateAppRequest(app_name=name, regions=split(regions), network=network)
    made = call(stub().CreateApp, request).app
    if json_output:
        emit(made)
    else:
        done(f"app {name} created")


@apps.command()
@click.argument("name")
@click.option("--with-volumes", is_flag=True, help="Also delete its volumes and all data on them.")
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
def destroy(name: str, with_volumes: bool, yes: bool) -> None:
    """Destroy an application and its machines."""
    if not yes and not click.confirm(f"Destroy {name} and all its machines?", err=True):
        raise Refused("nothing was destroyed")
    request = apps_pb2.DeleteAppRequest(app_name=name, with_volumes=with_volumes)
    call(stub().DeleteApp, request, DESTROY_TIMEOUT_S)
    done(f"app {name} destroyed")
