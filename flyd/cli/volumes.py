"""fly volumes."""

from __future__ import annotations

import click

from flyd.cli.connection import app_name, call, channel
from flyd.cli.options import app_option, json_option
from flyd.cli.output import ago, done, emit, table
from flyd.errors import Refused
from flyd.v1 import volumes_pb2, volumes_pb2_grpc


def stub() -> volumes_pb2_grpc.VolumesServiceStub:
    """The volumes service of the cluster."""
    return volumes_pb2_grpc.VolumesServiceStub(channel())


@click.group()
def volumes() -> None:
    """Volumes: storage on one host, attached to at most one machine."""


@volumes.command("list")
@app_option
@click.option("--all", "all_apps", is_flag=True, help="Of all apps.")
@json_option
def list_volumes(app: str | None, all_apps: bool, json_output: bool) -> None:
    """The volumes of an app."""
    request = volumes_pb2.ListVolumesRequest(app_name="" if all_apps else app_name(app))
    found = call(stub().ListVolumes, request).volumes
    if json_output:
        emit(found)
        return
    table(
        ["ID", "NAME", "APP", "REGION", "HOST", "SIZE GB", "ATTACHED TO", "CREATED"],
        [
            (v.id, v.name, v.app_name, v.region, v.host, v.size_gb, v.attached_machine_id or "-",
             ago(v.created_at))
            for v in found
        ],
        empty="No volumes.",
    )  # fmt: skip


@volumes.command(epilog="Example: fly volumes create data --region ams --size 10")
@click.argument("name")
@app_option
@click.option("-r", "--region", required=True, help="The region it lives in.")
@click.option("-s", "--size", default=1, show_default=True, help="In GB.")
@json_option
def create(name: str, app: str | None, region: str, size: int, json_output: bool) -> None:
    """Make a volume on a host of a region."""
    request = volumes_pb2.CreateVolumeRequest(app_name=app_name(app), name=name, region=region, size_gb=size)
    made = call(stub().CreateVolume, request).volume
    if json_output:
        emit(made)
    else:
        done(f"volume {made.id} ({made.name}, {made.size_gb} GB) on {made.host}")


@volumes.command()
@click.argument("volume_id")
@app_option
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
def destroy(volume_id: str, app: str | None, yes: bool) -> None:
    """Delete a volume and its data."""
    if not yes and not click.confirm(f"Delete {volume_id} and all data on it?", err=True):
        raise Refused("nothing was deleted")
    request = volumes_pb2.DestroyVolumeRequest(app_name=app_name(app), volume_id=volume_id)
    call(stub().DestroyVolume, request)
    done(f"volume {volume_id} deleted")
