"""Trees of plain files as streams, and what two trees differ in. Called by directory.py, in threads.

    MAGIC, length of the next (8 bytes), JSON: names that are in the parent and not in the tree any more
    a tar of all that is new or differs

Files are compared byte by byte, not by their times: one that is written twice within a tick of the kernel's
clock has the same time and another content. Names are bytes; in JSON each byte is one character.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Generator
from pathlib import Path

from flyd.errors import Refused
from volumes.files import run, stream

MAGIC = b"flydtree1\n"
# The same tree is the same stream: no process ids, no times of reading.
SEND = (
    *("tar", "--create", "--format=posix", "--numeric-owner", "--xattrs", "--acls", "--sparse"),
    "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime",
)
NAMED = ("--no-recursion", "--null", "--verbatim-files-from", "--files-from=-")
RECEIVE = ("tar", "--extract", "--numeric-owner", "--same-owner", "--same-permissions", "--xattrs", "--acls")


def send_tree(source: Path, parent: Path | None) -> Generator[bytes]:
    """The stream of a tree."""
    removed, changed = differences(source, parent)
    header = json.dumps([name.decode("latin-1") for name in removed]).encode()
    yield MAGIC + len(header).to_bytes(8, "big") + header
    with tempfile.TemporaryFile() as names:
        names.write(b"".join(name + b"\0" for name in changed))
        names.flush()
        names.seek(0)
        yield from stream((*SEND, "--directory", str(source), *NAMED), names)


def receive_tree(file: Path, target: Path) -> None:
    """Change a tree by a stream; Refused if that is none."""
    with open(file, "rb") as sent:
        if sent.read(len(MAGIC)) != MAGIC:
            raise Refused(
                "what came is no stream of a directory volume",
                hint="Volumes move between hosts with the same kind of volumes only (flyd.toml, `volumes`).",
            )
        header = sent.read(int.from_bytes(sent.read(8), "big"))
        for name in json.loads(header):
            _remove(target, name.encode("latin-1"))
        # tar reads from where the descriptor is, and Python has read ahead.
        os.lseek(sent.fileno(), len(MAGIC) + 8 + len(header), os.SEEK_SET)
        run(*RECEIVE, "--directory", str(target), stdin=sent.fileno())


def differences(source: Path, parent: Path | None) -> tuple[list[bytes], list[bytes]]:
    """What of the parent is gone, and what is new or differs; names below the tree, parents first."""
    now = _names(os.fsencode(source))
    if parent is None:
        return [], now
    before = _names(os.fsencode(parent))
    there = frozenset(before)
    old, new = os.fsencode(parent), os.fsencode(source)
    kept = frozenset(now)
    removed = [n for n in before if n not in kept or _kind(old, n) != _kind(new, n)]
    changed = [n for n in now if n not in there or _differs(os.path.join(old, n), os.path.join(new, n))]
    return removed, changed


def digest(tree: Path) -> str:
    """The sha256 (hex) of all that a tree holds: names, kinds, modes, owners, contents, links."""
    root, total = os.fsencode(tree), hashlib.sha256()
    for name in _names(root):
        path = os.path.join(root, name)
        found = os.lstat(path)
        told = (stat.S_IFMT(found.st_mode), stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid)
        total.update(name + b"\0" + repr(told).encode())
        if stat.S_ISREG(found.st_mode):
            with open(path, "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        elif stat.S_ISLNK(found.st_mode):
            total.update(os.readlink(path))
    return total.hexdigest()


def _names(root: bytes) -> list[bytes]:
    """Everything in a tree, `.` first; sockets are of a process and not of the data."""
    found = [b"."]
    for folder, folders, files in os.walk(root):
        folders.sort()
        below = os.path.relpath(folder, root)
        names = sorted([*folders, *files])
        found += [name if below == b"." else os.path.join(below, name) for name in names]
    return [n for n in found if not stat.S_ISSOCK(os.lstat(os.path.join(root, n)).st_mode)]


def _kind(root: bytes, name: bytes) -> int:
    return stat.S_IFMT(os.lstat(os.path.join(root, name)).st_mode)


def _differs(old: bytes, new: bytes) -> bool:
    before, now = os.lstat(old), os.lstat(new)
    told = [(s.st_mode, s.st_uid, s.st_gid, s.st_mtime_ns, s.st_rdev, s.st_nlink) for s in (before, now)]
    if stat.S_ISDIR(now.st_mode) and stat.S_ISDIR(before.st_mode):
        return told[0][:4] != told[1][:4]
    if told[0] != told[1]:
        return True
    if stat.S_ISREG(now.st_mode):
        return not filecmp.cmp(old, new, shallow=False)
    return stat.S_ISLNK(now.st_mode) and os.readlink(old) != os.readlink(new)


def _remove(target: Path, name: bytes) -> None:
    """One that is gone; a name that leads out of the tree is refused."""
    parts = name.split(b"/")
    if b".." in parts or b"." in parts or not all(parts):
        raise Refused(f"the stream removes {name!r}, which is not in the volume", hint="Nothing was changed.")
    path = os.path.join(os.fsencode(target), name)
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return  # its folder was removed before it
    if stat.S_ISDIR(mode):
        shutil.rmtree(path)
    else:
        os.unlink(path)
