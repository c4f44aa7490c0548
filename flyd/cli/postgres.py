"""fly postgres: clusters that fail over by themselves."""

from __future__ import annotations

import subprocess

import click
from rich.text import Text

from flyd.cli.connection import app_name, call
from flyd.cli.options import app_option, json_option, split
from flyd.cli.output import ago, done, emit, note, out, state, table, waiting
from flyd.cli.postgres_backups import backup, restore
from flyd.cli.postgres_common import cluster_argument, stub
from flyd.cli.postgres_import import import_database, program
from flyd.cli.postgres_members import members
from flyd.v1 import postgres_pb2

CREATE_TIMEOUT_S = 120.0
FAILOVER_TIMEOUT_S = 60.0


@click.group()
def postgres() -> None:
    """Postgres with its primary in one region, replicas in others, and take-over by itself."""


postgres.add_command(backup)
postgres.add_command(members)
postgres.add_command(restore)
postgres.add_command(import_database)


@postgres.command(epilog="Example: fly postgres create chat-db --regions ams,iad,sin")
@click.argument("name")
@click.option("--regions", required=True, help="A member in each; the first has the primary. At least two.")
@click.option("--volume-size", default=1, show_default=True, help="GB for each member.")
@click.option("--memory", default=256, show_default=True, help="MB for each member.")
@click.option("--network", default="", help="The private network of the apps that it is for.")
@click.option("--archive-dir", default="", help="A folder that all hosts reach, for WAL and backups.")
@json_option
def create(
    name: str,
    regions: str,
    volume_size: int,
    memory: int,
    network: str,
    archive_dir: str,
    json_output: bool,
) -> None:
    """Make a cluster and wait until its primary takes writes."""
    request = postgres_pb2.CreateClusterRequest(
        cluster_name=name,
        regions=split(regions),
        volume_size_gb=volume_size,
        memory_mb=memory,
        network=network,
        archive_dir=archive_dir,
    )
    with waiting(f"creating {name}: a member in each of {regions}"):
        made = call(stub().CreateCluster, request, CREATE_TIMEOUT_S)
    if json_output:
        emit(made)
    else:
        port = made.endpoint_port
        done(f"Postgres {name} takes writes: port {port} on every host; reads near you: port {port + 1}")


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
    if found.paused:
        why = f": {found.pause_reason}" if found.pause_reason else ""
        out.print(f"paused {ago(found.paused_at)}{why}. Nothing happens by itself until `resume`.")
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
    for member in found.members:
        for line in troubles(member):
            note(line)


def troubles(member: postgres_pb2.PostgresMember) -> list[str]:
    """What of its disk or archive somebody should know at three in the morning."""
    found: list[str] = []
    if member.disk_state not in ("", "ok"):
        free, total = member.disk_free_bytes >> 20, member.disk_total_bytes >> 20
        takes = ", so nothing is written" if member.disk_state == "read-only" else ""
        found.append(f"{member.node}: disk {member.disk_state}, {free} MB of {total} MB free{takes}")
    if member.archive_failing_since:
        since, waiting = ago(member.archive_failing_since), member.archive_waiting
        found.append(
            f"{member.node}: archiving fails since {since} at {member.archive_failing_segment}, "
            f"{waiting} segments wait on its disk"
        )
    return found


@postgres.command(epilog="Example: fly postgres switchover -a chat-db --target chat-db-2")
@cluster_argument
@click.option("--target", default="", help="The member that is to be primary; default: the most advanced.")
@json_option
def switchover(cluster: str | None, target: str, json_output: bool) -> None:
    """Move the primary, planned: nothing is lost, writes pause for a moment."""
    request = postgres_pb2.FailoverRequest(cluster_name=app_name(cluster), target=target)
    with waiting("the primary hands over"):
        made = call(stub().Failover, request, FAILOVER_TIMEOUT_S)
    if json_output:
        emit(made)
    else:
        done(f"primary is {made.primary} (epoch {made.epoch})")


postgres.add_command(switchover, "failover")  # Fly's name for it


@postgres.command(epilog="Example: fly postgres pause -a chat-db --reason 'moving iad to new disks'")
@cluster_argument
@click.option("--reason", default="", help="Shown by `status`, for whoever looks at it at night.")
@json_option
def pause(cluster: str | None, reason: str, json_output: bool) -> None:
    """Hold back all that happens by itself: nobody takes over, nobody's data is replaced.

    A primary that ends meanwhile stays down until `resume`.
    """
    request = postgres_pb2.PauseClusterRequest(cluster_name=app_name(cluster), reason=reason)
    made = call(stub().PauseCluster, request)
    if json_output:
        emit(made)
    else:
        done(f"{request.cluster_name} is paused; nobody takes over until `fly postgres resume`")


@postgres.command(epilog="Example: fly postgres resume -a chat-db")
@cluster_argument
@json_option
def resume(cluster: str | None, json_output: bool) -> None:
    """End a pause: what was held back happens now."""
    request = postgres_pb2.ResumeClusterRequest(cluster_name=app_name(cluster))
    made = call(stub().ResumeCluster, request)
    if json_output:
        emit(made)
    else:
        done(f"{request.cluster_name} takes care of itself again")


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
    psql = program("psql")
    note("connecting to the primary through this cluster's endpoint")
    ctx.exit(subprocess.run([psql, uri, *psql_args], check=False).returncode)
