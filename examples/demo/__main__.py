"""The demo's command: `python -m examples.demo [--keep] [--etcd-leader]`."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from examples.demo.commands import DemoFailed, Fly, console
from examples.demo.story import CLUSTER, bring_back, build, lose_the_primary


def tell_what_next(settings: Path) -> None:
    """How to go on with a cluster that was left up."""
    console.print("\n[bold]The cluster is up. Try:[/]")
    console.print(f"  export XDG_CONFIG_HOME={settings} PATH={Path(sys.executable).parent}:$PATH")
    for line in (
        "fly status -a chat",
        "fly logs -a chat",
        "fly postgres failover -a chat-db",
        "fly postgres connect -a chat-db -- -d chat -c 'select count(*) from messages'",
        "fly hosts list     # then: curl -H 'Host: chat' http://ADDRESS:8080/api/messages",
        f"fly chaos kill-host --name {CLUSTER} iad",
        f"fly cluster down --name {CLUSTER}     # ends it",
    ):
        console.print(f"  {line}", markup=False)


@click.command()
@click.option("--keep", is_flag=True, help="Leave the cluster up.")
@click.option("--etcd-leader", is_flag=True, help="Let etcd's own leader die with the primary.")
@click.option(
    "--provider",
    type=click.Choice(["process", "docker"]),
    default="process",
    show_default=True,
    help="What a host is: processes, or a container with an engine of its own.",
)
def main(keep: bool, etcd_leader: bool, provider: str) -> None:
    """Three regions on this machine; the primary's region dies; nothing is lost."""
    if etcd_leader and provider == "docker":
        raise click.UsageError("--etcd-leader needs hosts that are processes: etcd is asked as one of them.")
    began = time.monotonic()
    settings = Path(tempfile.mkdtemp(prefix="flyd-demo-"))
    fly = Fly(settings)
    problems: list[str] = []
    try:
        build(fly, settings, provider)
        verdict, _, victim = asyncio.run(lose_the_primary(fly, etcd_leader))
        asyncio.run(bring_back(fly, victim))
        problems = verdict.problems()
    except DemoFailed as error:
        problems = [str(error)]
    finally:
        if keep:
            tell_what_next(settings)
        else:
            console.print("\n[bold]── Everything is stopped[/]")
            subprocess.run([fly.program, "cluster", "down", "--name", CLUSTER], check=False)
            shutil.rmtree(settings, ignore_errors=True)
    for problem in problems:
        console.print(f"[bold red]The demo failed:[/] {problem}", highlight=False)
    if problems:
        sys.exit(1)
    console.print(f"[bold green]Nothing was lost.[/] The demo took {time.monotonic() - began:.0f} s.")


if __name__ == "__main__":
    main()
