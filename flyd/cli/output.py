"""What a person (or, with --json, a program) sees: tables, JSON, errors, progress.

Results go to standard output, everything else to standard error, so that pipes work.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, cast

import click
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flyd.errors import FlydError, Unplaceable

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


def wants_json() -> bool:
    """Whether --json was given anywhere on the command line."""
    context = click.get_current_context(silent=True)
    while context is not None:
        if context.params.get("json_output"):
            return True
        context = context.parent
    return False


def emit(value: Message | Sequence[Message] | Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Print a result as JSON, field names as in the API (snake_case)."""
    click.echo(json.dumps(_plain(value), indent=2))


def _plain(value: Any) -> Any:
    if isinstance(value, Message):
        return MessageToDict(
            value, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
    if isinstance(value, Mapping):
        return dict(cast(Mapping[str, Any], value))
    return [_plain(item) for item in value]


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, empty: str) -> None:
    """An aligned table; `empty` is said instead when there are no rows."""
    if not rows:
        err.print(f"[dim]{escape(empty)}[/dim]")
        return
    grid = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for column in columns:
        grid.add_column(column, overflow="fold", no_wrap=not out.is_terminal)
    for row in rows:
        grid.add_row(*(str(cell) for cell in row))
    out.print(grid)


def state(word: str) -> str:
    """A state with its colour."""
    colours = {
        "started": "green", "up": "green", "passing": "green", "complete": "green", "ok": "green",
        "primary": "green", "replica": "cyan", "stopped": "yellow", "warning": "yellow", "running": "cyan",
        "failed": "red", "lost": "red", "critical": "red", "unreachable": "red",
    }  # fmt: skip
    return f"[{colours[word]}]{word}[/]" if word in colours else escape(word)


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
        err.print(text)


def done(text: str) -> None:
    """A finished step."""
    say(f"[green]✓[/green] {text}")


def warn(text: str) -> None:
    """Something to look at, also with --json."""
    err.print(f"[yellow]![/yellow] {escape(text)}")


@contextmanager
def waiting(text: str) -> Generator[Any]:
    """A spinner while something takes its time; `.update(text)` changes it."""
    with err.status(text) as spinner:
        yield spinner


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
            err.print(f"  {escape(host)}: {escape(reason)}")
    if error.hint:
        err.print(f"[dim]{escape(error.hint)}[/dim]")
