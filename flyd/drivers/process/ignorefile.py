"""What of a source directory is left out: .dockerignore's simple forms, and ALWAYS. Pure but for `of`.

Patterns are relative to the top: `*` and `?` stay within one name, `**` crosses directories, a
leading or trailing slash means nothing, `!` takes a path back in, the last match wins, and what is
below a match matches too. ALWAYS holds anywhere in the tree and cannot be taken back.
"""

from __future__ import annotations

import re
from pathlib import Path

from flyd.errors import InvalidInput

ALWAYS = (".git", ".venv", "node_modules", "__pycache__")


class IgnoreRules:
    """The patterns of one .dockerignore, in order."""

    def __init__(self, text: str) -> None:
        self._rules: list[tuple[re.Pattern[str], bool]] = []
        for line in text.splitlines():
            pattern = line.strip()
            keep = pattern.startswith("!")
            pattern = pattern.lstrip("!").strip().strip("/").removeprefix("./")
            if pattern and not line.startswith("#"):
                self._rules.append((_compile(pattern), keep))
        self._keeps = any(keep for _, keep in self._rules)

    @classmethod
    def of(cls, directory: Path) -> IgnoreRules:
        """The rules of a source directory."""
        path = directory / ".dockerignore"
        if not path.is_file():
            return cls("")
        try:
            return cls(path.read_text("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise InvalidInput(f"{path} is not UTF-8 text", hint=str(error)) from error

    def ignored(self, name: str) -> bool:
        """Whether the path (with slashes, relative to the top) is left out."""
        if any(part in ALWAYS for part in name.split("/")):
            return True
        ignored = False
        for pattern, keep in self._rules:
            if ignored == keep and pattern.fullmatch(name):
                ignored = not keep
        return ignored

    def may_keep_inside(self, name: str) -> bool:
        """Whether something in an ignored directory might be taken back in."""
        return self._keeps and not any(part in ALWAYS for part in name.split("/"))


def _compile(pattern: str) -> re.Pattern[str]:
    translated = ""
    position = 0
    for token in re.finditer(r"\*\*/|\*\*|\*|\?|\[[^\]/]+\]|\\.", pattern):
        translated += re.escape(pattern[position : token.start()])
        position = token.end()
        text = token.group()
        if text == "**/":
            translated += "(?:.*/)?"
        elif text.startswith("["):
            translated += text.replace("[!", "[^")
        elif text.startswith("\\"):
            translated += re.escape(text[1])
        else:
            translated += {"**": ".*", "*": "[^/]*", "?": "[^/]"}[text]
    try:
        return re.compile(translated + re.escape(pattern[position:]) + "(?:/.*)?", re.DOTALL)
    except re.error as error:
        raise InvalidInput(f".dockerignore: {pattern!r} is no pattern: {error}") from error
