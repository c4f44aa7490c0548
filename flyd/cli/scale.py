"""fly scale: how many machines an app has; fly machine place: which host one would go to, and why."""

from __future__ import annotations

import time

import click

from flyd.cli.connection import app_name, call, channel, stream
from flyd.cli.options import app_option, json_option, split
from flyd.cli.output import done, emit, say, table, waiting
from flyd.errors import FlydError, InvalidInput, Refused, Unavailable
from flyd.v1 import placement_pb2, placement_pb2_grpc

SCALE_TIMEOUT_S = 120.0
WATCH_PAUSE_S = 0.5


def stub() -> placement_pb2_grpc.PlacementServiceStub:
    """The placement service of the cluster."""
    return placement_pb2_grpc.PlacementServiceStub(channel())


@click.group()
def scale() -> None:
    """How many machines an app has."""


@scale.command(
    epilog="""\b
Examples:
  fly scale count 6                                   six in all, even over the app's regions
  fly scale count 3 --region ams                      three in ams, the others as they are
  fly scale count 2 --process-group worker --dry-run  what would happen, and each host's verdict"""
)
@click.argument("number", type=click.IntRange(0, 1000), metavar="N")
@app_option
@click.option("--region", "regions", help="Only there; several by commas share N evenly.")
@click.option("--process-group", "-g", "group", default="", help="Of this group; default: the app's first.")
@click.option("--dry-run", is_flag=True, help="Show what would happen and each host's verdict.")
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
@json_option
def count(
    number: int,
    app: str | None,
    regions: str | None,
    group: str,
    dry_run: bool,
    yes: bool,
    json_output: bool,
) -> None:
    """Bring a process group to N machines and wait until new ones pass their checks, as a deploy does.

    Of too many, the newest go; volumes stay.
    """
    request = placement_pb2.ScaleAppRequest(
        app_name=app_name(app), process_group=group, regions=split(regions), count=number, dry_run=True
    )
    planned = call(stub().ScaleApp, request)
    if dry_run and json_output:
        emit(planned)
        return
    if not json_output:
        _show_plan(planned, verdicts=dry_run)
    if dry_run:
        return
    going = [machine_id for change in planned.changes for machine_id in change.destroy_ids]
    changing = any(change.have != change.want for change in planned.changes)
    if changing and not yes and not click.confirm(f"Scale {request.app_name} so?", err=True):
        raise Refused("nothing was changed")
    request.dry_run = False
    request.destroy_ids.extend(going)
    result = call(stub().ScaleApp, request, SCALE_TIMEOUT_S)
    _wait_healthy(request.app_name, list(result.created_ids), result.wait_timeout)
    if json_output:
        emit(result)
    else:
        made, gone = len(result.created_ids), len(result.destroyed_ids)
        done(f"app {request.app_name}: {made} machines created, {gone} being destroyed")


def _show_plan(planned: placement_pb2.ScaleAppResponse, *, verdicts: bool) -> None:
    table(
        ["GROUP", "REGION", "HAS", "WANTED", "NEW ON", "DESTROYED"],
        [
            (
                change.process_group,
                change.region,
                change.have,
                change.want,
                ", ".join(change.create_hosts) or "-",
                ", ".join(change.destroy_ids) or "-",
            )
            for change in planned.changes
        ],
        empty="Nothing to scale.",
    )
    for change in planned.changes:
        if verdicts and change.verdicts:
            say(f"\nThe first new machine in {change.region}:")
            _show_verdicts(list(change.verdicts))


def _show_verdicts(verdicts: list[placement_pb2.HostVerdict]) -> None:
    table(
        ["HOST", "REGION", "VERDICT", "WHY"],
        [
            (v.host, v.region, f"accepted, {_place_word(v.rank)}" if v.accepted else "refused", v.reason)
            for v in verdicts
        ],
        empty="No host has joined the cluster.",
    )


