"""fly hosts, fly version."""

from __future__ import annotations

from importlib.metadata import version as package_version

import click

from flyd.cli import joining, upkeep
from flyd.cli.connection import call, channel
from flyd.cli.options import json_option
from flyd.cli.output import ago, emit, say, state, table
from flyd.errors import FlydError
from flyd.v1 import hosts_pb2, hosts_pb2_grpc

HAS = ("MACHINES", "CPUS", "MEMORY MB", "DISK GB")  # promised of what there is
COLUMNS = ("HOST", "REGION", "STATE", *HAS, "LABELS", "API", "JOINED", "NOTE")


def stub() -> hosts_pb2_grpc.HostsServiceStub:
    """The hosts service of the cluster."""
    return hosts_pb2_grpc.HostsServiceStub(channel())


@click.group()
def hosts() -> None:
    """The hosts of the cluster."""


for command in (*joining.COMMANDS, *upkeep.COMMANDS):
    hosts.add_command(command)


@hosts.command("list")
@json_option
def list_hosts(json_output: bool) -> None:
    """Every host, with what is promised on it, and what becomes of a lost one's machines."""
    found = call(stub().ListHosts, hosts_pb2.ListHostsRequest()).hosts
    if json_output:
        emit(found)
        return
    table(
        COLUMNS,
        [
            (
                h.name,
                h.region,
                state(h.state),
                h.machine_count,
                f"{h.cpus_used}/{h.cpus}",
                f"{h.memory_mb_used}/{h.memory_mb}",
                f"{h.disk_gb_used}/{h.disk_gb}",
                " ".join(f"{name}={value}" for name, value in sorted(h.labels.items())) or "-",
                h.api_address,
                ago(h.joined_at),
                upkeep.note_of(h),
            )
            for h in found
        ],
        empty="No host has joined.",
    )
    upkeep.show_losses(list(found))


@click.command()
@json_option
def version(json_output: bool) -> None:
    """The version of this command and of the flyd that answers."""
    mine = package_version("flyd")
    try:
        theirs = call(stub().GetVersion, hosts_pb2.GetVersionRequest())
        server, host = theirs.version, theirs.host
    except FlydError as error:
        server, host = "", error.message
    if json_output:
        emit({"fly": mine, "flyd": server, "host": host})
        return
    click.echo(f"fly {mine}")
    say(f"flyd {server} on {host}" if server else f"no flyd answers: {host}")
