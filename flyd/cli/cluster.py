"""fly cluster: a whole cluster on this machine, one loopback network per host."""

from __future__ import annotations

from typing import Literal

import click
import msgspec

from flyd.cli.connection import forget_context, save_context
from flyd.cli.options import json_option
from flyd.cli.output import done, emit, say, state, table, waiting
from flyd.cluster.layout import CERTIFICATE_DAYS, HTTP_PORT, container_layout, layout
from flyd.cluster.providers import open_cluster
from flyd.cluster.registry import recall, user_folder
from flyd.model import Resources

BASES = {"process": 11, "docker": 210}

name_option = click.option("--name", default="local", show_default=True, help="Which cluster.")


@click.group()
def cluster() -> None:
    """A cluster on this machine: each host has its own etcd, flyd and Envoy."""


@cluster.command(
    epilog="""\b
Examples:
  fly cluster up
  fly cluster up --regions ams,iad,sin --memory 4096
  fly cluster up --volumes btrfs --disk 10"""
)
@name_option
@click.option("--regions", default="ams,iad,sin", show_default=True, help="One host in each; 1, 3 or 5.")
@click.option(
    "--provider",
    type=click.Choice(["process", "docker"]),
    default="process",
    show_default=True,
    help="What a host is: processes on a loopback network, or a container with an engine of its own.",
)
@click.option("--base", type=int, help="Second number of the hosts' addresses [default: 11, docker: 210].")
@click.option("--cpus", default=4, show_default=True, help="Capacity of each host.")
@click.option("--memory", default=4096, show_default=True, help="Capacity of each host, in MB.")
@click.option("--disk", default=50, show_default=True, help="Capacity of each host, in GB.")
@click.option(
    "--volumes",
    type=click.Choice(["directory", "btrfs"]),
    default="directory",
    show_default=True,
    help="btrfs: a pool of --disk GB for each host, laid aside at once; sizes hold, snapshots cost nothing.",
)
@click.option(
    "--certificate-days",
    type=click.FloatRange(min=0, min_open=True),
    default=CERTIFICATE_DAYS,
    show_default=True,
    help="How long a host's certificate lasts; it renews itself after two thirds.",
)
@json_option
def up(
    name: str,
    regions: str,
    provider: str,
    base: int | None,
    cpus: int,
    memory: int,
    disk: int,
    volumes: Literal["directory", "btrfs"],
    certificate_days: float,
    json_output: bool,
) -> None:
    """Start a cluster and make it the one that `fly` talks to."""
    wanted = tuple(part.strip() for part in regions.split(",") if part.strip())
    shape = container_layout if provider == "docker" else layout
    capacity = Resources(cpus=cpus, memory_mb=memory, disk_gb=disk)
    plan = shape(name, wanted, base or BASES[provider], capacity, certificate_days)
    plan = msgspec.structs.replace(plan, volumes=volumes)
    made = open_cluster(plan)
    with waiting("starting") as update:
        made.up(lambda text: update(f"starting {text}"))
    save_context(plan.api, user_folder(name))
    if json_output:
        emit({"name": name, "api": list(plan.api), "etcd": list(plan.etcd), "root": str(made.root)})
        return
    done(f"cluster {name} is up: {', '.join(h.region for h in plan.hosts)}")
    for host in plan.hosts:
        say(f"  {host.name}: API {host.address}:4280, apps at http://{host.address}:{HTTP_PORT} (by Host)")
    say("Next: `fly hosts list`, or `fly launch` in an app's folder.")


@cluster.command()
@name_option
def down(name: str) -> None:
    """Stop everything of a cluster and delete its data."""
    found = open_cluster(recall(name))
    with waiting("stopping"):
        killed = found.down()
    forget_context(found.plan.api)
    done(f"cluster {name} is gone ({killed} processes ended, its data deleted)")


@cluster.command()
@name_option
@json_option
def status(name: str, json_output: bool) -> None:
    """What runs of a cluster."""
    found = open_cluster(recall(name))
    hosts = found.status()
    if json_output:
        emit([{f: getattr(h, f) for f in h.__struct_fields__} for h in hosts])
        return
    table(
        ["HOST", "REGION", "STATE", "ETCD PID", "FLYD PID", "PROCESSES"],
        [
            (
                h.name,
                h.region,
                state("up" if h.flyd_pid and h.etcd_pid else "lost"),
                h.etcd_pid or "-",
                h.flyd_pid or "-",
                h.processes,
            )
            for h in hosts
        ],
        empty="no hosts",
    )


@cluster.command("start-host")
@name_option
@click.argument("region")
def start_host(name: str, region: str) -> None:
    """Bring a lost host back with the disks it had."""
    found = open_cluster(recall(name))
    with waiting(f"starting {region}"):
        found.start_host(found.plan.host(region))
    done(f"{region} is back")
