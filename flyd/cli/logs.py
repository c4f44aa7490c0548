"""fly logs: history, then new lines as they come, of all machines of an app."""

from __future__ import annotations

import click

from flyd.cli.connection import app_name, stream
from flyd.cli.machine import stub
from flyd.cli.options import app_option, json_option
from flyd.cli.output import clock_time, emit_line
from flyd.v1 import machines_pb2


@click.command(epilog="Examples: fly logs    fly logs --machine 3d8d9f12a4 --no-tail -n 500")
@app_option
@click.option("--machine", default="", help="Only this machine.")
@click.option("--no-tail", is_flag=True, help="Print the history and end.")
@click.option("-n", "--lines", default=100, show_default=True, help="History, for each machine.")
@json_option
def logs(app: str | None, machine: str, no_tail: bool, lines: int, json_output: bool) -> None:
    """Log lines of an app's machines."""
    request = machines_pb2.StreamLogsRequest(
        app_name=app_name(app), machine_id=machine, tail=lines, follow=not no_tail
    )
    for line in stream(stub().StreamLogs, request):
        if json_output:
            emit_line(line)
        else:
            click.echo(f"{clock_time(line.timestamp)} {line.region} [{line.machine_id[:8]}] {line.message}")
