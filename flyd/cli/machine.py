"""fly machine: the machines of an application, one by one."""

from __future__ import annotations

import sys

import click
from rich.text import Text

from flyd.cli.connection import app_name, call, channel, stream
from flyd.cli.options import app_option, json_option
from flyd.cli.output import ago, done, emit, out, state, table
from flyd.errors import FlydError
from flyd.v1 import machines_pb2, machines_pb2_grpc

WAIT_S = 60.0


def stub() -> machines_pb2_grpc.MachinesServiceStub:
    """The machines service of the cluster."""
    return machines_pb2_grpc.MachinesServiceStub(channel())


def checks_word(machine: machines_pb2.Machine) -> Text:
    """ "2/2 passing", or what is not."""
    if not machine.checks:
        return Text("-")
    passing = sum(1 for c in machine.checks if c.status == "passing")
    worst = "passing" if passing == len(machine.checks) else "critical"
    return Text.assemble(f"{passing}/{len(machine.checks)} ", state(worst))


def state_word(machine: machines_pb2.Machine) -> Text:
    """The state, and that its host is lost."""
    if machine.host_status != "ok":
        return Text.assemble(state("unreachable"), f" (was {machine.state})")
    return state(machine.state)


@click.group()
def machine() -> None:
    """Machines: running copies of an application."""


@machine.command("list")
@app_option
@click.option("--all", "all_apps", is_flag=True, help="Of all apps.")
@json_option
def list_machines(app: str | None, all_apps: bool, json_output: bool) -> None:
    """The machines of an app."""
    request = machines_pb2.ListMachinesRequest(app_name="" if all_apps else app_name(app))
    found = call(stub().ListMachines, request).machines
    if json_output:
        emit(found)
        return
    table(
        ["ID", "NAME", "APP", "REGION", "HOST", "STATE", "CHECKS", "RELEASE", "ADDRESS", "PID", "STARTED"],
        [
            (
                m.id,
                m.name,
                m.app_name,
                m.region,
                m.host,
                state_word(m),
                checks_word(m),
                f"v{m.release_version}" if m.release_version else "-",
                m.private_ip,
                m.pid or "-",
                ago(m.started_at),
            )
            for m in found
        ],
        empty="No machines.",
    )


@machine.command()
@click.argument("machine_id")
@app_option
@json_option
def status(machine_id: str, app: str | None, json_output: bool) -> None:
    """One machine with its checks and its history."""
    found = call(
        stub().GetMachine, machines_pb2.GetMachineRequest(app_name=app or "", machine_id=machine_id)
    ).machine
    if json_output:
        emit(found)
        return
    click.echo(f"{found.id}  {found.name}  {found.region}/{found.host}  {found.private_ip}")
    out.print(Text.assemble(state_word(found), f", wanted {found.desired_state}. {found.detail}"))
    table(
        ["CHECK", "STATUS", "OUTPUT", "SINCE"],
        [(c.name, state(c.status), c.output, ago(c.updated_at)) for c in found.checks],
        empty="No checks.",
    )
    table(
        ["EVENT", "STATUS", "SOURCE", "WHEN", "DETAIL"],
        [(e.type, e.status, e.source, ago(e.timestamp), e.detail) for e in found.events],
        empty="No events.",
    )


def _wait(machine_id: str, app: str, wanted: str) -> None:
    request = machines_pb2.WaitMachineRequest(
        app_name=app, machine_id=machine_id, state=wanted, timeout=WAIT_S
    )
    call(stub().WaitMachine, request, WAIT_S + 5)


@machine.command()
@click.argument("machine_id")
@app_option
def start(machine_id: str, app: str | None) -> None:
    """Start a stopped machine and wait until it is started."""
    request = machines_pb2.StartMachineRequest(app_name=app or "", machine_id=machine_id)
    call(stub().StartMachine, request)
    _wait(machine_id, app or "", "started")
    done(f"machine {machine_id} is started")


@machine.command()
@click.argument("machine_id")
@app_option
def stop(machine_id: str, app: str | None) -> None:
    """Stop a machine and wait until it is stopped."""
    call(stub().StopMachine, machines_pb2.StopMachineRequest(app_name=app or "", machine_id=machine_id))
    _wait(machine_id, app or "", "stopped")
    done(f"machine {machine_id} is stopped")


@machine.command()
@click.argument("machine_id")
@app_option
@click.option("--force", is_flag=True, help="Also if it is started.")
def destroy(machine_id: str, app: str | None, force: bool) -> None:
    """Destroy a machine; its volumes stay."""
    request = machines_pb2.DestroyMachineRequest(app_name=app or "", machine_id=machine_id, force=force)
    call(stub().DestroyMachine, request)
    done(f"machine {machine_id} is being destroyed")


@machine.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="Example: fly machine exec 3d8d9f12a4 -- env",
)
@click.argument("machine_id")
@click.argument("command", nargs=-1, required=True)
@click.pass_context
def exec(ctx: click.Context, machine_id: str, command: tuple[str, ...]) -> None:
    """Run a command in a machine; its exit code is passed on."""
    if command[0] == "--":  # click leaves it in where options may not follow arguments
        command = command[1:]
    request = machines_pb2.ExecMachineRequest(machine_id=machine_id, command=list(command))
    code: int | None = None
    for part in stream(stub().ExecMachine, request):
        sys.stdout.buffer.write(part.stdout)
        sys.stderr.buffer.write(part.stderr)
        sys.stdout.flush()
        if part.HasField("exit_code"):
            code = part.exit_code
    if code is None:
        raise FlydError(f"the command in {machine_id} ended without an exit code: its host may be lost")
    ctx.exit(code)
