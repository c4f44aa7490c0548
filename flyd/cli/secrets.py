"""fly secrets."""

from __future__ import annotations

import click

from flyd.cli.apps import stub
from flyd.cli.connection import app_name, call
from flyd.cli.options import app_option
from flyd.cli.output import done
from flyd.errors import InvalidInput
from flyd.v1 import apps_pb2


@click.group()
def secrets() -> None:
    """Secrets: variables that override [env] and are never shown."""


def _set(app: str, values: dict[str, str]) -> None:
    names = call(stub().SetSecrets, apps_pb2.SetSecretsRequest(app_name=app, values=values)).names
    done(f"secrets of {app}: {', '.join(names) or 'none'}; machines see them at their next start")


@secrets.command("set", epilog="Example: fly secrets set SECRET_KEY_BASE=... MAIL_TOKEN=...")
@click.argument("pairs", nargs=-1, required=True, metavar="NAME=VALUE...")
@app_option
def set_secrets(pairs: tuple[str, ...], app: str | None) -> None:
    """Set secrets."""
    values: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name or not value:
            raise InvalidInput(f"{pair.split('=')[0]!r} is not NAME=VALUE")
        values[name] = value
    _set(app_name(app), values)


@secrets.command("unset")
@click.argument("names", nargs=-1, required=True)
@app_option
def unset_secrets(names: tuple[str, ...], app: str | None) -> None:
    """Remove secrets."""
    _set(app_name(app), dict.fromkeys(names, ""))
