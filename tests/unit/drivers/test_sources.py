"""Packing, receiving and unpacking source trees; hostile tars; .dockerignore."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from flyd.drivers.locks import Locks
from flyd.drivers.process import sources
from flyd.drivers.process.ignorefile import IgnoreRules
from flyd.drivers.process.sources import DirectorySources, pack
from flyd.errors import FlydError, InvalidInput, NotFound, Refused


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def nothing_to_fetch(digest: str) -> AsyncIterator[bytes]:
    raise NotFound(f"no peer has {digest}")
    yield b""


def make(top: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)
    return top


def packed(directory: Path) -> tuple[str, bytes]:
    into = io.BytesIO()
    return pack(directory, into), into.getvalue()


def names(tar: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        return opened.getnames()


# --------------------------------------------------------------------------- packing


def test_the_same_content_has_the_same_digest(tmp_path: Path) -> None:
    one = make(tmp_path / "one", {"b.py": "2", "a/z": "1", "run": "#!"})
    two = make(tmp_path / "two", {"run": "#!", "a/z": "1", "b.py": "2"})
    for top in (one, two):
        (top / "run").chmod(0o755)
        (top / "link").symlink_to("a/z")
    os.utime(two / "b.py", (1, 1))
    (two / "b.py").chmod(0o600)
    digest, tar = packed(one)
    assert packed(two) == (digest, tar)
    assert digest == hashlib.sha256(tar).hexdigest()
    assert names(tar) == ["a", "a/z", "b.py", "link", "run"]
    (two / "a/z").write_text("other")
    assert packed(two)[0] != digest


def test_what_is_left_out(tmp_path: Path) -> None:
    make(
        tmp_path, {".dockerignore": "*.log\nbuild\n!build/keep\n", "app.py": "", "x.log": "", "sub/x.log": ""}
    )
    make(tmp_path, {"build/junk": "", "build/keep/f": "", ".git/config": "", "sub/node_modules/m": ""})
    make(tmp_path, {"sub/__pycache__/c": "", ".venv/bin/python": ""})
    assert names(packed(tmp_path)[1]) == [
        ".dockerignore",
        "app.py",
        "build/keep",
        "build/keep/f",
        "sub",
        "sub/x.log",
    ]


@pytest.mark.parametrize(
    ("rules", "ignored", "kept"),
    [
        ("foo", ["foo", "foo/bar"], ["a/foo", "foobar"]),
        ("/foo/", ["foo", "foo/bar"], ["a/foo"]),
        ("**/foo", ["foo", "a/foo", "a/b/foo/c"], ["a/foob"]),
        ("*.md\n!README.md", ["a.md"], ["README.md", "sub/a.md"]),
        ("a/**", ["a/b", "a/b/c"], ["b/a"]),
        ("a?c", ["abc"], ["ac", "a/c"]),
        ("[a-c]x\n[!d]y", ["ax", "ey"], ["dx", "dy"]),
        ("# comment\n\n  spaced  \n", ["spaced"], ["# comment"]),
        ("./tmp", ["tmp/x"], ["a/tmp"]),
        ("!.git", [".git", "a/.git/x"], []),
        ("a.b", ["a.b"], ["axb"]),
    ],
)
def test_dockerignore(rules: str, ignored: list[str], kept: list[str]) -> None:
    parsed = IgnoreRules(rules)
    assert [name for name in ignored if not parsed.ignored(name)] == []
    assert [name for name in kept if parsed.ignored(name)] == []


def test_special_files_and_links_out_are_refused(tmp_path: Path) -> None:
    for target in ("/etc/passwd", "../other", "sub/../../other"):
        top = make(tmp_path / target.replace("/", "_"), {"sub/f": ""})
        (top / "link").symlink_to(target)
        with pytest.raises(InvalidInput, match="leads out"):
            packed(top)
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(make(tmp_path / "s", {"f": ""}) / "sock"))
        with pytest.raises(InvalidInput, match=r"sock is a socket"):
            packed(tmp_path / "s")
    with pytest.raises(InvalidInput, match="no directory"):
        packed(tmp_path / "absent")


def test_the_limit_names_what_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SOURCE_MAX_BYTES", 3 * 1024**2)
    make(tmp_path, {"a.py": "", "data/one": "x" * 2 * 1024**2, "data/two": "x" * 2 * 1024**2})
    with pytest.raises(InvalidInput, match="larger than 3 MiB") as raised:
        packed(tmp_path)
    assert "data (4 MiB)" in raised.value.hint


# --------------------------------------------------------------------------- a host's store


async def test_receive_then_open_and_ensure(tmp_path: Path) -> None:
    top = make(tmp_path / "src", {"a/b": "text", "run": "#!"})
    (top / "run").chmod(0o755)
    (top / "l").symlink_to("a/b")
    digest, tar = packed(top)
    store = DirectorySources(tmp_path / "store", nothing_to_fetch)
    assert not store.has(digest)
    await store.receive(digest, chunks(tar[:700], tar[700:]))
    await store.receive(digest, chunks(tar))
    assert store.has(digest)
    assert b"".join([chunk async for chunk in store.open(digest)]) == tar
    tree = Path(await store.ensure(digest))
    assert await store.ensure(digest) == str(tree)
    assert (tree / "a/b").read_text() == "text"
    assert os.readlink(tree / "l") == "a/b"
    assert os.access(tree / "run", os.X_OK)
    assert packed(tree) == (digest, tar)


async def test_ensure_fetches_from_another_host(tmp_path: Path) -> None:
    digest, tar = packed(make(tmp_path / "src", {"f": "1"}))
    there = DirectorySources(tmp_path / "there", nothing_to_fetch)
    await there.receive(digest, chunks(tar))
    here = DirectorySources(tmp_path / "here", there.open)
    assert (Path(await here.ensure(digest)) / "f").read_text() == "1"
    with pytest.raises(NotFound):
        await here.ensure("0" * 64)


@pytest.mark.parametrize("damage", [b"", b"x"])
async def test_a_wrong_digest_leaves_nothing(tmp_path: Path, damage: bytes) -> None:
    digest, tar = packed(make(tmp_path / "src", {"f": "1"}))
    store = DirectorySources(tmp_path / "store", nothing_to_fetch)
    with pytest.raises(Refused, match="digest"):
        await store.receive(digest, chunks(tar[:-1], damage))
    assert not store.has(digest)
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


async def test_a_transfer_that_breaks_leaves_nothing(tmp_path: Path) -> None:
    async def broken(digest: str) -> AsyncIterator[bytes]:
        yield b"half"
        raise ConnectionResetError

    store = DirectorySources(tmp_path / "store", broken)
    with pytest.raises(ConnectionResetError):
        await store.ensure("0" * 64)
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "A" * 64, "sha256:" + "0" * 64])
async def test_a_digest_is_a_digest(tmp_path: Path, digest: str) -> None:
    store = DirectorySources(tmp_path / "store", nothing_to_fetch)
    with pytest.raises(InvalidInput, match="no digest"):
        await store.ensure(digest)


def entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


HOSTILE = {
    "absolute": [entry("/tmp/flyd-evil")],
    "parent": [entry("../evil")],
    "parent inside": [entry("a", tarfile.DIRTYPE), entry("a/../../evil")],
    "link absolute": [entry("l", tarfile.SYMTYPE, "/etc")],
    "link out": [entry("l", tarfile.SYMTYPE, "..")],
    "link out by a chain": [
        entry("d", tarfile.DIRTYPE),
        entry("d/up", tarfile.SYMTYPE, ".."),
        entry("x", tarfile.SYMTYPE, "d/up/.."),
    ],
    "write through a link": [entry("l", tarfile.SYMTYPE, "."), entry("l/evil")],
    "hard link": [entry("h", tarfile.LNKTYPE, "/etc/passwd")],
    "device": [entry("dev", tarfile.CHRTYPE)],
    "pipe": [entry("pipe", tarfile.FIFOTYPE)],
    "twice": [entry("f"), entry("f")],
    "file as directory": [entry("f"), entry("f/g")],
    "no directory": [entry("a/b")],
    "the top": [entry(".")],
}


@pytest.mark.parametrize("case", sorted(HOSTILE))
async def test_hostile_tars_are_refused(tmp_path: Path, case: str) -> None:
    into = io.BytesIO()
    with tarfile.open(fileobj=into, mode="w") as tar:
        for info in HOSTILE[case]:
            tar.addfile(info)
    digest = hashlib.sha256(into.getvalue()).hexdigest()
    store = DirectorySources(tmp_path / "store", nothing_to_fetch)
    await store.receive(digest, chunks(into.getvalue()))
    with pytest.raises(Refused):
        await store.ensure(digest)
    assert list((tmp_path / "store/trees").iterdir()) == []
    assert list((tmp_path / "store/tmp").iterdir()) == []
    assert not (tmp_path / "evil").exists()


async def test_noise_is_refused(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"noise").hexdigest()
    store = DirectorySources(tmp_path / "store", nothing_to_fetch)
    await store.receive(digest, chunks(b"noise"))
    with pytest.raises(FlydError, match="no tree"):
        await store.ensure(digest)


async def test_unknown_digests_leave_nothing_in_memory(tmp_path: Path) -> None:
    store = DirectorySources(tmp_path, nothing_to_fetch)
    for number in range(50):
        with pytest.raises(NotFound):
            await store.ensure(hashlib.sha256(b"%d" % number).hexdigest())
    held = [kept for kept in vars(store).values() if isinstance(kept, Locks)]
    assert [len(locks) for locks in held] == [0]
