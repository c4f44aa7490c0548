"""fly machine list, status, ps: what machines are and what they did."""

from __future__ import annotations

import time
from datetime import datetime

import click
from rich.text import Text

from flyd.cli.connection import app_name, call
from flyd.cli.machine import checks_word, get, state_word, stub
from flyd.cli.options import app_option, json_option
from flyd.cli.output import ago, emit, out, state, table, warn
from flyd.errors import InvalidInput
from flyd.v1 import machines_pb2

PAGE = 500


def pairs(words: tuple[str, ...]) -> dict[str, str]:
    """KEY=VALUE words."""
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise InvalidInput(f"{word!r} is not KEY=VALUE")
        found[key] = value
    return found


@click.command(
    "list",
    epilog="""\b
Examples:
  fly machine list -a chat
  fly machine list --all --state failed
  fly machine list -a chat --region ams --metadata role=worker""",
)
@app_option
@click.option("--all", "all_apps", is_flag=True, help="Of all apps.")
@click.option("-r", "--region", default="", help="In this region.")
@click.option("--state", "wanted", default="", help="In this state, like started.")
@click.option("--metadata", multiple=True, metavar="KEY=VALUE", help="With this metadata; repeatable.")
@json_option
def list_machines(
    app: str | None, all_apps: bool, region: str, wanted: str, metadata: tuple[str, ...], json_output: bool
) -> None:
    """The machines of an app."""
    request = machines_pb2.ListMachinesRequest(
        app_name="" if all_apps else app_name(app),
        region=region,
        state=wanted,
        metadata=pairs(metadata),
        page_size=PAGE,
    )
    found: list[machines_pb2.Machine] = []
    while True:
        answer = call(stub().ListMachines, request)
        found += answer.machines
        request.page_token = answer.next_page_token
        if not answer.next_page_token:
            break
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


def exit_words(event: machines_pb2.MachineEvent) -> str:
    """How a process ended: "code 3", "signal 9, out of memory, asked for"; empty if the event is none."""
    if not event.HasField("exit_event"):
        return ""
    ended = event.exit_event
    how = [f"code {ended.exit_code}"] if ended.HasField("exit_code") else []
    how += [f"signal {ended.signal}"] if ended.HasField("signal") else []
    how += ["out of memory"] if ended.oom_killed else []
    how += ["asked for"] if ended.requested_stop else []
    return ", ".join(how) or "not seen"


def next_start(machine: machines_pb2.Machine, now_s: float) -> str:
    """The back-off in words; empty if nothing waits."""
    if not machine.retry_at:
        return ""
    policy = machine.config.restart_policy
    tries = f" of {machine.config.max_retries}" if policy == "on-failure" else ""
    left_s = max(0.0, machine.retry_at - now_s)
    return f"next start in {left_s:.0f} s (failure {machine.recent_exits}{tries} within 5 minutes)"


def by_schedule(machine: machines_pb2.Machine) -> str:
    """When its schedule starts it, in words; empty without one, and for one that somebody stopped."""
    if not machine.config.schedule or machine.desired_state != "started":
        return ""
    if not machine.next_start_at:
        return f"schedule {machine.config.schedule}: counts from its next start"
    at = datetime.fromtimestamp(machine.next_start_at).astimezone()
    return (
        f"schedule {machine.config.schedule}: next start {at:%Y-%m-%d %H:%M:%S %Z}, if it has ended by then"
    )


@click.command(epilog="Example: fly machine status 3d8d9f12a4")
@click.argument("machine_id")
@app_option
@json_option
def status(machine_id: str, app: str | None, json_output: bool) -> None:
    """One machine with its checks and its history."""
    found = get(machine_id, app or "")
    if json_output:
        emit(found)
        return
    out.print(
        f"{found.id}  {found.name}  {found.region}/{found.host}  {found.private_ip}"
        f"  version {found.instance_id}"
    )
    cordoned = ", cordoned: no traffic" if found.cordoned else ""
    out.print(Text.assemble(state_word(found), f", wanted {found.desired_state}{cordoned}. {found.detail}"))
    if waits := next_start(found, time.time()):  # noqa: TID251 - shown to a person
        out.print(Text(waits, style="yellow"))
    if scheduled := by_schedule(found):
        out.print(scheduled)
    table(
        ["CHECK", "STATUS", "OUTPUT", "SINCE"],
        [(c.name, state(c.status), c.output, ago(c.updated_at)) for c in found.checks],
        empty="No checks.",
    )
    table(
        ["EVENT", "STATUS", "SOURCE", "WHEN", "EXIT", "DETAIL"],
        [(e.type, e.status, e.source, ago(e.timestamp), exit_words(e), e.detail) for e in found.events],
        empty="No events.",
    )


@click.command(epilog="Example: fly machine ps 3d8d9f12a4")
@click.argument("machine_id")
@app_option
@json_option
def ps(machine_id: str, app: str | None, json_output: bool) -> None:
    """What runs in a machine, and where it listens; warns of a service that nobody listens for."""
    request = machines_pb2.ListMachineProcessesRequest(app_name=app or "", machine_id=machine_id)
    answer = call(stub().ListMachineProcesses, request)
    if json_output:
        emit(answer)
        return
    table(
        ["PID", "MEMORY MB", "CPU S", "LISTENS", "COMMAND"],
        [
            (
                p.pid,
                f"{p.memory_kb / 1024:.1f}",
                f"{p.cpu:.1f}",
                " ".join(_socket(s) for s in p.listen_sockets) or "-",
                p.command,
            )
            for p in answer.processes
        ],
        empty="No processes.",
    )
    for warning in answer.warnings:
        warn(warning)


def _socket(socket: machines_pb2.MachineSocket) -> str:
    address = f"[{socket.address}]" if ":" in socket.address else socket.address
    return f"{socket.proto.removesuffix('6')}/{address}:{socket.port}"
