"""One table of a fly.toml, read with types, and what there is to say about it.

A `Table` never raises: a wrong value becomes an error with its line and the default is
used, so that one pass finds every mistake of a file. Fly's leniences about form live
here (numbers as strings, one table where an array is meant); those about names and
meaning live with their sections.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any, TypeVar, cast

from flyd.deploy.appconfig import units
from flyd.deploy.appconfig.positions import Path, dotted, line_of
from flyd.deploy.appconfig.values import Remark

T = TypeVar("T")

SHELL_WORDS = ("&&", "||", "|", ";", ">", ">>", "<", "&")  # mean nothing without a shell


class Remarks:
    """Errors and warnings, as they are found."""

    def __init__(self, lines: dict[Path, int]) -> None:
        self._lines = lines
        self.errors: list[Remark] = []
        self.warnings: list[Remark] = []

    def error(self, path: Path, message: str) -> None:
        """The file can not be used until this is mended."""
        self.errors.append(self._remark(path, message))

    def warn(self, path: Path, message: str) -> None:
        """The file is used, and probably not as its writer thinks."""
        self.warnings.append(self._remark(path, message))

    def _remark(self, path: Path, message: str) -> Remark:
        return Remark(line=line_of(self._lines, path), key=dotted(path), message=message)


class Table:
    """A table, where it stands, and where to say what is wrong with it."""

    def __init__(self, values: dict[str, Any], path: Path, remarks: Remarks) -> None:
        self.values = values
        self.path = path
        self.remarks = remarks

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def error(self, key: str, message: str) -> None:
        """Say that the value of `key` (or its absence) is wrong."""
        self.remarks.error((*self.path, key), message)

    def warn(self, key: str, message: str) -> None:
        """Say that the value of `key` is dubious."""
        self.remarks.warn((*self.path, key), message)

    def text(self, key: str, default: str = "") -> str:
        """A string."""
        value = self.values.get(key, default)
        if isinstance(value, str):
            return value
        self.error(key, f"expected a string, not {_kind(value)}")
        return default

    def one_of(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        """A string out of a few."""
        value = self.text(key, default)
        if value in allowed:
            return value
        self.error(key, f"{value!r} is not one of {', '.join(allowed)}")
        return default

    def flag(self, key: str, default: bool = False) -> bool:
        """A boolean."""
        value = self.values.get(key, default)
        if isinstance(value, bool):
            return value
        self.error(key, f"expected true or false, not {_kind(value)}")
        return default

    def integer(self, key: str, default: int, *, minimum: int, maximum: int) -> int:
        """A whole number, also written as a string."""
        value = self.values.get(key, default)
        if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            self.error(key, f"expected a whole number, not {_kind(value)}")
            return default
        if key in self and not minimum <= value <= maximum:
            self.error(key, f"{value} is not between {minimum} and {maximum}")
            return default
        return value

    def number(self, key: str, default: float) -> float:
        """A number above 0."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            self.error(key, f"expected a number above 0, not {value!r}")
            return default
        return float(value)

    def duration_s(self, key: str, default: float, *, bare_s: float = 1.0) -> float:
        """A duration; a bare number counts `bare_s` each, an empty string is no value."""
        seconds = self._converted(key, lambda value: units.duration_s(value, bare_s=bare_s))
        return default if seconds is None else seconds

    def memory_mb(self, key: str) -> int | None:
        """An amount of memory, None if the key is absent."""
        return self._converted(key, units.memory_mb)

    def disk_gb(self, key: str) -> int | None:
        """A size of a volume, None if the key is absent."""
        return self._converted(key, units.disk_gb)

    def command(self, key: str) -> tuple[str, ...]:
        """A command line, split as a POSIX shell would. No shell will run it."""
        line = self.text(key)
        try:
            words = tuple(shlex.split(line))
        except ValueError as error:
            self.error(key, f"can not be split into words ({str(error).lower()}): {line!r}")
            return ()
        shell_words = [word for word in words if word in SHELL_WORDS]
        if shell_words:
            self.warn(key, f"no shell runs this, {shell_words[0]!r} is passed as a word: use sh -c '...'")
        return words

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of strings; one string is a list of one."""
        value = self.values.get(key, [])
        if isinstance(value, str):
            return (value,)
        if isinstance(value, list):
            items = cast("list[object]", value)
            if all(isinstance(item, str) for item in items):
                return tuple(cast("list[str]", items))
        self.error(key, "expected a list of strings")
        return ()

    def table(self, key: str) -> Table:
        """A table; an absent one is empty."""
        value = self.values.get(key, {})
        if not isinstance(value, dict):
            self.error(key, f"expected a table, not {_kind(value)}")
            value = {}
        return Table(cast("dict[str, Any]", value), (*self.path, key), self.remarks)

    def tables(self, *keys: str) -> list[Table]:
        """The tables of an array of tables, under any of its names; a single table is an array of one."""
        found: list[Table] = []
        for key in keys:
            value = self.values.get(key, [])
            if isinstance(value, dict):
                found.append(self.table(key))
                continue
            items = cast("list[object]", value) if isinstance(value, list) else [value]
            for index, item in enumerate(items):
                if isinstance(item, dict):
                    below = (*self.path, key, index)
                    found.append(Table(cast("dict[str, Any]", item), below, self.remarks))
                else:
                    self.error(key, f"expected a table or an array of tables, not {_kind(item)}")
        return found

    def _converted(self, key: str, convert: Callable[[object], T | None]) -> T | None:
        if key not in self.values:
            return None
        try:
            return convert(self.values[key])
        except ValueError as error:
            self.error(key, str(error))
            return None


def _kind(value: object) -> str:
    """How a person would call the value."""
    if isinstance(value, dict):
        return "a table"
    return "a list" if isinstance(value, list) else repr(value)
