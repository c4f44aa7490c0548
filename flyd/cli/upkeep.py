"""fly hosts cordon, uncordon, drain, remove, grace: taking hosts out of use, and what their loss means."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping

import click

from flyd.cli.connection import call, channel, stream
from flyd.cli.options import json_option
from flyd.cli.output import done, emit, say, waiting, warn
from flyd.deploy.appconfig.units import duration_s
from flyd.errors import InvalidInput, Refused, Unavailable
from flyd.v1 import hosts_pb2, hosts_pb2_grpc

INTERRUPTED = 130  # as the shell has it: 128 + SIGINT
WATCH_RETRY_S = 30.0  # without a word of the drain
WATCH_PAUSE_S = 0.5


def stub() -> hosts_pb2_grpc.HostsServiceStub:
    """The hosts service of the cluster."""
    return hosts_pb2_grpc.HostsServiceStub(channel())


def note_of(host: hosts_pb2.Host) -> str:
    """What there is to say of a host besides its state; empty if nothing."""
    said: list[str] = []
    if host.drain_state:
        said.append(host.drain_state)
    elif host.cordoned:
        said.append("cordoned")
    if host.HasField("loss"):
        loss = host.loss
        said.append(f"silent for {loss.silent_for:.0f} s")
        if loss.moves_in > 0:
            said.append(f"its machines move in {loss.moves_in:.0f} s")
        elif loss.held:
            said.append("nothing is moved")
        elif loss.left:
            said.append(f"{len(loss.left)} stay")
    return ", ".join(said)


def show_losses(hosts: list[hosts_pb2.Host]) -> None:
    """Below the table: what holds repairs up, and what stays on lost hosts."""
    for host in hosts:
        if host.loss.held:
            warn(host.loss.held)
        _show_left(host.name, host.loss.left)


def _show_left(host: str, left: Mapping[str, str]) -> None:
    for machine_id, reason in sorted(left.items()):
        say(f"  {host}: machine {machine_id} stays: {reason}")


@click.command(epilog="Example: fly hosts cordon ams-1")
@click.argument("name")
@json_option
def cordon(name: str, json_output: bool) -> None:
    """Place no new machines on a host; those on it stay."""
    call(stub().CordonHost, hosts_pb2.CordonHostRequest(name=name))
    _ended(json_output, name, "cordoned", f"{name} takes no new machines: fly hosts uncordon {name}")


@click.command(epilog="Example: fly hosts uncordon ams-1")
@click.argument("name")
@json_option
def uncordon(name: str, json_output: bool) -> None:
    """Let a host take machines again.

    Ends its drain: replacements that were not needed yet are taken back; what has moved stays there.
    """
    call(stub().UncordonHost, hosts_pb2.UncordonHostRequest(name=name))
    _ended(json_output, name, "uncordoned", f"{name} takes machines")


@click.command(
    epilog="""\b
