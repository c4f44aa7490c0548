"""Options that many verbs share."""

from __future__ import annotations

import click

_json = False


def choose_json(context: click.Context, _: click.Parameter, chosen: bool) -> bool:
    """The callback of every --json option: from here on results and errors are JSON.

    Kept here and not looked up in click's context, which is gone when an error is reported.
    """
    global _json
    if context.parent is None:
        _json = chosen  # a new command line (tests run many)
    _json = _json or chosen
    return _json


def wants_json() -> bool:
    """Whether --json was given anywhere on the command line."""
    return _json


app_option = click.option("-a", "--app", "app", help="The app; default: the one fly.toml names.")
json_option = click.option(
    "-j", "--json", "json_output", is_flag=True, is_eager=True, callback=choose_json, help="Print JSON."
)


def split(value: str | None) -> list[str]:
    """A comma-separated list."""
    return [part.strip() for part in (value or "").split(",") if part.strip()]
