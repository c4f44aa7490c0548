"""The `pgha` command: one member's agent, started as a machine by flyd. The composition root of pgha.

`pgha run` reads its configuration from the environment (`pgha run --help` lists it), runs until SIGTERM or
SIGINT, then hands the primary's role over if it has it, stops Postgres and ends with code 0.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import click
import structlog

from flyd.errors import FlydError, InvalidInput
from flyd.identity.credentials import Credentials
from flyd.store.etcd import EtcdKV
from flyd.store.system import SystemClock, SystemEntropy
from pgha.agent import Agent
from pgha.backups import Backups
from pgha.binaries import find_binaries
from pgha.killer import KillerProcess
from pgha.lookout import TcpLookout
from pgha.model import AgentConfig
from pgha.pgconf import PostgresConfig
from pgha.postgres import RealPostgres
from pgha.processes import unprivileged
from pgha.voice import UdpVoice

DEFAULT_PORT = 5432


@click.group()
def cli() -> None:
    """Keep one member of a highly available Postgres cluster."""


@cli.command()
def run() -> None:
    """Run this member until told to stop.

    \b
    Environment:
      PGHA_CLUSTER               name of the cluster (the app)
      PGHA_NODE                  name of this member, one of PGHA_VOTERS
      PGHA_VOTERS                all members, comma-separated; never changes
      PGHA_REGION                or FLY_REGION
      PGHA_ADDRESS               or FLY_PRIVATE_IP: where Postgres listens
      PGHA_PORT                  default 5432
      PGHA_DATA_DIR              this member's directory, on its volume
      FLYD_ETCD                  etcd's client addresses, comma-separated host:port
      FLYD_IDENTITY              folder of the certificate to show to etcd; unset: etcd has no TLS
      PGHA_SUPERUSER_PASSWORD    of user postgres
      PGHA_REPLICATION_PASSWORD  for streaming between members
      PGHA_ARCHIVE_DIR           this cluster's own folder for WAL and base backups, the same for all members
      PGHA_RESTORE_FROM          begin with what this archive of another cluster has
      PGHA_RESTORE_TO            up to this instant (ISO 8601 with offset); unset: all of it
      PGHA_BIN_DIR               PostgreSQL's programs, if not where they usually are
    """
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
    try:
        asyncio.run(_run(os.environ))
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


async def _run(env: Mapping[str, str]) -> None:
    config = _agent_config(env)
    identity = env.get("FLYD_IDENTITY")
    kv = EtcdKV(
        [e.strip() for e in _needed(env, "FLYD_ETCD").split(",") if e.strip()],
        Credentials(Path(identity)) if identity else None,
    )
    server = _postgres_config(env, config)
    postgres = RealPostgres(server)
    killer = KillerProcess(postgres.data_dir)
    voice = UdpVoice(config.address, _needed(env, "PGHA_REPLICATION_PASSWORD"))
    agent = Agent(config, kv, postgres, SystemClock(), killer, TcpLookout(), voice)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, agent.retire)
    backups = Backups(config, server, kv, SystemClock(), SystemEntropy(), agent)
    try:
        async with asyncio.TaskGroup() as group:
            taking = group.create_task(backups.keep(), name="pgha-backups")
            await agent.run()
            taking.cancel()
    finally:
        killer.close()
        await kv.close()


def _agent_config(env: Mapping[str, str]) -> AgentConfig:
    node = _needed(env, "PGHA_NODE")
    voters = tuple(v.strip() for v in _needed(env, "PGHA_VOTERS").split(",") if v.strip())
    if node not in voters or len(set(voters)) != len(voters) or len(voters) < 2:
        raise InvalidInput(
            f"PGHA_VOTERS={','.join(voters)} must be two or more different names, {node} one of them"
        )
    host = _needed(env, "PGHA_ADDRESS", "FLY_PRIVATE_IP")
    return AgentConfig(
        cluster=_needed(env, "PGHA_CLUSTER"),
        node=node,
        voters=voters,
        region=_needed(env, "PGHA_REGION", "FLY_REGION"),
        address=f"{host}:{_port(env)}",
        machine_id=env.get("FLY_MACHINE_ID", ""),
    )


def _postgres_config(env: Mapping[str, str], config: AgentConfig) -> PostgresConfig:
    directory = Path(_needed(env, "PGHA_DATA_DIR")).absolute()
    user = unprivileged()
    short = hashlib.sha256(str(directory).encode()).hexdigest()[:12]
    return PostgresConfig(
        node=config.node,
        members=config.voters,
        host=config.address.rpartition(":")[0],
        port=_port(env),
        directory=str(directory),
        bin_dir=str(find_binaries(env.get("PGHA_BIN_DIR", ""), user, directory.parent)),
        socket_dir=str(Path(tempfile.gettempdir()) / f"pgha-{short}"),
        superuser_password=_needed(env, "PGHA_SUPERUSER_PASSWORD"),
        replication_password=_needed(env, "PGHA_REPLICATION_PASSWORD"),
        archive_dir=env.get("PGHA_ARCHIVE_DIR", ""),
        restore_from=env.get("PGHA_RESTORE_FROM", ""),
        restore_to=env.get("PGHA_RESTORE_TO", ""),
    )


def _port(env: Mapping[str, str]) -> int:
    text = env.get("PGHA_PORT", str(DEFAULT_PORT))
    if not text.isdigit():
        raise InvalidInput(f"PGHA_PORT={text} is not a port number")
    return int(text)


def _needed(env: Mapping[str, str], *names: str) -> str:
    for name in names:
        if env.get(name):
            return env[name]
    raise InvalidInput(f"{' or '.join(names)} is not set", hint="see `pgha run --help`")


def _first(group: BaseExceptionGroup[FlydError]) -> FlydError:
    for error in group.exceptions:
        return _first(error) if isinstance(error, BaseExceptionGroup) else error
    raise AssertionError("an exception group is never empty")


def main() -> None:
    """Entry point of the `pgha` program."""
    cli()