Examples:
  fly hosts drain ams-1             move everything off, and watch
  fly hosts drain ams-1             once more: watch the drain that is under way
  fly hosts drain ams-1 --detach    begin it and leave
  fly hosts drain ams-1 --force     also stop, where they are, machines that can not move"""
)
@click.argument("name")
@click.option("--force", is_flag=True, help="Stop, where they are, machines that can not move.")
@click.option("--detach", is_flag=True, help="Do not watch.")
@json_option
def drain(name: str, force: bool, detach: bool, json_output: bool) -> None:
    """Move everything off a host, one machine of a group at a time; it runs on the servers.

    A machine is stopped only when its replacement elsewhere has passed its checks. Machines with
    volumes stay, and so do members of Postgres clusters: they are listed, and the exit code is 5.
    """
    begun = call(stub().DrainHost, hosts_pb2.DrainHostRequest(name=name, force=force)).drain
    if detach:
        if json_output:
            emit(begun)
        else:
            done(f"{name} is being drained; watch it: fly hosts drain {name}")
        return
    try:
        with waiting(f"draining {name}") as update:
            ended = _follow(name, update)
    except KeyboardInterrupt:
        warn(f"the drain goes on without you; watch it: fly hosts drain {name}")
        sys.exit(INTERRUPTED)
    if json_output:
        emit(ended)
    if ended.state != "drained":
        raise Refused(f"the drain of {name} was cancelled: the host is in use again")
    if ended.left and not ended.force:
        listed = "".join(f"\n  {m}: {reason}" for m, reason in sorted(ended.left.items()))
        raise Refused(
            f"{name} is not empty: {len(ended.left)} machines can not move:{listed}",
            hint=f"`fly hosts drain {name} --force` stops them where they are; no data is touched.",
        )
    _show_left(name, ended.left)
    if not json_output:
        done(f"{name} is drained" + (f"; {len(ended.left)} machines stay, stopped" if ended.left else ""))


def _follow(name: str, update: Callable[[str], None]) -> hosts_pb2.Drain:
    """Say each line of the drain once, until it is over; any flyd can tell, so one may go away."""
    said = 0
    heard_at = time.monotonic()
    while True:
        lines = 0  # of this stream, which begins with those of the streams before it
        told: hosts_pb2.Drain | None = None
        try:
            for answer in stream(stub().WatchDrain, hosts_pb2.WatchDrainRequest(name=name)):
                heard_at = time.monotonic()
                told = answer.drain
                for line in answer.lines:
                    lines += 1
                    if lines > said:
                        say(f"  {line}")
                said = max(said, lines)
                update("; ".join(answer.drain.doing) or f"draining {name}")
            if told is not None:
                return told
        except Unavailable as error:
            if time.monotonic() - heard_at > WATCH_RETRY_S:
                hint = f"The drain goes on. Watch it: fly hosts drain {name}"
                raise Unavailable(error.message, hint=hint) from None
        update("looking for a flyd that answers")
        time.sleep(WATCH_PAUSE_S)


@click.command(
    epilog="""\b
Examples:
  fly hosts drain ams-1 && fly hosts remove ams-1
  fly hosts remove ams-1            also a lost host that will not come back"""
)
@click.argument("name")
@json_option
def remove(name: str, json_output: bool) -> None:
    """Delete the records of a host on which nothing is left.

    Refused while machines or volumes are on it. Stop its flyd, too: it would join again at its
    next start, unless the host is expelled (fly hosts expel).
    """
    call(stub().RemoveHost, hosts_pb2.RemoveHostRequest(name=name))
    _ended(json_output, name, "removed", f"{name} is removed")


@click.command(
    epilog="""\b
Examples:
  fly hosts grace                   show it
  fly hosts grace 2m                set it"""
)
@click.argument("duration", required=False)
@json_option
def grace(duration: str | None, json_output: bool) -> None:
    """How long a host may be silent before its machines are placed elsewhere.

    Machines with volumes stay where their data is, whatever the grace period.
    """
    if duration is None:
        grace_s = call(stub().GetLossRule, hosts_pb2.GetLossRuleRequest()).grace
    else:
        try:
            wanted_s = duration_s(duration, bare_s=1.0)
        except ValueError as error:
            raise InvalidInput(str(error), hint="Like 90, 90s or 2m.") from None
        if wanted_s is None:
            raise InvalidInput("an empty duration", hint="Like 90, 90s or 2m.")
        grace_s = call(stub().SetLossRule, hosts_pb2.SetLossRuleRequest(grace=wanted_s)).grace
    if json_output:
        emit({"grace": grace_s})
    else:
        click.echo(f"{grace_s:g} s")


def _ended(json_output: bool, name: str, what: str, text: str) -> None:
    if json_output:
        emit({"host": name, "result": what})
    else:
        done(text)


COMMANDS = (cordon, uncordon, drain, remove, grace)
