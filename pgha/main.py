"""The `pgha` command, and the composition root of pgha.

`pgha run` is one member's agent: started as a machine by flyd, or by hand (docs/pgha.md). It runs until
SIGTERM or SIGINT, then hands the primary's role over if it has it, stops Postgres and ends with code 0. The
other commands look at a cluster and ask things of it. What they are told is in settings.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path
from typing import NoReturn, TypeVar

import click
import msgspec
import structlog

from flyd.errors import FlydError, InvalidInput, Refused
from flyd.identity.credentials import Credentials
from flyd.ports import KV
from flyd.store.etcd import EtcdKV
from flyd.store.system import SystemClock, SystemEntropy
from pgha import operate
from pgha.agent import Agent
from pgha.backups import Backups
from pgha.binaries import find_binaries
from pgha.drill import Drills
from pgha.guard import Guard
from pgha.killer import KillerProcess
from pgha.lookout import TcpLookout
from pgha.model import AgentConfig
from pgha.operate import look
from pgha.pgconf import PostgresConfig
from pgha.postgres import RealPostgres
from pgha.processes import unprivileged
from pgha.requests import request_pause, request_resume, taken
from pgha.settings import Settings, describe, read
from pgha.voice import UdpVoice

T = TypeVar("T")


@click.group()
@click.option("--config", default="", metavar="FILE", help="Settings as TOML; the environment wins.")
@click.pass_context
def cli(ctx: click.Context, config: str) -> None:
    """Keep one member of a highly available Postgres cluster; look after the cluster.

    \b
    Examples:
      pgha --config /etc/pgha.toml run
      pgha --config /etc/pgha.toml status
      pgha --config /etc/pgha.toml switchover --to orders-2
    """
    ctx.obj = config


@cli.command(epilog="\b\n" + "\n".join(describe()))
@click.pass_obj
def run(config: str) -> None:
    """Run this member until told to stop."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    with _told():
        asyncio.run(_run(read(config, os.environ)))


@cli.command()
@click.option("--json", "json_output", is_flag=True, help="As JSON.")
@click.pass_obj
def status(config: str, json_output: bool) -> None:
    """Who is primary, whether it lives, and what each member last said."""
    seen = _ask(config, look)
    click.echo(msgspec.json.encode(seen).decode() if json_output else operate.table(seen))


@cli.command()
@click.option("--to", "target", default="", metavar="NODE", help="The best replica if not given.")
@click.pass_obj
def switchover(config: str, target: str) -> None:
    """Move the primary, and wait until the next one serves."""
    leader = _ask(config, lambda kv, cluster: operate.switch_over(kv, cluster, target, SystemClock()))
    click.echo(f"{leader.node} is primary, epoch {leader.epoch}")


@cli.command()
@click.option("--reason", default="", help="For whoever finds it paused.")
@click.pass_obj
def pause(config: str, reason: str) -> None:
    """Nobody takes over and no data is replaced until `resume`."""
    _ask(config, lambda kv, cluster: request_pause(kv, cluster, reason, SystemClock().wall_s()))
    click.echo("paused: a primary that ends now has no successor until `pgha resume`")


@cli.command()
@click.pass_obj
def resume(config: str) -> None:
    """End a pause: what was held back happens now."""
    _ask(config, request_resume)
    click.echo("the cluster takes care of itself again")


@cli.command()
@click.pass_obj
def backup(config: str) -> None:
    """Take a base backup into the archive (`archive_dir`), and wait for it."""
    if not read(config, os.environ).text("archive_dir"):
        _fail(
            Refused("this cluster has no archive", hint="Its members need archive_dir from the first start.")
        )
    made = _ask(config, lambda kv, cluster: operate.back_up(kv, cluster, SystemClock(), SystemEntropy()))
    click.echo(f"backup {made.name} is complete: {made.size_bytes / 1e6:.0f} MB from {made.node}")


@cli.command()
@click.pass_obj
def backups(config: str) -> None:
    """The base backups, oldest first."""
    click.echo(operate.backups_table(_ask(config, taken)))


