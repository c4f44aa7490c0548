"""fly incidents: what happened to an app or a Postgres cluster, by the clock."""

from __future__ import annotations

import click
from rich.markup import escape

from flyd.cli.connection import app_name, call, channel
from flyd.cli.options import app_option, json_option
from flyd.cli.output import clock_time, emit, table
from flyd.v1 import events_pb2, events_pb2_grpc


@click.group()
def incidents() -> None:
    """What happened, by the clock."""


@incidents.command("list")
@app_option
@click.option("--since", default=0.0, help="Only after this time (seconds since the epoch).")
@json_option
def list_events(app: str | None, since: float, json_output: bool) -> None:
    """The events of an app, oldest first."""
    stub = events_pb2_grpc.EventsServiceStub(channel())
    request = events_pb2.ListEventsRequest(app_name=app_name(app), since=since)
    found = call(stub.ListEvents, request).events
    if json_output:
        emit(found)
        return
    table(
        ["TIME", "SOURCE", "WHAT", "MESSAGE"],
        [(clock_time(e.timestamp), e.source, e.kind, escape(e.message)) for e in found],
        empty="Nothing has happened.",
    )
