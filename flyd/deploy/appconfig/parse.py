"""The whole file: text in, an AppConfig or everything that is wrong with it out.

Where this differs from Fly's own parser, on purpose: unknown and unused keys are named
with their lines; a bare number in `deploy`'s durations is seconds, not nanoseconds;
`[[services.concurrency]]` loads with a warning; handlers, limits, names of apps, regions
and volumes are checked; and one table of our own (Fly ignores it, so the file still
deploys there) says where machines go, the primary region first or not; which labels their
hosts must have, all machines' or (a table below) one process group's; which of the
top-level checks restart their machine, after how many failures in a row; and, for the volumes of
a mount's `source`, how many other hosts have copies, how old these may become, and whether one
whose host is lost comes back by itself: from a copy that was no older than so much then:

    [flyd]
      regions = ["ams", "iad", "sin"]
    [flyd.require]
      disk = "nvme"
      worker = { gpu = "a100" }
    [flyd.liveness]
      alive = 3
    [flyd.volumes.data]
      replicas = 1
      every = "15m"
      recover_within = "30m"
"""

from __future__ import annotations

import re
import tomllib
from typing import Any

import msgspec

from flyd.deploy.appconfig.groups import Groups, read_commands
from flyd.deploy.appconfig.machines import (
    read_deploy,
    read_env,
    read_guests,
    read_mounts,
    read_requirements,
    read_restarts,
    read_stop,
)
from flyd.deploy.appconfig.positions import Path, key_lines
from flyd.deploy.appconfig.schema import remark_on_keys
from flyd.deploy.appconfig.services import read_checks, read_services
from flyd.deploy.appconfig.table import Remarks, Table
from flyd.deploy.appconfig.values import AppConfig, ProcessGroup, Remark, Report
from flyd.errors import InvalidInput
from flyd.model import Mount

MAX_FILE_CHARS = 1_000_000
MAX_SHOWN_CHARS = 100  # of a line with a syntax error
APP_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")  # a DNS label
REGION = re.compile(r"[a-z][a-z0-9-]{0,30}")
BUILD_SOURCES = ("image", "dockerfile", "builder", "builtin")
COMPRESSIONS = ("gzip", "zstd")
MAX_COMPRESSION_LEVEL = 9

