"""fly incidents: what happened to an app or a Postgres cluster, by the clock."""

from __future__ import annotations

import click
from rich.markup import escape

from flyd.cli.connection import app_name, call, channel
from flyd.cli.options import app_option, json_option
from flyd.cli.output import clock_time, emit, out, table
from flyd.errors import NotFound
from flyd.incidents import report as words
from flyd.incidents import timeline
from flyd.incidents.recorder import CLUSTER
from flyd.model import Event
from flyd.v1 import apps_pb2, apps_pb2_grpc, events_pb2, events_pb2_grpc, postgres_pb2, postgres_pb2_grpc

since_option = click.option("--since", default=0.0, help="Only after this time (seconds since the epoch).")


@click.group()
def incidents() -> None:
    """What happened, by the clock."""


def read_events(app: str, since_s: float) -> list[events_pb2.Event]:
    """The events of an app, oldest first."""
    stub = events_pb2_grpc.EventsServiceStub(channel())
    request = events_pb2.ListEventsRequest(app_name=app, since=since_s)
    return list(call(stub.ListEvents, request).events)


@incidents.command("list")
@app_option
@since_option
@json_option
def list_events(app: str | None, since: float, json_output: bool) -> None:
    """The events of an app, oldest first."""
    found = read_events(app_name(app), since)
    if json_output:
        emit(found)
        return
    table(
        ["TIME", "SOURCE", "WHAT", "MESSAGE"],
        [(clock_time(e.timestamp), e.source, e.kind, escape(e.message)) for e in found],
        empty="Nothing has happened.",
    )


@incidents.command("report", epilog="Example: fly incidents report -a chat-db")
@app_option
@since_option
@json_option
def report_incident(app: str | None, since: float, json_output: bool) -> None:
    """The newest incident of an app or a Postgres cluster, and of the hosts it ran on."""
    name = app_name(app)
    events = [_event(e) for e in (*read_events(name, since), *read_events(CLUSTER, since))]
    found = timeline.newest(name, events)
    if not found:
        raise NotFound(
            f"no incident of {name} is on record",
            hint=f"`fly incidents list -a {name}` shows all that was recorded.",
        )
    account = timeline.build(name, found, _regions(name))
    if json_output:
        emit(words.as_dict(account))
    else:
        out.print(escape(words.as_text(account)), highlight=False)


def _event(said: events_pb2.Event) -> Event:
    return Event(
        at_s=said.timestamp,
        app=said.app_name,
        source=said.source,
        kind=said.kind,
        message=said.message,
        fields=dict(said.fields),
    )


def _regions(name: str) -> dict[str, str]:
    """Where the members of a Postgres cluster are; nothing for other apps."""
    app = call(apps_pb2_grpc.AppsServiceStub(channel()).GetApp, apps_pb2.GetAppRequest(app_name=name))
    if app.app.kind != "postgres":
        return {}
    stub = postgres_pb2_grpc.PostgresServiceStub(channel())
    cluster = call(stub.GetCluster, postgres_pb2.GetClusterRequest(cluster_name=name))
    return {member.node: member.region for member in cluster.members}
