"""fly machine run, clone, update, metadata: what machines are to be."""

from __future__ import annotations

import shlex

import click

from flyd.cli.connection import app_name, call
from flyd.cli.machine import get, nonce_option, seconds, stub, wait_state
from flyd.cli.machine_show import pairs
from flyd.cli.options import app_option, json_option
from flyd.cli.output import done, emit, table, waiting
from flyd.v1 import machines_pb2

PLACE_S = 60.0
UPDATE_MARGIN_S = 120.0


def _change(
    config: machines_pb2.MachineConfig,
    image: str,
    command: str,
    env: tuple[str, ...],
    cpus: int,
    memory: int,
    restart: str,
    schedule: str,
) -> None:
    """What the options say, into a configuration; what they do not say stays."""
    if image:
        config.image = image
    if command:
        del config.cmd[:]
        config.cmd.extend(shlex.split(command))
    config.env.update(pairs(env))
    config.guest.cpus = cpus or config.guest.cpus
    config.guest.memory_mb = memory or config.guest.memory_mb
    config.restart_policy = restart or config.restart_policy
    config.schedule = "" if schedule == "none" else schedule or config.schedule


_policies = click.Choice(["no", "on-failure", "always"])
_schedules = click.Choice(["hourly", "daily", "weekly", "monthly", "none"])
_config_options = (
    click.option("--command", default="", metavar="WORDS", help="What it runs, as a shell would split it."),
    click.option("-e", "--env", multiple=True, metavar="KEY=VALUE", help="A variable; repeatable."),
    click.option("--cpus", default=0, help="CPUs."),
    click.option("--memory", default=0, metavar="MB", help="Memory."),
    click.option("--restart", type=_policies, default=None, help="When it is started again."),
    click.option(
        "--schedule", type=_schedules, default=None, help="How often it is started once it has ended."
    ),
)


def config_options(function: click.decorators.FC) -> click.decorators.FC:
    """The options that describe a machine."""
    for option in reversed(_config_options):
        function = option(function)
    return function


@click.command(
    epilog="""\b
Examples:
  fly machine run host: --command "sleep 1000" -a chat -r ams
  fly machine run source:sha256:... --idempotency-key nightly-2026-11-23    a retry makes no second one
  fly machine run host: --command ./report --schedule daily    once now, then every day"""
)
@click.argument("image")
@app_option
@click.option("-r", "--region", default="", help="Where; default: anywhere.")
@click.option("-n", "--name", default="", help="Its name.")
@config_options
@click.option("--rm", is_flag=True, help="Destroy it once its process has ended for good.")
@click.option("--metadata", multiple=True, metavar="KEY=VALUE", help="Metadata; repeatable.")
@click.option("--idempotency-key", default="", help="A retry with the same one makes no second machine.")
@json_option
def run(
    image: str,
    app: str | None,
    region: str,
    name: str,
    command: str,
    env: tuple[str, ...],
    cpus: int,
    memory: int,
    restart: str | None,
    schedule: str | None,
    rm: bool,
    metadata: tuple[str, ...],
    idempotency_key: str,
    json_output: bool,
) -> None:
    """Make a machine, start it, and wait until it is started.

    Not so with --rm, --schedule and --restart no: such a machine may have ended by then.
    """
    config = machines_pb2.MachineConfig(auto_destroy=rm, metadata=pairs(metadata))
    _change(config, image, command, env, cpus, memory, restart or "", schedule or "")
    request = machines_pb2.CreateMachineRequest(
        app_name=app_name(app), region=region, name=name, config=config, idempotency_key=idempotency_key
    )
    made = call(stub().CreateMachine, request, PLACE_S).machine
    if (
        not rm and not config.schedule and restart != "no"
    ):  # one that runs once may have ended before anybody saw it started
        with waiting(f"machine {made.id} starts on {made.host}"):
            wait_state(made.id, made.app_name, "started")
    _show_made(made, json_output)


@click.command(epilog="Example: fly machine clone 3d8d9f12a4 --region iad")
@click.argument("machine_id")
@app_option
@click.option("-r", "--region", default="", help="Where; default: the same region.")
@click.option("-n", "--name", default="", help="Its name.")
@click.option("--idempotency-key", default="", help="A retry with the same one makes no second machine.")
@json_option
def clone(
    machine_id: str, app: str | None, region: str, name: str, idempotency_key: str, json_output: bool
) -> None:
    """Make another machine like this one; its volumes begin empty."""
    request = machines_pb2.CloneMachineRequest(
        app_name=app or "",
        machine_id=machine_id,
        region=region,
        name=name,
        idempotency_key=idempotency_key,
    )
    made = call(stub().CloneMachine, request, PLACE_S).machine
    with waiting(f"machine {made.id} starts on {made.host}"):
        wait_state(made.id, made.app_name, "started")
    _show_made(made, json_output)


