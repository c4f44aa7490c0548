"""Options that many verbs share."""

from __future__ import annotations

import click

app_option = click.option("-a", "--app", "app", help="The app; default: the one fly.toml names.")
json_option = click.option("-j", "--json", "json_output", is_flag=True, help="Print JSON.")


def split(value: str | None) -> list[str]:
    """A comma-separated list."""
    return [part.strip() for part in (value or "").split(",") if part.strip()]