_TOML_POSITION = re.compile(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", re.DOTALL)


def parse(text: str, filename: str) -> AppConfig:
    """The configuration that `text` describes. Raises InvalidInput with every error and its line."""
    report = inspect(text, filename)
    if report.config is None:
        raise InvalidInput(
            "\n".join(remark_text(filename, error) for error in report.errors),
            hint=f"mend the file, then try `fly config validate {filename}`",
        )
    return report.config


def inspect(text: str, filename: str) -> Report:
    """Everything there is to say about the file, errors and warnings in the order of their lines."""
    try:
        document, lines = _document(text)
    except _Malformed as malformed:
        return Report(filename=filename, errors=(malformed.remark,))
    remarks = Remarks(lines)
    remark_on_keys(document, remarks)
    config = _config(Table(document, (), remarks))
    errors, warnings = _by_line(remarks.errors), _by_line(remarks.warnings)
    if errors:
        return Report(filename=filename, errors=errors, warnings=warnings)
    return Report(
        filename=filename, config=msgspec.structs.replace(config, warnings=warnings), warnings=warnings
    )


def remark_text(filename: str, remark: Remark) -> str:
    """A remark as one shows it: fly.toml:12:7: services[0].protocol: ..."""
    column = f":{remark.column}" if remark.column else ""
    key = f" {remark.key}:" if remark.key else ""
    return f"{filename}:{remark.line}{column}:{key} {remark.message}"


class _Malformed(Exception):
    """The text is not TOML."""

    def __init__(self, remark: Remark) -> None:
        super().__init__(remark.message)
        self.remark = remark


def _document(text: str) -> tuple[dict[str, Any], dict[Path, int]]:
    if len(text) > MAX_FILE_CHARS:
        raise _Malformed(Remark(line=1, key="", message=f"is longer than {MAX_FILE_CHARS} characters"))
    try:
        return tomllib.loads(text), key_lines(text)
    except RecursionError:
        raise _Malformed(Remark(line=1, key="", message="arrays or tables are nested too deeply")) from None
    except tomllib.TOMLDecodeError as error:
        raise _Malformed(_syntax_remark(str(error), text)) from None
    except ValueError:  # tomllib leaves int()'s and date()'s own errors as they are
        raise _Malformed(Remark(line=1, key="", message="a number or a date is out of range")) from None


def _syntax_remark(message: str, text: str) -> Remark:
    lines = text.replace("\r\n", "\n").split("\n")
    match = _TOML_POSITION.fullmatch(message)
    if match is None:
        return Remark(line=1, key="", message=message)
    line, column = (int(match[2]), int(match[3])) if match[2] else (len(lines), len(lines[-1]) + 1)
    reason = match[1][0].lower() + match[1][1:]
    start = max(0, column - MAX_SHOWN_CHARS // 2)
    shown = lines[line - 1].replace("\t", " ")[start : start + MAX_SHOWN_CHARS]
    caret = " " * (column - 1 - start) + "^"
    return Remark(line=line, column=column, key="", message=f"{reason}\n    {shown}\n    {caret}")


def _by_line(remarks: list[Remark]) -> tuple[Remark, ...]:
    return tuple(sorted(dict.fromkeys(remarks), key=lambda remark: remark.line))


def _config(root: Table) -> AppConfig:
    groups, commands = read_commands(root)
    mounts = read_mounts(root, groups)
    regions = _regions(root)
    return AppConfig(
        app=_app(root),
        primary_region=regions[0] if regions else "",
        regions=regions,
        env=read_env(root),
        build=_build(root),
        deploy=read_deploy(root, has_mounts=any(mounts.values())),
        groups=_groups(root, groups, commands, mounts),
        stop=read_stop(root),
    )


def _app(root: Table) -> str:
    name = root.text("app")
    if name and APP_NAME.fullmatch(name) is None:
        # Templates have a placeholder here, and the command's --app takes precedence.
        root.warn("app", f"{name!r} is no name for an app (lower-case letters, digits and -): give --app")
    return name


def _regions(root: Table) -> tuple[str, ...]:
    """Where machines go, the primary region first."""
    primary = root.text("primary_region")
    if primary and REGION.fullmatch(primary) is None:
        root.error("primary_region", f"{primary!r} is not a region's name, such as 'ams'")
    section = root.table("flyd")
    named = section.strings("regions")
    for region in named:
        if REGION.fullmatch(region) is None:
            section.error("regions", f"{region!r} is not a region's name, such as 'ams'")
    if len(dict.fromkeys(named)) < len(named):
        section.error("regions", "a region is named twice")
    if primary and named and primary not in named:
        root.error("primary_region", f"{primary!r} is not among flyd.regions: {', '.join(named)}")
    return tuple(dict.fromkeys(((primary,) if primary else ()) + named))


def _build(root: Table) -> dict[str, Any]:
    section = root.table("build")
    sources = [key for key in BUILD_SOURCES if key in section]
    if len(sources) > 1:
        section.warn(sources[1], f"there is more than one way to build: {', '.join(sources)}")
    section.one_of("compression", COMPRESSIONS, "gzip")
    section.integer("compression_level", 0, minimum=0, maximum=MAX_COMPRESSION_LEVEL)
    return section.values


def _groups(
    root: Table, groups: Groups, commands: dict[str, tuple[str, ...]], mounts: dict[str, tuple[Mount, ...]]
) -> dict[str, ProcessGroup]:
    experimental = root.table("experimental")
    before = experimental.strings("entrypoint")
    image_command = experimental.strings("cmd")
    instead = experimental.strings("exec")
    services = read_services(root, groups)
    checks = read_checks(root, groups)
    guests = read_guests(root, groups)
    restarts = read_restarts(root, groups)
    labels = read_requirements(root, groups)
    return {
        name: ProcessGroup(
            command=instead or (*before, *(commands[name] or image_command)),
            services=services[name],
            checks=checks[name],
            mounts=mounts[name],
            guest=guests[name],
            restart=restarts[name],
            host_labels=labels[name],
        )
        for name in groups.names
    }
