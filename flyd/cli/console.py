"""fly console: a shell or a command in a machine, with this terminal or with pipes.

The local terminal is put into raw mode for as long as the session lasts, so that every key is the
remote program's, and given back however it ends. The session lives as long as this command: when this
process is gone or no longer answers, flyd ends what runs in it.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import termios
import threading
import tty
from collections.abc import Generator, Iterable, Iterator
from queue import SimpleQueue
from types import FrameType
from typing import Any, NoReturn, cast

import click
import grpc

from flyd.api.status import from_rpc
from flyd.cli.connection import addresses, app_name, call, identity, resolved
from flyd.cli.machine import stub
from flyd.cli.options import app_option
from flyd.cli.output import note
from flyd.errors import FlydError, InvalidInput, Refused
from flyd.v1 import exec_pb2, exec_pb2_grpc, machines_pb2

SHELL = ("/bin/sh", "-c", 'exec "$(command -v bash || echo /bin/sh)"')
PIECE_BYTES = 32 * 1024
PIECES_AHEAD = 16  # of standard input that are read before flyd has taken them
BROKEN_PIPE = 128 + signal.SIGPIPE  # what a shell says of a command whose reader has gone
KEEPALIVE = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

STDIN, STDOUT, STDERR = 0, 1, 2

Request = exec_pb2.SessionRequest


@click.command(
    epilog="""\b
Examples:
  fly console                                  a shell in a machine of this folder's app
  fly console -a chat --region sin             in one that runs in sin
  fly console --machine 3d8d9f12a4 -C "ls -l"  a command; its exit code is passed on
  echo x | fly console -C cat                  with its input from a pipe"""
)
@app_option
@click.option("--machine", default="", help="This machine, of whichever app.")
@click.option("-r", "--region", default="", help="A machine in this region.")
@click.option("-C", "--command", default="", help="Run this instead of a shell: words, not shell syntax.")
@click.option("--pty/--no-pty", default=None, help="With a terminal [default: if this is one].")
@click.pass_context
def console(
    ctx: click.Context, app: str | None, machine: str, region: str, command: str, pty: bool | None
) -> None:
    """A shell (or -C COMMAND) in a started machine, with input; it ends with this command."""
    if machine and region:
        raise click.UsageError("--machine names one: leave --region out.")
    try:
        words = shlex.split(command) if command else list(SHELL)
    except ValueError as error:
        raise InvalidInput(f"-C {command!r}: {error}", hint="Quote it as for a shell.") from None
    if not machine:
        wanted = machines_pb2.ListMachinesRequest(app_name=app_name(app))
        machine = choose(call(stub().ListMachines, wanted).machines, region)
    if pty is None:
        pty = os.isatty(STDIN) and os.isatty(STDOUT)
    start = exec_pb2.SessionStart(app_name=app or "", machine_id=machine, command=words)
    if pty:
        note(f"in machine {machine}")
        start.terminal.CopyFrom(exec_pb2.Terminal(size=window(), kind=os.environ.get("TERM", "")))
    ctx.exit(run(start))


@click.group()
def ssh() -> None:
    """The names that flyctl has for it; there is no SSH in it."""


ssh.add_command(console)


def choose(machines: Iterable[machines_pb2.Machine], region: str) -> str:
    """The first started machine (in a region) by id; Refused where there is none."""
    started = sorted(
        (m for m in machines if m.state == "started" and m.host_status == "ok"), key=lambda m: m.id
    )
    for machine in started:
        if region in ("", machine.region):
            return machine.id
    where = f" in {region}" if region else ""
    others = ", ".join(sorted({m.region for m in started})) or "nowhere"
    raise Refused(
        f"the app has no started machine{where}",
        hint=f"Started: {others}. `fly machine list` shows all, `fly machine start ID` starts one.",
    )


def window() -> exec_pb2.TerminalSize:
    """This terminal's size; empty where there is none."""
    for fd in (STDOUT, STDIN, STDERR):
        with contextlib.suppress(OSError):
            columns, rows = os.get_terminal_size(fd)
            return exec_pb2.TerminalSize(columns=columns, rows=rows)
    return exec_pb2.TerminalSize()


def run(start: exec_pb2.SessionStart) -> int:
    """Hold the session; the exit code of its command."""
    inputs = Inputs(Request(start=start))
    endpoint = "ipv4:" + ",".join(resolved(address) for address in addresses())
    with identity().open_channel(endpoint, KEEPALIVE) as channel, ending_on_signals():
        session = cast(Any, exec_pb2_grpc.ExecServiceStub(channel).Session(inputs.requests()))
        try:
            with raw_terminal(inputs) if start.HasField("terminal") else contextlib.nullcontext():
                return _listen(session)
        except grpc.RpcError as error:
            raise from_rpc(cast(Any, error), ",".join(addresses())) from None
        except BrokenPipeError:
            return BROKEN_PIPE
        finally:
            session.cancel()
            inputs.close()


def _listen(session: Iterator[exec_pb2.SessionResponse]) -> int:
    for part in session:
        _write(STDOUT, part.stdout)
        _write(STDERR, part.stderr)
        if part.HasField("exit_code"):
            return part.exit_code
    raise FlydError("the session ended without an exit code", hint="Is its host lost? `fly hosts list`")


def _write(fd: int, data: bytes) -> None:
    """Unbuffered, so that a reader that is gone is noticed here and not at the end of Python."""
    while data:
        data = data[os.write(fd, data) :]


class Inputs:
    """What is typed here (read by a thread of its own) and the window's sizes, as requests."""

    def __init__(self, first: Request) -> None:
        self._queue: SimpleQueue[Request | None] = SimpleQueue()
        self._room = threading.Semaphore(PIECES_AHEAD)
        self._queue.put(first)
        threading.Thread(target=self._read, name="standard input", daemon=True).start()

    def requests(self) -> Iterator[Request]:
        """For gRPC, which reads them in a thread of its own, one when the last has been taken."""
        while (request := self._queue.get()) is not None:
            yield request
            if request.HasField("stdin"):
                self._room.release()

    def resized(self) -> None:
        """The window has another size."""
        self._queue.put(Request(size=window()))

    def close(self) -> None:
        """No more is wanted."""
        self._queue.put(None)

    def _read(self) -> None:
        while True:
            self._room.acquire()
            try:
                data = os.read(STDIN, PIECE_BYTES)
            except OSError:
                data = b""  # the terminal has hung up
            if not data:
                self.close()
                return
            self._queue.put(Request(stdin=data))


@contextlib.contextmanager
def raw_terminal(inputs: Inputs) -> Generator[None]:
    """Each key goes through as it is typed, and each new size; given back at the end, however it ends."""
    if not os.isatty(STDIN):
        yield
        return
    before = termios.tcgetattr(STDIN)
    followed = signal.signal(signal.SIGWINCH, lambda number, frame: inputs.resized())
    try:
        tty.setraw(STDIN, termios.TCSADRAIN)
        yield
    finally:
        termios.tcsetattr(STDIN, termios.TCSADRAIN, before)
        signal.signal(signal.SIGWINCH, followed)


@contextlib.contextmanager
def ending_on_signals() -> Generator[None]:
    """End by way of `finally` when told to by a signal, with the exit code that shells give it."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