def _show_made(made: machines_pb2.Machine, json_output: bool) -> None:
    if json_output:
        emit(made)
    else:
        done(f"machine {made.id} ({made.name}) on {made.host} in {made.region}")


@click.command(
    epilog="""\b
Examples:
  fly machine update 3d8d9f12a4 --memory 512
  fly machine update 3d8d9f12a4 --image source:sha256:... --env MODE=fast
  fly machine update 3d8d9f12a4 --if-version 01J9...    refused (exit code 4) if it has changed"""
)
@click.argument("machine_id")
@app_option
@click.option("--image", default="", help="What it is made from.")
@config_options
@click.option("--stop-timeout", default="", metavar="TIME", help="Until SIGKILL at a stop, like 30 or 2h.")
@click.option("--if-version", default="", metavar="INSTANCE", help="Only if this is its version now.")
@nonce_option
@json_option
def update(
    machine_id: str,
    app: str | None,
    image: str,
    command: str,
    env: tuple[str, ...],
    cpus: int,
    memory: int,
    restart: str | None,
    schedule: str | None,
    stop_timeout: str,
    if_version: str,
    nonce: str,
    json_output: bool,
) -> None:
    """Replace a machine by a new version of itself, on the same host and volumes."""
    before = get(machine_id, app or "")
    config = before.config
    _change(config, image, command, env, cpus, memory, restart or "", schedule or "")
    if (timeout_s := seconds(stop_timeout)) is not None:
        config.stop.timeout = timeout_s
    request = machines_pb2.UpdateMachineRequest(
        app_name=before.app_name,
        machine_id=machine_id,
        config=config,
        current_version=if_version or before.instance_id,
        lease_nonce=nonce,
    )
    updated = call(stub().UpdateMachine, request).machine
    wanted = updated.desired_state
    with waiting(f"machine {machine_id} becomes version {updated.instance_id}"):
        limit_s = UPDATE_MARGIN_S + config.stop.timeout
        wait_state(machine_id, updated.app_name, wanted, limit_s, updated.instance_id)
    if json_output:
        emit(get(machine_id, updated.app_name))
    else:
        done(f"machine {machine_id} is {wanted} as version {updated.instance_id}")


@click.group(epilog="Example: fly machine metadata set 3d8d9f12a4 role=worker")
def metadata() -> None:
    """A machine's metadata: words that lists can be filtered by. Changing it makes no new version."""


@metadata.command("list", epilog="Example: fly machine metadata list 3d8d9f12a4")
@click.argument("machine_id")
@app_option
@json_option
def list_metadata(machine_id: str, app: str | None, json_output: bool) -> None:
    """All keys and their values."""
    request = machines_pb2.GetMachineMetadataRequest(app_name=app or "", machine_id=machine_id)
    found = dict(call(stub().GetMachineMetadata, request).metadata)
    if json_output:
        emit(found)
    else:
        table(["KEY", "VALUE"], sorted(found.items()), empty="No metadata.")


@metadata.command("set", epilog="Example: fly machine metadata set 3d8d9f12a4 role=worker")
@click.argument("machine_id")
@click.argument("words", nargs=-1, required=True, metavar="KEY=VALUE...")
@app_option
@nonce_option
def set_metadata(machine_id: str, words: tuple[str, ...], app: str | None, nonce: str) -> None:
    """Set keys."""
    for key, value in pairs(words).items():
        request = machines_pb2.SetMachineMetadataRequest(
            app_name=app or "", machine_id=machine_id, key=key, value=value, lease_nonce=nonce
        )
        call(stub().SetMachineMetadata, request)
    done(f"metadata of machine {machine_id} set")


@metadata.command("delete", epilog="Example: fly machine metadata delete 3d8d9f12a4 role")
@click.argument("machine_id")
@click.argument("names", nargs=-1, required=True, metavar="KEY...")
@app_option
@nonce_option
def delete_metadata(machine_id: str, names: tuple[str, ...], app: str | None, nonce: str) -> None:
    """Remove keys; an absent one is no error."""
    for key in names:
        request = machines_pb2.DeleteMachineMetadataRequest(
            app_name=app or "", machine_id=machine_id, key=key, lease_nonce=nonce
        )
        call(stub().DeleteMachineMetadata, request)
    done(f"metadata of machine {machine_id} removed")