def _ask(config: str, question: Callable[[KV, str], Awaitable[T]]) -> T:
    """What etcd, or the agents through it, answer about the configured cluster."""

    async def asked() -> T:
        settings = read(config, os.environ)
        kv = _store(settings)
        try:
            return await question(kv, settings.text("cluster"))
        finally:
            await kv.close()

    with _told():
        return asyncio.run(asked())


@contextlib.contextmanager
def _told() -> Generator[None]:
    """Our errors, said to a person; the process ends with their code."""
    try:
        yield
    except FlydError as error:
        _fail(error)
    except BaseExceptionGroup as group:  # from the agent's task group
        ours, others = group.split(FlydError)
        if ours is None or others is not None:
            raise
        _fail(_first(ours))


def _fail(error: FlydError) -> NoReturn:
    click.echo(f"pgha: {error}", err=True)
    if error.hint:
        click.echo(f"  {error.hint}", err=True)
    sys.exit(error.exit_code)


def _store(settings: Settings) -> EtcdKV:
    identity = settings.text("etcd_identity")
    return EtcdKV(list(settings.texts("etcd")), Credentials(Path(identity)) if identity else None)


async def _run(settings: Settings) -> None:
    config = _agent_config(settings)
    kv = _store(settings)
    server = _postgres_config(settings, config)
    postgres = RealPostgres(server)
    killer = KillerProcess(postgres.data_dir)
    voice = UdpVoice(config.address, settings.text("replication_password"))
    agent = Agent(config, kv, postgres, SystemClock(), killer, TcpLookout(), voice)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, agent.retire)
    backups = Backups(config, server, kv, SystemClock(), SystemEntropy(), agent)
    guard = Guard(config, server, postgres, kv, SystemClock(), agent.journal)
    drills = Drills(config, server, kv, SystemClock(), agent)
    try:
        async with asyncio.TaskGroup() as group:
            besides = [
                group.create_task(backups.keep(), name="pgha-backups"),
                group.create_task(drills.keep(), name="pgha-drills"),
                group.create_task(guard.keep(), name="pgha-guard"),
            ]
            await agent.run()
            for beside in besides:
                beside.cancel()
    finally:
        killer.close()
        await kv.close()


def _agent_config(settings: Settings) -> AgentConfig:
    node, voters = settings.text("node"), settings.texts("members")
    if node not in voters or len(set(voters)) != len(voters) or len(voters) < 2:
        raise InvalidInput(
            f"{settings.place('members')}={','.join(voters)} must be two or more different names, "
            f"{node} one of them"
        )
    host = settings.text("address")
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        raise InvalidInput(
            f"{settings.place('address')}={host} is not an IP address", hint="without the port"
        ) from None
    return AgentConfig(
        cluster=settings.text("cluster"),
        node=node,
        voters=voters,
        region=settings.text("region"),
        address=f"{host}:{settings.text('port')}",
        machine_id=os.environ.get("FLY_MACHINE_ID", ""),
    )


def _postgres_config(settings: Settings, config: AgentConfig) -> PostgresConfig:
    directory = Path(settings.text("data_dir")).absolute()
    user = unprivileged()
    short = hashlib.sha256(str(directory).encode()).hexdigest()[:12]
    return PostgresConfig(
        node=config.node,
        members=config.voters,
        host=config.address.rpartition(":")[0],
        port=int(settings.text("port")),
        directory=str(directory),
        bin_dir=str(find_binaries(settings.text("bin_dir"), user, directory.parent)),
        socket_dir=str(Path(tempfile.gettempdir()) / f"pgha-{short}"),
        superuser_password=settings.text("superuser_password"),
        replication_password=settings.text("replication_password"),
        archive_dir=settings.text("archive_dir"),
        restore_from=settings.text("restore_from"),
        restore_to=settings.text("restore_to"),
    )


def _first(group: BaseExceptionGroup[FlydError]) -> FlydError:
    for error in group.exceptions:
        return _first(error) if isinstance(error, BaseExceptionGroup) else error
    raise AssertionError("an exception group is never empty")


def main() -> None:
    """Entry point of the `pgha` program."""
    cli()
