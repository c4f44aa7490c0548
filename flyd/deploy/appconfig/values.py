"""What a fly.toml says, as frozen values that a release stores.

Every section is already resolved: legacy forms are rewritten, `http_service` is a
`Service` with ports 80 and 443, and each process group holds what belongs to it. So
nothing after `parse` needs to know fly.toml's rules. Written by `parse.py`; read by
the deployer (through `expansion.py`) and the command.
"""

from __future__ import annotations

from typing import Any

import msgspec

from flyd.model import Check, Guest, Mount, RestartPolicy, Service, StopConfig, Value

DEFAULT_GROUP = "app"
DEFAULT_WAIT_TIMEOUT_S = 300.0
DEFAULT_RELEASE_COMMAND_TIMEOUT_S = 300.0
DEFAULT_MAX_UNAVAILABLE = 1.0  # one at a time: what is new comes first, and needs room beside the old


class Remark(Value, frozen=True, kw_only=True):
    """An error or a warning about the file. `key` is dotted; line and column count from 1."""

    line: int
    key: str
    message: str
    column: int = 0  # 0: the whole line


class DeployPolicy(Value, frozen=True, kw_only=True):
    """How machines are replaced. max_unavailable: below 1 a fraction of the group, else a number."""

    strategy: str = "rolling"  # rolling, immediate, canary, bluegreen
    release_command: tuple[str, ...] = ()
    release_command_timeout_s: float = DEFAULT_RELEASE_COMMAND_TIMEOUT_S
    release_command_guest: Guest | None = None  # None: as the default group
    wait_timeout_s: float = DEFAULT_WAIT_TIMEOUT_S
    max_unavailable: float = DEFAULT_MAX_UNAVAILABLE


class ProcessGroup(Value, frozen=True, kw_only=True):
    """One kind of machine of the app: its command, and all that belongs to it alone."""

    command: tuple[str, ...] = ()  # empty: the image's own
    services: tuple[Service, ...] = ()
    checks: dict[str, Check] = {}
    mounts: tuple[Mount, ...] = ()  # at most one
    guest: Guest = Guest()
    restart: RestartPolicy = RestartPolicy()
    host_labels: dict[str, str] = {}  # what the labels of its machines' hosts must say


def _only_default_group() -> dict[str, ProcessGroup]:
    return {DEFAULT_GROUP: ProcessGroup()}


class AppConfig(Value, frozen=True, kw_only=True):
    """A whole fly.toml. `regions` starts with the primary region; both are empty if the file names none."""

    app: str = ""
    primary_region: str = ""
    regions: tuple[str, ...] = ()
    env: dict[str, str] = {}
    build: dict[str, Any] = {}  # as written; what a driver makes of it is its own matter
    deploy: DeployPolicy = DeployPolicy()
    groups: dict[str, ProcessGroup] = msgspec.field(default_factory=_only_default_group)  # default first
    stop: StopConfig = StopConfig()
    warnings: tuple[Remark, ...] = ()


class Report(Value, frozen=True, kw_only=True):
    """Everything there is to say about a file. `config` is None if there are errors."""

    filename: str
    config: AppConfig | None = None
    errors: tuple[Remark, ...] = ()
    warnings: tuple[Remark, ...] = ()
