"""fly machine: the machines of an application, one by one.

Verbs that make or describe machines are in machine_config.py, leases in machine_lease.py,
lists and histories in machine_show.py.
"""

from __future__ import annotations

import importlib
import sys

import click
from rich.text import Text

from flyd.cli.connection import call, channel, stream
from flyd.cli.options import app_option, json_option
from flyd.cli.output import done, emit, note, say, state, wants_json
from flyd.errors import FlydError, InvalidInput, Unavailable
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


MORE = {
    "clone": ("machine_config", "clone"),
    "lease": ("machine_lease", "lease"),
    "list": ("machine_show", "list_machines"),
    "metadata": ("machine_config", "metadata"),
    "ps": ("machine_show", "ps"),
    "run": ("machine_config", "run"),
    "status": ("machine_show", "status"),
    "update": ("machine_config", "update"),
    "place": ("scale", "place"),
}
ALIASES = {"create": "run", "kill": "signal", "leases": "lease", "ls": "list"}


class MachineGroup(click.Group):
    """Loads the files of its further verbs when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All verbs, by name."""
        return sorted({*super().list_commands(ctx), *MORE})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb, by its name or flyctl's."""
        name = ALIASES.get(cmd_name, cmd_name)
        if name not in MORE:
            return super().get_command(ctx, name)
        module, attribute = MORE[name]
        command: click.Command = getattr(importlib.import_module(f"flyd.cli.{module}"), attribute)
        return command


@click.group(
    cls=MachineGroup,
    epilog="""\b
Examples:
  fly machine list -a chat --region ams --state started
  fly machine stop 3d8d9f12a4 --signal SIGTERM --timeout 2h
  fly machine update 3d8d9f12a4 --memory 512
  fly machine ps 3d8d9f12a4""",
)
def machine() -> None:
    """Machines: running copies of an application."""


nonce_option = click.option(
    "--nonce", default="", envvar="FLY_LEASE_NONCE", help="Of the lease that you hold on it."
)
signal_option = click.option("-s", "--signal", default="", help="Like SIGTERM; default: as configured.")
timeout_option = click.option(
    "-t", "--timeout", default="", metavar="TIME", help="Until SIGKILL, like 30, 10m or 2h; at most 24h."
)
UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(text: str) -> float | None:
    """A time as people write it: bare seconds, or with s, m or h; None if none is given."""
    if not text:
        return None
    number, unit = (text[:-1], text[-1]) if text[-1] in UNITS_S else (text, "s")
    try:
        return float(number) * UNITS_S[unit]
    except ValueError:
        raise InvalidInput(f"{text!r} is no time", hint="Like 30, 45s, 10m or 2h.") from None


def wait_state(machine_id: str, app: str, wanted: str, within_s: float = WAIT_S, version: str = "") -> None:
    """Wait for a state, in calls of a minute each: the server waits, nothing polls."""
    while True:
        slice_s = min(within_s, WAIT_S)
        request = machines_pb2.WaitMachineRequest(
            app_name=app, machine_id=machine_id, state=wanted, timeout=slice_s, instance_id=version
        )
        try:
            call(stub().WaitMachine, request, slice_s + 5)
            return
        except Unavailable:
            within_s -= slice_s
            if within_s <= 0:
                raise


def _finish(machine_id: str, app: str, wanted: str, detach: bool, within_s: float = WAIT_S) -> None:
    """Wait unless told not to, and say what is so; with --json as the machine."""
    if detach:
        say(f"machine {machine_id} is asked to be {wanted}")
    else:
        wait_state(machine_id, app, wanted, within_s)
        done(f"machine {machine_id} is {wanted}")
    if wants_json():
        emit(get(machine_id, app))


def get(machine_id: str, app: str) -> machines_pb2.Machine:
    """The machine as it is."""
    request = machines_pb2.GetMachineRequest(app_name=app, machine_id=machine_id)
    return call(stub().GetMachine, request).machine


detach_option = click.option("-d", "--detach", is_flag=True, help="Don't wait for it.")


@machine.command(epilog="Example: fly machine start 3d8d9f12a4")
@click.argument("machine_id")
@app_option
@nonce_option
@detach_option
@json_option
def start(machine_id: str, app: str | None, nonce: str, detach: bool, json_output: bool) -> None:
    """Start a stopped machine and wait until it is started."""
    request = machines_pb2.StartMachineRequest(app_name=app or "", machine_id=machine_id, lease_nonce=nonce)
    call(stub().StartMachine, request)
    _finish(machine_id, app or "", "started", detach)


