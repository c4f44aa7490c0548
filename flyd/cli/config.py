"""fly config: what a fly.toml says, before anything is deployed."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from flyd.cli.options import json_option
from flyd.cli.output import done, emit, err, escape
from flyd.deploy import appconfig
from flyd.errors import InvalidInput


@click.group()
def config() -> None:
    """fly.toml."""


@config.command(epilog="Example: fly config validate fly.toml")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@json_option
@click.pass_context
def validate(ctx: click.Context, files: tuple[Path, ...], json_output: bool) -> None:
    """Errors and warnings of fly.toml files, with their lines. Exit code 2 if there are errors."""
    reports: list[appconfig.Report] = []
    for path in files or (Path("fly.toml"),):
        try:
            reports.append(appconfig.inspect(path.read_text(), str(path)))
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"{path}: {error}", hint="Name a file: fly config validate FILE") from None
    if json_output:
        emit([msgspec.to_builtins(report) for report in reports])
    for report in reports if not json_output else []:
        for remark in report.errors:
            err.print(f"[red]error[/red]   {escape(appconfig.remark_text(report.filename, remark))}")
        for remark in report.warnings:
            err.print(f"[yellow]warning[/yellow] {escape(appconfig.remark_text(report.filename, remark))}")
        if not report.errors:
            done(f"{report.filename} is valid ({len(report.warnings)} warnings)")
    if any(report.errors for report in reports):
        ctx.exit(InvalidInput.exit_code)
