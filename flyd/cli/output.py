"""What a person (or, with --json, a program) sees: tables, JSON, errors, progress.

Results go to standard output, everything else to standard error, so that pipes work. What is
said is plain text: rich's markup stays in this file, so that nothing of an app's output or
fly.toml is taken for it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, cast

import click
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from flyd.cli.options import wants_json
from flyd.errors import FlydError, Unplaceable

PIPE_WIDTH = 240  # a table that goes to a pipe is not folded at 80 columns

out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_WIDTH)
err = Console(stderr=True, soft_wrap=True)


def emit(value: Message | Sequence[Message] | Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Print a result as JSON, field names as in the API (snake_case)."""
    click.echo(json.dumps(plain(value), indent=2))


def emit_line(value: Message) -> None:
    """Print one of many results as they come, each as one line of JSON."""
    click.echo(json.dumps(plain(value)))


def plain(value: Any) -> Any:
    """A result as what JSON has: messages with all their fields, those with defaults too."""
    if isinstance(value, Message):
        return MessageToDict(
            value, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in cast(Mapping[str, Any], value).items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(item) for item in cast(Sequence[Any], value)]
    return value


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, empty: str) -> None:
    """An aligned table; `empty` is said instead when there are no rows. Cells: plain, or rich's Text."""
    if not rows:
        err.print(f"[dim]{escape(empty)}[/dim]")
        return
    grid = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for column in columns:
        grid.add_column(column, overflow="fold", no_wrap=not out.is_terminal)
    for row in rows:
        grid.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    out.print(grid)


def state(word: str) -> Text:
    """A state with its colour."""
    colours = {
        "started": "green", "up": "green", "passing": "green", "complete": "green", "ok": "green",
        "primary": "green", "replica": "cyan", "stopped": "yellow", "warning": "yellow", "running": "cyan",
        "failed": "red", "lost": "red", "critical": "red", "unreachable": "red",
    }  # fmt: skip
    return Text(word, style=colours.get(word, ""))


def ago(at_s: float) -> str:
    """How long ago, in words."""
    if not at_s:
        return "-"
    seconds = max(0, int(time.time() - at_s))  # noqa: TID251 - shown to a person
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit} ago"
    return f"{seconds}s ago"


def clock_time(at_s: float) -> str:
    """Local time of day with milliseconds."""
    return datetime.fromtimestamp(at_s).strftime("%H:%M:%S.%f")[:-3]


def say(text: str) -> None:
    """A line for the person, on standard error; nothing with --json."""
    if not wants_json():
        err.print(escape(text))


def note(text: str) -> None:
    """A line that may be overlooked, as `say`."""
    if not wants_json():
        err.print(f"[dim]{escape(text)}[/dim]")


def done(text: str) -> None:
    """A finished step."""
    if not wants_json():
        err.print(f"[green]✓[/green] {escape(text)}")


def warn(text: str) -> None:
    """Something to look at, also with --json."""
    err.print(f"[yellow]![/yellow] {escape(text)}")


@contextmanager
def waiting(text: str) -> Generator[Callable[[str], None]]:
    """A spinner while something takes its time; what it yields changes its text."""
    with err.status(escape(text)) as spinner:
        yield lambda text: spinner.update(escape(text))


def report(error: FlydError) -> None:
    """An error for a tired person: what, each host's reason, what to do."""
    if wants_json():
        detail: dict[str, Any] = {
            "error": error.message, "kind": type(error).__name__, "hint": error.hint
        }  # fmt: skip
        if isinstance(error, Unplaceable):
            detail["reasons"] = error.reasons
        click.echo(json.dumps(detail), file=sys.stderr)
        return
    err.print(f"[bold red]Error:[/] {escape(error.message)}")
    if isinstance(error, Unplaceable):
        for host, reason in sorted(error.reasons.items()):
            if reason not in error.message:
                err.print(f"  {escape(host)}: {escape(reason)}")
    if error.hint:
        err.print(f"[dim]{escape(error.hint)}[/dim]")
