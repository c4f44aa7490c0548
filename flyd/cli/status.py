"""fly status, fly checks: an application at a glance."""

from __future__ import annotations

import click

from flyd.cli import apps as apps_verbs
from flyd.cli import machine as machine_verbs
from flyd.cli.connection import app_name, call
from flyd.cli.options import app_option, json_option
from flyd.cli.output import ago, emit, out, state, table
from flyd.v1 import apps_pb2, machines_pb2


def _machines(app: str) -> list[machines_pb2.Machine]:
    request = machines_pb2.ListMachinesRequest(app_name=app)
    return list(call(machine_verbs.stub().ListMachines, request).machines)


@click.command()
@app_option
@json_option
def status(app: str | None, json_output: bool) -> None:
    """An app and its machines."""
    name = app_name(app)
    found = call(apps_verbs.stub().GetApp, apps_pb2.GetAppRequest(app_name=name)).app
    machines = _machines(name)
    if json_output:
        emit({"app": found, "machines": machines})
        return
    out.print(f"{found.name} ({found.kind}) in {', '.join(found.regions) or 'no region yet'}")
    table(
        ["PROCESS", "ID", "RELEASE", "REGION", "STATE", "CHECKS", "RESTARTS", "STARTED"],
        [
            (
                m.process_group,
                m.id,
                f"v{m.release_version}" if m.release_version else "-",
                m.region,
                machine_verbs.state_word(m),
                machine_verbs.checks_word(m),
                m.restarts,
                ago(m.started_at),
            )
            for m in machines
        ],
        empty="No machines yet: `fly deploy`.",
    )


@click.group()
def checks() -> None:
    """Health checks."""


@checks.command("list")
@app_option
@json_option
def list_checks(app: str | None, json_output: bool) -> None:
    """The newest result of each check of each machine."""
    machines = _machines(app_name(app))
    if json_output:
        emit([{"machine": m.id, "checks": list(m.checks)} for m in machines])
        return
    table(
        ["MACHINE", "REGION", "CHECK", "STATUS", "SINCE", "OUTPUT"],
        [
            (m.id, m.region, c.name, state(c.status), ago(c.updated_at), c.output)
            for m in machines
            for c in m.checks
        ],
        empty="No checks: fly.toml's [[http_service.checks]] or [checks] make them.",
    )
