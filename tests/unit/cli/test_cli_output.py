"""What a person or a program sees: tables, JSON, errors; text of others is never markup."""

from __future__ import annotations

import io
import json
from typing import Any

import click
import pytest
from click.testing import CliRunner
from rich.console import Console
from rich.text import Text

from flyd.cli import main as cli_main
from flyd.cli import output
from flyd.cli.options import json_option, split
from flyd.errors import (
    Conflict,
    FlydError,
    InvalidInput,
    InvariantBroken,
    NotFound,
    Refused,
    Unavailable,
    Unplaceable,
)
from flyd.v1 import apps_pb2, machines_pb2


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What goes to standard output and standard error."""
    text = io.StringIO()
    monkeypatch.setattr(output, "out", Console(file=text, width=200))
    monkeypatch.setattr(output, "err", Console(file=text, width=200))
    monkeypatch.setattr("flyd.cli.options._json", False)
    return text


def test_text_of_others_is_no_markup(seen: io.StringIO) -> None:
    output.say("[build] of [red]app[/red]")
    output.done("deployed [bold]x[/bold]")
    output.note("[processes]")
    output.warn("[/]")
    output.table(["[A]", "B"], [("[dim]a[/dim]", 1), (output.state("started"), "[/nothing]")], empty="")
    output.table(["A"], [], empty="[empty]")
    text = seen.getvalue()
    for part in ("[build] of [red]app[/red]", "[bold]x[/bold]", "[processes]", "! [/]", "[dim]a[/dim]"):
        assert part in text
    assert "[/nothing]" in text
    assert "[empty]" in text


def test_table_is_aligned(seen: io.StringIO) -> None:
    output.table(["ID", "STATE"], [("a", output.state("started")), ("long-id", Text("-"))], empty="")
    header, first, second = (line.rstrip() for line in seen.getvalue().splitlines())
    assert header.index("STATE") == first.index("started") == second.index("-", 6)


def test_error_for_a_person(seen: io.StringIO) -> None:
    reasons = {"b-1": "needs 9 MB", "a-1": "wrong region [x]"}
    output.report(Unplaceable("no host can take it", reasons, hint="[add] a host"))
    assert seen.getvalue().splitlines() == [
        "Error: no host can take it",
        "  a-1: wrong region [x]",
        "  b-1: needs 9 MB",
        "[add] a host",
    ]


def test_reasons_already_in_the_message_are_not_repeated(seen: io.StringIO) -> None:
    output.report(Unplaceable("no host: a-1: full", {"a-1": "full"}))
    assert seen.getvalue() == "Error: no host: a-1: full\n"


def test_emit_has_all_fields(capsys: pytest.CaptureFixture[str]) -> None:
    output.emit({"app": apps_pb2.App(name="a"), "machines": [machines_pb2.Machine(id="m")]})
    told = json.loads(capsys.readouterr().out)
    assert told["app"]["name"] == "a"
    assert told["machines"][0]["restarts"] == 0
    output.emit_line(machines_pb2.StreamLogsResponse(message="one\ntwo"))
    assert capsys.readouterr().out.count("\n") == 1


def test_ago() -> None:
    assert output.ago(0) == "-"


@click.group()
@json_option
def outer(json_output: bool) -> None:
    pass


@outer.command()
@json_option
def inner(json_output: bool) -> None:
    output.report(NotFound("no such thing", hint="look"))
    click.echo(str(json_output))


@pytest.mark.parametrize(
    ("words", "is_json"),
    [(["--json", "inner"], True), (["inner", "--json"], True), (["inner", "-j"], True), (["inner"], False)],
)
def test_json_anywhere_counts(words: list[str], is_json: bool) -> None:
    ran = CliRunner().invoke(outer, words)
    assert ran.stdout.strip() == str(is_json)
    if is_json:
        assert json.loads(ran.stderr) == {"error": "no such thing", "kind": "NotFound", "hint": "look"}


ERRORS = [
    (InvalidInput("x"), 2),
    (NotFound("x"), 3),
    (Conflict("x"), 4),
    (Refused("x"), 5),
    (Unplaceable("x", {"a": "b"}), 5),
    (Unavailable("x"), 6),
    (InvariantBroken("x"), 70),
    (FlydError("x"), 1),
    (PermissionError(13, "Permission denied", "/x"), 1),
    (KeyboardInterrupt(), 130),
    (click.UsageError("x"), 2),
]


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=lambda value: str(value))
def test_exit_codes(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(cli_main.fly, "main", fail)
    with pytest.raises(SystemExit) as ended:
        cli_main.main()
    assert ended.value.code == code
    assert "Traceback" not in capsys.readouterr().err


def test_split() -> None:
    assert split(" ams, iad,,") == ["ams", "iad"]
    assert split(None) == []
