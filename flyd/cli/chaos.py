"""fly chaos: faults on a cluster of this machine, to see what your app and flyd do.

Nothing here can reach a cluster that `fly cluster up` did not start on this machine.
"""

from __future__ import annotations

import click

from flyd.cli.cluster import name_option
from flyd.cli.options import json_option
from flyd.cli.output import done, emit
from flyd.cluster import faults
from flyd.cluster.layout import LocalHost
from flyd.cluster.providers import open_cluster
from flyd.cluster.registry import Cluster, recall


@click.group()
def chaos() -> None:
    """Faults on a local cluster: hosts die, freeze, are cut off, have a full disk or a slow link."""


def _host(name: str, region: str) -> tuple[Cluster, LocalHost]:
    found = open_cluster(recall(name))
    return found, found.plan.host(region)


@chaos.command("kill-host")
@name_option
@click.argument("region")
def kill_host(name: str, region: str) -> None:
    """Lose a host: SIGKILL its flyd, Envoy, etcd member and machines, as a power cut would."""
    cluster, host = _host(name, region)
    killed = cluster.kill_host(host)
    done(f"{region} is dead ({killed} processes). `fly cluster start-host {region}` brings it back.")


@chaos.command("pause-host")
@name_option
@click.argument("region")
def pause_host(name: str, region: str) -> None:
    """Freeze everything on a host, as a stuck virtual machine would."""
    cluster, host = _host(name, region)
    cluster.pause_host(host)
    done(f"{region} is frozen. `fly chaos resume-host {region}` lets it go on.")


@chaos.command("resume-host")
@name_option
@click.argument("region")
def resume_host(name: str, region: str) -> None:
    """Let a frozen host go on."""
    cluster, host = _host(name, region)
    cluster.resume_host(host)
    done(f"{region} goes on")


@chaos.command()
@name_option
@click.argument("region")
def partition(name: str, region: str) -> None:
    """Cut a host off from all others; it lives on alone. Only with --provider docker."""
    cluster, host = _host(name, region)
    cluster.partition(host)
    done(f"{region} is cut off. `fly chaos heal {region}` connects it again.")


@chaos.command()
@name_option
@click.argument("region")
def heal(name: str, region: str) -> None:
    """Connect a host again."""
    cluster, host = _host(name, region)
    cluster.heal(host)
    done(f"{region} is connected")


@chaos.command("kill-flyd")
@name_option
@click.argument("region")
def kill_flyd(name: str, region: str) -> None:
    """SIGKILL a host's flyd and start it again: no machine may notice."""
    cluster, host = _host(name, region)
    cluster.kill_flyd(host)
    done(f"flyd of {region} was killed and starts again")


@chaos.command("fill-disk", epilog="Example: fly chaos fill-disk ams --leave-mb 100")
@name_option
@click.argument("region")
@click.option("--leave-mb", type=click.IntRange(min=0), default=0, show_default=True, help="Free space left.")
@json_option
def fill_disk(name: str, region: str, leave_mb: int, json_output: bool) -> None:
    """Fill a host's data disk. Only with --provider docker, whose hosts have disks of their own."""
    cluster, host = _host(name, region)
    free = faults.fill_disk(cluster, host, leave_mb)
    _tell_free(host, free, json_output, f"`fly chaos free-disk {region}` frees it.")


@chaos.command("free-disk")
@name_option
@click.argument("region")
@json_option
def free_disk(name: str, region: str, json_output: bool) -> None:
    """Free a host's data disk of what fill-disk put there."""
    cluster, host = _host(name, region)
    _tell_free(host, faults.free_disk(cluster, host), json_output, "")


def _tell_free(host: LocalHost, free_mb: int, json_output: bool, then: str) -> None:
    if json_output:
        emit({"host": host.name, "free_mb": free_mb})
        return
    done(f"{host.region} has {free_mb} MB free on its data disk. {then}".rstrip())


@chaos.command("slow-link", epilog="Example: fly chaos slow-link sin --kbit 512")
@name_option
@click.argument("region")
@click.option(
    "--kbit",
    type=click.IntRange(min=faults.MIN_KBIT),
    default=1000,
    show_default=True,
    help="What passes in a second, either way, in 1000 bits.",
)
def slow_link(name: str, region: str, kbit: int) -> None:
    """Make a host's network slow. Only with --provider docker."""
    cluster, host = _host(name, region)
    faults.slow_link(cluster, host, kbit)
    done(f"{region} has {kbit} kbit/s. `fly chaos fast-link {region}` ends that.")


@chaos.command("fast-link")
@name_option
@click.argument("region")
def fast_link(name: str, region: str) -> None:
    """Let a host's network be as fast as it is."""
    cluster, host = _host(name, region)
    faults.fast_link(cluster, host)
    done(f"{region} is as fast as it was")
