"""fly chaos: faults on a cluster of this machine, to see what your app and flyd do.

Nothing here can reach a cluster that `fly cluster up` did not start on this machine.
"""

from __future__ import annotations

import click

from flyd.cli.cluster import name_option
from flyd.cli.output import done
from flyd.cluster.layout import LocalHost
from flyd.cluster.registry import Cluster, open_cluster, recall


@click.group()
def chaos() -> None:
    """Faults on a local cluster: hosts die, freeze, are cut off."""


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
