"""fly launch: four questions, then an app with its database, deployed.

Each question has a flag; --yes takes the defaults for those not given.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from flyd.cli import apps as apps_verbs
from flyd.cli import deploy as deploy_verbs
from flyd.cli import hosts as hosts_verbs
from flyd.cli import postgres as postgres_verbs
from flyd.cli.connection import call
from flyd.cli.options import json_option, split
from flyd.cli.output import done, say, waiting, warn
from flyd.deploy import appconfig
from flyd.errors import InvalidInput
from flyd.v1 import apps_pb2, hosts_pb2, postgres_pb2

DEFAULT_PORT = 8080

# What a folder holds -> how it is started. The first that fits is taken.
STARTERS = (
    ("mix.exs", "mix phx.server"),
    ("bin/rails", "bin/rails server -b $FLY_PRIVATE_IP -p $PORT"),
    ("manage.py", "python manage.py runserver $FLY_PRIVATE_IP:$PORT"),
    ("go.mod", "go run ."),
)


def start_command(directory: Path) -> str:
    """How the app in this folder is started, by what the folder holds."""
    procfile = directory / "Procfile"
    if procfile.exists():
        for line in procfile.read_text().splitlines():
            name, _, command = line.partition(":")
            if name.strip() == "web" and command.strip():
                return command.strip()
    if _has_npm_start(directory / "package.json"):
        return "npm start"
    for sign, command in STARTERS:
        if (directory / sign).exists():
            return command
    raise InvalidInput(
        f"{directory}: no fly.toml, and no sign of how to start this app",
        hint='Say it: fly launch --command "python app.py". It must listen on $FLY_PRIVATE_IP:$PORT.',
    )


def _has_npm_start(package: Path) -> bool:
    if not package.exists():
        return False
    try:
        scripts = json.loads(package.read_text())["scripts"]
    except (KeyError, TypeError):
        return False
    except ValueError as error:
        raise InvalidInput(
            f"{package}: {error}", hint="Mend it, or say how the app starts with --command."
        ) from None
    return isinstance(scripts, dict) and "start" in scripts


def new_config(app: str, regions: list[str], command: str) -> str:
    """A fly.toml for an app that listens on DEFAULT_PORT."""
    listed = ", ".join(f'"{region}"' for region in regions)
    return (
        f'app = "{app}"\nprimary_region = "{regions[0]}"\n\n'
        f"[processes]\n  app = {json.dumps(command)}\n\n"
        f'[http_service]\n  internal_port = {DEFAULT_PORT}\n  processes = ["app"]\n\n'
        f'[[vm]]\n  memory = "256mb"\n\n'
        f"# Where a deploy puts machines. flyctl ignores this table.\n[flyd]\n  regions = [{listed}]\n"
    )


def _default_name(directory: Path, config: appconfig.AppConfig | None) -> str:
    if config and config.app:
        return config.app
    return re.sub(r"[^a-z0-9]+", "-", directory.name.lower()).strip("-") or "app"


@click.command(
    epilog="""\b
Examples:
  fly launch
  fly launch --name chat --regions ams,iad,sin --postgres --deploy
  fly launch --yes --command "python app.py\""""
)
@click.option("--name", help="The app's name.")
@click.option("--regions", help="Where it runs, by commas; the first is the primary region.")
@click.option("--postgres/--no-postgres", default=None, help="A Postgres in the same regions, attached.")
@click.option("--deploy/--no-deploy", "deploy_now", default=None, help="Deploy at the end.")
@click.option("--command", help="How the app is started, if there is no fly.toml.")
@click.option("-y", "--yes", is_flag=True, help="Take the default of every question not answered by a flag.")
@json_option
def launch(
    name: str | None,
    regions: str | None,
    postgres: bool | None,
    deploy_now: bool | None,
    command: str | None,
    yes: bool,
    json_output: bool,
) -> None:
    """Make an app from this folder: name, regions, Postgres?, deploy now?"""
    directory = Path.cwd()
    path = directory / "fly.toml"
    text = deploy_verbs.read_config(path) if path.exists() else ""
    config = appconfig.parse(text, "fly.toml") if text else None
    starter = "" if config else command or start_command(directory)
    known = [h.region for h in call(hosts_verbs.stub().ListHosts, hosts_pb2.ListHostsRequest()).hosts]
    default_regions = [r for r in (config.regions if config else ()) if r in known] or list(
        dict.fromkeys(known)
    )

    def ask(given: str | None, question: str, default: str) -> str:
        return given or (default if yes else click.prompt(question, default=default, err=True))

    def confirm(given: bool | None, question: str, default: bool) -> bool:
        if given is not None:
            return given
        return default if yes else click.confirm(question, default=default, err=True)

    app = ask(name, "Name", _default_name(directory, config))
    wanted = split(ask(regions, "Regions (the first is primary)", ",".join(default_regions)))
    with_postgres = confirm(postgres, "Postgres?", False)
    deploying = confirm(deploy_now, "Deploy now?", True)
    if with_postgres and len(wanted) < 2:
        raise InvalidInput(
            "Postgres needs at least two regions: with one copy, losing its host loses the data",
            hint="fly launch --regions ams,iad",
        )

    call(apps_verbs.stub().CreateApp, apps_pb2.CreateAppRequest(app_name=app, regions=wanted))
    done(f"app {app} in {', '.join(wanted)}")
    if not text:
        text = new_config(app, wanted, starter)
        path.write_text(text)
        done("wrote fly.toml")
    elif config and config.app != app:
        warn(f'fly.toml names the app {config.app or "nothing"}: write app = "{app}" there, or give -a {app}')
    if with_postgres:
        _create_postgres(app, wanted)
    if deploying:
        deploy_verbs.begin(app, text, directory, wanted, "launched", False, json_output)
        say(f"Open it in any region: curl -H 'Host: {app}' http://HOST:PORT (fly hosts list)")
    else:
        say(f"When you are ready: fly deploy -a {app}")


def _create_postgres(app: str, regions: list[str]) -> None:
    """A cluster beside the app, attached to it."""
    cluster = f"{app}-db"
    stub = postgres_verbs.stub()
    with waiting(f"creating Postgres {cluster} in {', '.join(regions)}"):
        call(
            stub.CreateCluster,
            postgres_pb2.CreateClusterRequest(cluster_name=cluster, regions=regions),
            postgres_verbs.CREATE_TIMEOUT_S,
        )
        request = postgres_pb2.AttachAppRequest(cluster_name=cluster, app_name=app)
        call(stub.AttachApp, request, postgres_verbs.CREATE_TIMEOUT_S)
    done(f"Postgres {cluster}: primary in {regions[0]}, attached as DATABASE_URL")