@machine.command(
    epilog="""\b
Examples:
  fly machine stop 3d8d9f12a4
  fly machine stop 3d8d9f12a4 --signal SIGTERM --timeout 2h    its visitors may finish
Asked again while it waits, the newest wish counts: --timeout 0 ends it now."""
)
@click.argument("machine_id")
@app_option
@signal_option
@timeout_option
@nonce_option
@detach_option
@json_option
def stop(
    machine_id: str, app: str | None, signal: str, timeout: str, nonce: str, detach: bool, json_output: bool
) -> None:
    """Stop a machine and wait until it is stopped."""
    timeout_s = seconds(timeout)
    request = machines_pb2.StopMachineRequest(
        app_name=app or "", machine_id=machine_id, signal=signal, timeout=timeout_s, lease_nonce=nonce
    )
    call(stub().StopMachine, request)
    if timeout_s is None:
        timeout_s = get(machine_id, app or "").config.stop.timeout
    _finish(machine_id, app or "", "stopped", detach, timeout_s + WAIT_S)


@machine.command(epilog="Example: fly machine suspend 3d8d9f12a4    it says what to do instead")
@click.argument("machine_id")
@app_option
def suspend(machine_id: str, app: str | None) -> None:
    """Refused: no driver here keeps a machine's memory. Stop the machine instead."""
    request = machines_pb2.SuspendMachineRequest(app_name=app or "", machine_id=machine_id)
    call(stub().SuspendMachine, request)


@machine.command(epilog="Example: fly machine restart 3d8d9f12a4 --timeout 30")
@click.argument("machine_id")
@app_option
@signal_option
@timeout_option
@nonce_option
@json_option
def restart(
    machine_id: str, app: str | None, signal: str, timeout: str, nonce: str, json_output: bool
) -> None:
    """End a machine's process and start it again; also one that rests or gave up."""
    request = machines_pb2.RestartMachineRequest(
        app_name=app or "", machine_id=machine_id, signal=signal, timeout=seconds(timeout), lease_nonce=nonce
    )
    before = get(machine_id, app or "")
    call(stub().RestartMachine, request)
    note(f"it was {before.state}; `fly machine status {machine_id}` shows how it goes")
    done(f"machine {machine_id} is being restarted")
    if json_output:
        emit(get(machine_id, app or ""))


@machine.command(epilog="Example: fly machine signal 3d8d9f12a4 SIGHUP")
@click.argument("machine_id")
@click.argument("signal", default="SIGINT")
@app_option
@nonce_option
def signal(machine_id: str, signal: str, app: str | None, nonce: str) -> None:
    """Send a signal (default SIGINT) to a machine's main process, once."""
    request = machines_pb2.SignalMachineRequest(
        app_name=app or "", machine_id=machine_id, signal=signal, lease_nonce=nonce
    )
    call(stub().SignalMachine, request)
    done(f"{signal} sent to machine {machine_id}")


@machine.command(epilog="Example: fly machine cordon 3d8d9f12a4")
@click.argument("machine_id")
@app_option
@nonce_option
def cordon(machine_id: str, app: str | None, nonce: str) -> None:
    """Keep a machine out of routing: no edge sends it requests. It runs on."""
    request = machines_pb2.CordonMachineRequest(app_name=app or "", machine_id=machine_id, lease_nonce=nonce)
    call(stub().CordonMachine, request)
    done(f"machine {machine_id} gets no traffic")


@machine.command(epilog="Example: fly machine uncordon 3d8d9f12a4")
@click.argument("machine_id")
@app_option
@nonce_option
def uncordon(machine_id: str, app: str | None, nonce: str) -> None:
    """Let a machine back into routing."""
    request = machines_pb2.UncordonMachineRequest(
        app_name=app or "", machine_id=machine_id, lease_nonce=nonce
    )
    call(stub().UncordonMachine, request)
    done(f"machine {machine_id} gets traffic again")


@machine.command(
    epilog="""\b
Examples:
  fly machine wait 3d8d9f12a4
  fly machine wait 3d8d9f12a4 --state stopped --timeout 2h"""
)
@click.argument("machine_id")
@app_option
@click.option("--state", "wanted", default="started", show_default=True, help="Like stopped or destroyed.")
@click.option("-t", "--timeout", default="60", show_default=True, metavar="TIME", help="Like 30, 10m or 2h.")
@click.option("--version", default="", metavar="INSTANCE", help="Only this version counts.")
def wait(machine_id: str, app: str | None, wanted: str, timeout: str, version: str) -> None:
    """Wait until a machine is in a state; exit code 6 if it is not in time."""
    wait_state(machine_id, app or "", wanted, seconds(timeout) or 0.0, version)
    done(f"machine {machine_id} is {wanted}")


@machine.command(epilog="Example: fly machine destroy 3d8d9f12a4 --force")
@click.argument("machine_id")
@app_option
@click.option("-f", "--force", is_flag=True, help="Also if it is started.")
@nonce_option
def destroy(machine_id: str, app: str | None, force: bool, nonce: str) -> None:
    """Destroy a machine; its volumes stay."""
    request = machines_pb2.DestroyMachineRequest(
        app_name=app or "", machine_id=machine_id, force=force, lease_nonce=nonce
    )
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
