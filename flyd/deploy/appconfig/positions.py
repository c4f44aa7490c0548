"""Where each key of a TOML text stands. tomllib does not say, and a warning without a line is a riddle.

`key_lines` takes a text that tomllib has already accepted, so this scanner checks
nothing: it only follows the grammar far enough to know which path each key has.
A path is made of keys and, below arrays, indices: ("services", 0, "ports", 1, "port").
"""

from __future__ import annotations

import tomllib

Path = tuple[str | int, ...]

_BLANK = " \t"
_SPACE = " \t\n"
_SCALAR_END = ",]}#\n"
_BARE_KEY_END = "=.] \t"


def key_lines(text: str) -> dict[Path, int]:
    """The line (from 1) where each key and each element of an array is first named."""
    scanner = _Scanner(text.replace("\r\n", "\n"))
    scanner.scan()
    return scanner.lines


def line_of(lines: dict[Path, int], path: Path) -> int:
    """The line of `path`, or of the nearest thing around it; 1 for a whole file."""
    for length in range(len(path), 0, -1):
        line = lines.get(path[:length])
        if line is not None:
            return line
    return 1


def dotted(path: Path) -> str:
    """A path as people write it: services[0].ports[1].port."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


class _Scanner:
    """One pass over the text; `at` is the next character to read."""

    def __init__(self, text: str) -> None:
        self.lines: dict[Path, int] = {}
        self._text = text
        self._at = 0
        self._line = 1
        self._lengths: dict[Path, int] = {}  # of the arrays made by [[headers]]

    def scan(self) -> None:
        """Read all the text."""
        table: Path = ()
        while self._skip_space_and_comments():
            if self._peek("[["):
                table = self._header("[[", "]]")
            elif self._peek("["):
                table = self._header("[", "]")
            else:
                self._pair(table)

    def _header(self, opening: str, closing: str) -> Path:
        self._advance(len(opening))
        line = self._line
        keys = self._dotted_key()
        self._advance(len(closing))
        path: Path = ()
        for number, key in enumerate(keys, start=1):
            path = (*path, key)
            self.lines.setdefault(path, line)
            if opening == "[[" and number == len(keys):
                self._lengths[path] = self._lengths.get(path, 0) + 1
            if path in self._lengths:
                path = (*path, self._lengths[path] - 1)
                self.lines.setdefault(path, line)
        return path

    def _pair(self, table: Path) -> None:
        line = self._line
        path = table
        for key in self._dotted_key():
            path = (*path, key)
            self.lines.setdefault(path, line)
        self._advance(1)  # "="
        self._skip(_BLANK)
        self._value(path)

    def _dotted_key(self) -> list[str]:
        keys: list[str] = []
        while True:
            self._skip(_BLANK)
            start = self._at
            if self._peek('"') or self._peek("'"):
                self._string()
                raw = self._text[start : self._at]
                keys.append(tomllib.loads(f"key = {raw}")["key"])
            else:
                self._skip_until(_BARE_KEY_END)
                keys.append(self._text[start : self._at])
            self._skip(_BLANK)
            if not self._peek("."):
                return keys
            self._advance(1)

    def _value(self, path: Path) -> None:
        if self._peek('"') or self._peek("'"):
            self._string()
        elif self._peek("["):
            self._array(path)
        elif self._peek("{"):
            self._inline_table(path)
        else:
            self._skip_until(_SCALAR_END)

    def _array(self, path: Path) -> None:
        self._advance(1)
        index = 0
        while self._skip_space_and_comments() and not self._peek("]"):
            if self._peek(","):
                self._advance(1)
                continue
            self.lines.setdefault((*path, index), self._line)
            self._value((*path, index))
            index += 1
        self._advance(1)

    def _inline_table(self, path: Path) -> None:
        self._advance(1)
        while self._skip_space_and_comments() and not self._peek("}"):
            if self._peek(","):
                self._advance(1)
                continue
            self._pair(path)
        self._advance(1)

    def _string(self) -> None:
        quote = self._text[self._at]
        if not self._peek(quote * 3):
            self._skip_string(quote)
            return
        self._skip_string(quote * 3)
        self._skip(quote, limit=2)  # up to two quotes may stand right before the closing three

    def _skip_string(self, closing: str) -> None:
        self._advance(len(closing))
        while not self._peek(closing):
            self._advance(2 if closing[0] == '"' and self._peek("\\") else 1)
        self._advance(len(closing))

    def _skip_space_and_comments(self) -> bool:
        """Go to the next thing that counts; whether there is one."""
        self._skip(_SPACE)
        while self._peek("#"):
            self._skip_until("\n")
            self._skip(_SPACE)
        return self._at < len(self._text)

    def _peek(self, wanted: str) -> bool:
        return self._text.startswith(wanted, self._at)

    def _skip(self, characters: str, *, limit: int | None = None) -> None:
        end = len(self._text) if limit is None else min(len(self._text), self._at + limit)
        while self._at < end and self._text[self._at] in characters:
            self._advance(1)

    def _skip_until(self, characters: str) -> None:
        while self._at < len(self._text) and self._text[self._at] not in characters:
            self._advance(1)

    def _advance(self, count: int) -> None:
        self._line += self._text.count("\n", self._at, self._at + count)
        self._at += count