def _place_word(rank: int) -> str:
    return "taken" if rank == 1 else f"no. {rank}"


def _wait_healthy(app: str, machine_ids: list[str], within_s: float) -> None:
    """Until all pass their checks, as a deploy waits; any flyd can tell, so one may go away."""
    if not machine_ids:
        return
    deadline_s = time.monotonic() + within_s
    seen: list[placement_pb2.MachineReadiness] = []
    with waiting("waiting until the new machines are healthy") as update:
        while (left_s := deadline_s - time.monotonic()) > 0:
            request = placement_pb2.WatchReadinessRequest(
                app_name=app, machine_ids=machine_ids, timeout=left_s
            )
            try:
                for told in stream(stub().WatchReadiness, request):
                    seen = list(told.machines)
                    update(_progress(seen))
                break
            except Unavailable as error:
                if time.monotonic() + WATCH_PAUSE_S > deadline_s:
                    raise
                update(f"looking for a flyd that answers: {error.message}")
                time.sleep(WATCH_PAUSE_S)
    _raise_unhealthy(app, seen, within_s)


def _progress(seen: list[placement_pb2.MachineReadiness]) -> str:
    well = sum(machine.verdict == "healthy" for machine in seen)
    others = [f"{m.machine_id} in {m.region}: {m.detail}" for m in seen if m.verdict != "healthy"]
    return f"{well} of {len(seen)} new machines are healthy" + (f"; {others[0]}" if others else "")


def _raise_unhealthy(app: str, seen: list[placement_pb2.MachineReadiness], within_s: float) -> None:
    """The error for those that did not become healthy, each with its failing check."""
    sick = [machine for machine in seen if machine.verdict != "healthy"]
    if not sick:
        return
    lines = "".join(
        f"\n  {m.machine_id} in {m.region or '?'} on {m.host or '?'}: "
        + (m.detail if m.verdict == "failed" else f"not in {within_s:g} s; last known: {m.detail}")
        for m in sick
    )
    raise FlydError(
        f"{len(sick)} of {len(seen)} new machines of app {app} are not healthy:{lines}",
        hint=f"They stay. `fly logs -a {app}` shows what they printed; a smaller count removes them.",
    )


@click.command(
    epilog="""\b
Examples:
  fly machine place -a chat --region ams --memory 2048
  fly machine place -a chat --process-group worker --label disk=nvme --json"""
)
@app_option
@click.option("--region", default="", help="Only there; default: anywhere.")
@click.option(
    "--process-group", "-g", "group", default="", help="Sizes, volumes and labels as this group has."
)
@click.option("--cpus", type=click.IntRange(1), default=None, help="CPUs, instead of the group's.")
@click.option(
    "--memory", "memory_mb", type=click.IntRange(1), default=None, help="MB, instead of the group's."
)
@click.option("--cpu-kind", default="", help="shared or performance.")
@click.option("--label", "labels", multiple=True, metavar="NAME=VALUE", help="A label its host must have.")
@json_option
def place(
    app: str | None,
    region: str,
    group: str,
    cpus: int | None,
    memory_mb: int | None,
    cpu_kind: str,
    labels: tuple[str, ...],
    json_output: bool,
) -> None:
    """Show which host a machine would go to, and each host's verdict. Nothing is placed."""
    request = placement_pb2.PreviewPlacementRequest(
        app_name=app_name(app),
        region=region,
        process_group=group,
        cpus=cpus or 0,
        memory_mb=memory_mb or 0,
        cpu_kind=cpu_kind,
        host_labels=dict(_label(text) for text in labels),
    )
    found = list(call(stub().PreviewPlacement, request).verdicts)
    if json_output:
        emit(found)
    else:
        _show_verdicts(found)
    if not any(verdict.accepted for verdict in found):
        raise Refused("no host can take such a machine")


def _label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise InvalidInput(f"{text!r} is no label", hint="A label is NAME=VALUE, e.g. --label disk=nvme")
    return name, value
