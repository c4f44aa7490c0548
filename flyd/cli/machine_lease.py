"""fly machine lease: keep others from changing a machine for a while."""

from __future__ import annotations

import getpass
import socket

import click

from flyd.cli.connection import call
from flyd.cli.machine import nonce_option, seconds, stub
from flyd.cli.options import app_option, json_option
from flyd.cli.output import clock_time, done, emit, note, table
from flyd.v1 import machines_pb2


@click.group(
    epilog="""\b
Examples:
  fly machine lease acquire 3d8d9f12a4 --ttl 10m --description "moving its data"
  FLY_LEASE_NONCE=... fly machine stop 3d8d9f12a4
  fly machine lease release 3d8d9f12a4 --nonce ..."""
)
def lease() -> None:
    """Leases: who may change a machine just now. Without its nonce everybody else is refused."""


def _show(found: machines_pb2.MachineLease, json_output: bool) -> None:
    if json_output:
        emit(found)
        return
    table(
        ["MACHINE", "OWNER", "DESCRIPTION", "UNTIL", "NONCE"],
        [
            (
                found.machine_id,
                found.owner,
                found.description,
                clock_time(found.expires_at),
                found.nonce or "-",
            )
        ],
        empty="",
    )


@lease.command(epilog="Example: fly machine lease acquire 3d8d9f12a4 --ttl 5m")
@click.argument("machine_id")
@app_option
@click.option("--ttl", default="60", show_default=True, metavar="TIME", help="How long, like 60 or 10m.")
@click.option("--owner", default="", help="Who takes it; default: you on this machine.")
@click.option("--description", default="", help="What for; shown to those who are refused.")
@json_option
def acquire(
    machine_id: str, app: str | None, ttl: str, owner: str, description: str, json_output: bool
) -> None:
    """Take a machine; prints the nonce that your further commands need."""
    request = machines_pb2.AcquireMachineLeaseRequest(
        app_name=app or "",
        machine_id=machine_id,
        ttl=int(seconds(ttl) or 0),
        owner=owner or f"{getpass.getuser()}@{socket.gethostname()}",
        description=description,
    )
    taken = call(stub().AcquireMachineLease, request).lease
    _show(taken, json_output)
    note(f"export FLY_LEASE_NONCE={taken.nonce}")


@lease.command(epilog="Example: fly machine lease renew 3d8d9f12a4 --nonce ...")
@click.argument("machine_id")
@app_option
@nonce_option
@json_option
def renew(machine_id: str, app: str | None, nonce: str, json_output: bool) -> None:
    """Let a lease's time begin anew."""
    request = machines_pb2.RenewMachineLeaseRequest(app_name=app or "", machine_id=machine_id, nonce=nonce)
    _show(call(stub().RenewMachineLease, request).lease, json_output)


@lease.command(epilog="Example: fly machine lease release 3d8d9f12a4 --nonce ...")
@click.argument("machine_id")
@app_option
@nonce_option
def release(machine_id: str, app: str | None, nonce: str) -> None:
    """Give a machine back."""
    request = machines_pb2.ReleaseMachineLeaseRequest(app_name=app or "", machine_id=machine_id, nonce=nonce)
    call(stub().ReleaseMachineLease, request)
    done(f"machine {machine_id} is free")


@lease.command(epilog="Example: fly machine lease view 3d8d9f12a4")
@click.argument("machine_id")
@app_option
@json_option
def view(machine_id: str, app: str | None, json_output: bool) -> None:
    """Who holds a machine; exit code 3 if nobody does."""
    request = machines_pb2.GetMachineLeaseRequest(app_name=app or "", machine_id=machine_id)
    _show(call(stub().GetMachineLease, request).lease, json_output)


@lease.command(epilog="Example: fly machine lease clear 3d8d9f12a4")
@click.argument("machine_id")
@app_option
def clear(machine_id: str, app: str | None) -> None:
    """Take a machine's lease away from whoever holds it."""
    request = machines_pb2.ReleaseMachineLeaseRequest(app_name=app or "", machine_id=machine_id, force=True)
    call(stub().ReleaseMachineLease, request)
    done(f"machine {machine_id} is free")
