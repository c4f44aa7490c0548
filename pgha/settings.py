"""What one member is told: by a file (TOML), by the environment, or by both; the environment wins.

flyd tells its members by the environment alone. Whoever runs pgha by hand writes a file, and may override
a line of it for one run. Every mistake is named with the place it is in: the variable, or file and line.

Read by pgha/main.py at start. Knows what may be said, not what is done with it.
"""

from __future__ import annotations

import difflib
import re
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from flyd.errors import InvalidInput
from flyd.model import Value

TEXT, LIST, PORT = "text", "list of texts", "port number"
SEE = "docs/pgha.md has every key; `pgha run --help` every variable"


class Setting(Value, frozen=True, kw_only=True):
    """One thing that can be said."""

    key: str
    variables: tuple[str, ...]  # the first that is set counts
    about: str
    kind: str = TEXT
    default: str | None = ""  # None: it must be said
    secret: bool = False


SETTINGS: tuple[Setting, ...] = (
    Setting(key="cluster", variables=("PGHA_CLUSTER",), default=None, about="name of the cluster"),
    Setting(
        key="node",
        variables=("PGHA_NODE",),
        default=None,
        about="name of this member, one of those below; for ever",
    ),
    Setting(
        key="members",
        variables=("PGHA_VOTERS",),
        default=None,
        kind=LIST,
        about="all members, in order of preference, the same everywhere",
    ),
    Setting(
        key="region",
        variables=("PGHA_REGION", "FLY_REGION"),
        about="where this member is, to be shown",
    ),
    Setting(
        key="address",
        variables=("PGHA_ADDRESS", "FLY_PRIVATE_IP"),
        default=None,
        about="IP address where Postgres listens and the others reach it",
    ),
    Setting(
        key="port",
        variables=("PGHA_PORT",),
        default="5432",
        kind=PORT,
        about="of Postgres (TCP); the agents talk on the same number (UDP)",
    ),
    Setting(
        key="data_dir",
        variables=("PGHA_DATA_DIR",),
        default=None,
        about="this member's directory; the data are in pgdata below it",
    ),
    Setting(
        key="etcd",
        variables=("FLYD_ETCD",),
        default=None,
        kind=LIST,
        about="client addresses of etcd, host:port each",
    ),
    Setting(
        key="etcd_identity",
        variables=("FLYD_IDENTITY",),
        about="folder with the certificate to show to etcd; without it there is no TLS",
    ),
    Setting(
        key="superuser_password",
        variables=("PGHA_SUPERUSER_PASSWORD",),
        default=None,
        secret=True,
        about="of user postgres, the same everywhere",
    ),
    Setting(
        key="replication_password",
        variables=("PGHA_REPLICATION_PASSWORD",),
        default=None,
        secret=True,
        about="for streaming between members, the same everywhere",
    ),
    Setting(
        key="archive_dir",
        variables=("PGHA_ARCHIVE_DIR",),
        about="this cluster's own folder for WAL and base backups, reached by all members",
    ),
    Setting(
        key="restore_from",
        variables=("PGHA_RESTORE_FROM",),
        about="begin with what this archive of another cluster has",
    ),
    Setting(
        key="restore_to",
        variables=("PGHA_RESTORE_TO",),
        about="up to this instant (ISO 8601 with offset); without it all of it",
    ),
    Setting(
        key="bin_dir",
        variables=("PGHA_BIN_DIR",),
        about="PostgreSQL's programs, if not where they usually are",
    ),
)
BY_KEY = {setting.key: setting for setting in SETTINGS}


def describe() -> list[str]:
    """Every setting in a line: its variables, its key, what it says."""
    lines = ["Settings, by variable and by key of the file:"]
    for setting in SETTINGS:
        names = " or ".join(setting.variables)
        lines.append(f"  {names:<30} {setting.key:<21} {setting.about}")
    return lines


class Settings:
    """All that was said, checked for its form."""

    def __init__(self, said: Mapping[str, str | tuple[str, ...]], places: Mapping[str, str]) -> None:
        self._said = said
        self._places = places

    def text(self, key: str) -> str:
        """One text; `InvalidInput` if it must be said and is not."""
        value = self._value(key)
        return value if isinstance(value, str) else ",".join(value)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list."""
        value = self._value(key)
        return (value,) if isinstance(value, str) else value

    def place(self, key: str) -> str:
        """Where it was said, for a message about it."""
        return self._places.get(key, key)

    def _value(self, key: str) -> str | tuple[str, ...]:
        setting = BY_KEY[key]
        value = self._said.get(key) or setting.default
        if value is None:
            raise InvalidInput(f"{key} is not set, nor is {' or '.join(setting.variables)}", hint=SEE)
        return value


def read(file: str, env: Mapping[str, str]) -> Settings:
    """The file's settings (`file` may be empty: none) with the environment's over them."""
    said: dict[str, str | tuple[str, ...]] = {}
    places: dict[str, str] = {}
    if file:
        text = _contents(file)
        for key, value in _parsed(file, text).items():
            places[key] = f"{file}, line {_line(text, key)}: {key}"
            said[key] = _checked(key, value, places[key])
        _keep_private(file, said)
    for setting in SETTINGS:
        name = next((variable for variable in setting.variables if env.get(variable)), "")
        if name:
            places[setting.key] = name
            said[setting.key] = _from_text(setting, env[name], name)
    return Settings(said, places)


def _contents(file: str) -> str:
    try:
        return Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the configuration {file} can not be read: {error}") from None


def _parsed(file: str, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{file} is not TOML: {error}", hint='Texts go in quotes: node = "a"') from None


def _line(text: str, key: str) -> int:
    """Where the key is, counted from 1."""
    found = re.search(rf"""^[ \t]*[\["']*{re.escape(key)}\b""", text, re.MULTILINE)
    return 1 + text.count("\n", 0, found.start()) if found else 1


def _checked(key: str, value: object, place: str) -> str | tuple[str, ...]:
    """The value as it is kept, or what is wrong with it."""
    setting = BY_KEY.get(key)
    if setting is None:
        near = difflib.get_close_matches(key, BY_KEY, n=1)
        raise InvalidInput(f"{place} is no key of pgha", hint=f"Did you mean {near[0]}?" if near else SEE)
    if setting.kind is PORT and isinstance(value, int) and not isinstance(value, bool):
        return _from_text(setting, str(value), place)
    if setting.kind is LIST and isinstance(value, list):
        items = cast(list[object], value)
        texts = tuple(item for item in items if isinstance(item, str) and item)
        if texts and len(texts) == len(items):
            return texts
    if setting.kind is TEXT and isinstance(value, str):
        return value
    raise InvalidInput(f"{place} must be a {setting.kind}, not {value!r}")


def _from_text(setting: Setting, text: str, place: str) -> str | tuple[str, ...]:
    if setting.kind is LIST:
        return tuple(item.strip() for item in text.split(",") if item.strip())
    if setting.kind is PORT and not (text.isdigit() and 0 < int(text) < 65536):
        raise InvalidInput(f"{place}={text} is not a port number")
    return text


def _keep_private(file: str, said: Mapping[str, object]) -> None:
    """A file with passwords is for its owner's eyes."""
    secrets = [setting.key for setting in SETTINGS if setting.secret and setting.key in said]
    if secrets and Path(file).stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        raise InvalidInput(
            f"{file} has {' and '.join(secrets)} in it, and others than its owner can read it",
            hint=f"chmod 600 {file}",
        )
