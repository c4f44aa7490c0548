"""The lines of keys, against tomllib's own idea of which keys there are."""

from __future__ import annotations

import tomllib
from pathlib import Path as File
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyd.deploy.appconfig.positions import Path, dotted, key_lines, line_of

CORPUS = sorted((File(__file__).parent / "corpus").glob("*.toml"))


def paths_of(value: object, path: Path = ()) -> set[Path]:
    found: set[Path] = {path} if path else set()
    if isinstance(value, dict):
        for key, below in cast("dict[str, Any]", value).items():
            found |= paths_of(below, (*path, key))
    if isinstance(value, list):
        for index, below in enumerate(cast("list[Any]", value)):
            found |= paths_of(below, (*path, index))
    return found


TRICKY = '''\
# a comment with key = 1
title = "a # b = [c]"  # tail
site.name."dotted.key" = 'it"s'
"quoted \\u0041" = 1

multi = """
fake = 1
[fake]
\\""" still in
""""
raw = \'\'\'
also = "fake" \'\'\'
list = [
  1, # one
  [2, 3],
  { a = { b = 1 }, c = [ { d = 2 } ] },
]
date = 1979-05-27 07:32:00
empty = []
none = {}

[services.extra]   # explicit before use
x = 1
[[ports]]
port = 80
  [ports.tls]
  alpn = ["h2"]
  [[ports.checks]]
  path = "/a"
  [[ports.checks]]
  path = "/b"
[[ports]]
port = 443
  [[ports.checks]]
  path = "/c"
["a.b".'c d']
deep.er = true
'''

TRICKY_LINES: list[tuple[Path, int]] = [
    (("title",), 2),
    (("site",), 3),
    (("site", "name", "dotted.key"), 3),
    (("quoted A",), 4),
    (("multi",), 6),
    (("raw",), 11),
    (("list",), 13),
    (("list", 0), 14),
    (("list", 1, 1), 15),
    (("list", 2, "a", "b"), 16),
    (("list", 2, "c", 0, "d"), 16),
    (("date",), 18),
    (("services",), 22),
    (("services", "extra", "x"), 23),
    (("ports",), 24),
    (("ports", 0, "port"), 25),
    (("ports", 0, "tls", "alpn"), 27),
    (("ports", 0, "checks", 1, "path"), 31),
    (("ports", 1), 32),
    (("ports", 1, "port"), 33),
    (("ports", 1, "checks", 0, "path"), 35),
    (("a.b", "c d"), 36),
    (("a.b", "c d", "deep", "er"), 37),
]


def test_tricky_file_has_exactly_the_keys_that_tomllib_sees() -> None:
    assert set(key_lines(TRICKY)) == paths_of(tomllib.loads(TRICKY))


@pytest.mark.parametrize(("path", "line"), TRICKY_LINES, ids=[dotted(p) for p, _ in TRICKY_LINES])
def test_tricky_lines(path: Path, line: int) -> None:
    assert key_lines(TRICKY)[path] == line


def test_windows_line_ends_count_the_same() -> None:
    assert key_lines(TRICKY.replace("\n", "\r\n")) == key_lines(TRICKY)


@pytest.mark.parametrize("file", CORPUS, ids=[f.stem for f in CORPUS])
def test_every_key_of_the_corpus_is_found_on_a_line_that_names_it(file: File) -> None:
    text = file.read_text()
    lines = key_lines(text)
    assert set(lines) == paths_of(tomllib.loads(text))
    for path, line in lines.items():
        name = next(part for part in reversed(path) if isinstance(part, str))
        if isinstance(path[-1], str):
            assert name in text.split("\n")[line - 1]


def test_line_of_falls_back_to_what_is_around() -> None:
    lines = key_lines("a = 1\n[b]\nc = 2\n")
    assert line_of(lines, ("b", "missing", "deeper")) == 2
    assert line_of(lines, ("nowhere",)) == 1


def test_dotted() -> None:
    assert dotted(("services", 0, "ports", 1, "port")) == "services[0].ports[1].port"


keys = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "Zs", "S")), min_size=1, max_size=4)
scalars = st.integers(-5, 5) | st.booleans() | st.text("ab\"'\\\n#=[]{},", max_size=6)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(keys, v, max_size=3), max_leaves=8
)


def written(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list):
        return "[" + ", ".join(written(v) for v in cast("list[object]", value)) + "]"
    if isinstance(value, dict):
        pairs = cast("dict[str, object]", value).items()
        return "{" + ", ".join(f"{written(k)} = {written(v)}" for k, v in pairs) + "}"
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(keys, values, max_size=4))
def test_any_document_each_pair_on_its_own_line(document: dict[str, Any]) -> None:
    text = "".join(f"{written(key)} = {written(value)}\n" for key, value in document.items())
    lines = key_lines(text)
    assert set(lines) == paths_of(tomllib.loads(text))
    for path, line in lines.items():
        assert line == list(document).index(str(path[0])) + 1
