"""`fly`: finds the verb, loads only its file, and turns errors into words and exit codes.

Exit codes are those of flyd/errors.py; 130 after Ctrl-C.
"""

from __future__ import annotations

import importlib
import os
import sys

import click

from flyd.cli.options import json_option
from flyd.errors import FlydError

# verb -> (module in flyd.cli, attribute). One file a group of verbs, loaded when used.
COMMANDS = {
    "apps": ("apps", "apps"),
    "chaos": ("chaos", "chaos"),
    "checks": ("status", "checks"),
    "cluster": ("cluster", "cluster"),
    "config": ("config", "config"),
    "console": ("console", "console"),
    "deploy": ("deploy", "deploy"),
    "hosts": ("hosts", "hosts"),
    "incidents": ("incidents", "incidents"),
    "launch": ("launch", "launch"),
    "logs": ("logs", "logs"),
    "machine": ("machine", "machine"),
    "postgres": ("postgres", "postgres"),
    "releases": ("deploy", "releases"),
    "scale": ("scale", "scale"),
    "secrets": ("secrets", "secrets"),
    "ssh": ("console", "ssh"),
    "status": ("status", "status"),
    "version": ("hosts", "version"),
    "volumes": ("volumes", "volumes"),
}
ALIASES = {"pg": "postgres", "m": "machine", "machines": "machine", "vol": "volumes", "volume": "volumes"}


class LazyGroup(click.Group):
    """Imports a verb's module only when it is used: `fly --help` stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All verbs, by name."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb, by its name or alias."""
        found = COMMANDS.get(ALIASES.get(cmd_name, cmd_name))
        if found is None:
            return None
        module, attribute = found
        command: click.Command = getattr(importlib.import_module(f"flyd.cli.{module}"), attribute)
        return command


@click.command(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  fly cluster up --regions ams,iad,sin    a cluster on this machine
  fly launch                              an app from this folder: four questions
  fly deploy                              the next release
  fly status                              how it is

\b
Shell completion: eval "$(_FLY_COMPLETE=bash_source fly)"   (or zsh_source, fish_source)""",
)
@json_option
def fly(json_output: bool) -> None:
    """Run stateful applications on your own hosts, in several regions."""


def main() -> None:
    """Entry point: errors become a message and an exit code, never a traceback."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its own lines say nothing that our errors don't
    try:
        result = fly.main(standalone_mode=False)
        if connection := sys.modules.get("flyd.cli.connection"):  # the verb talked to a cluster
            connection.check_age()
        sys.exit(result if isinstance(result, int) else 0)
    except FlydError as error:
        from flyd.cli.output import report

        report(error)
        sys.exit(error.exit_code)
    except OSError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Aborted.", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
