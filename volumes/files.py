"""Durable files and real folders: what store.py keeps its records with. Called in threads."""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import IO, TypeVar

import msgspec

from flyd.errors import NotFound, Refused, Unavailable

T = TypeVar("T")

PIECE_BYTES = 256 << 10  # of a stream: well below what a gRPC message may have
LINK_HINT = "Nothing was touched. Find out who changed the pool (ls -l), then put the real folder back."


def sync(directory: Path) -> None:
    """Have the names in a directory on disk."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_record(path: Path, record: msgspec.Struct) -> None:
    """Replace one record, all or nothing; on disk when this returns. Follows no link."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(fd, "wb") as file:
        file.write(msgspec.json.encode(record))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def read_record(path: Path, kind: type[T], what: str) -> T:
    """A record, NotFound, or Refused if it is no record of ours."""
    check_folder(path.parent, what)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise NotFound(
            f"no {what} on this host", hint="`fly volumes list` shows where each volume is"
        ) from None
    except OSError as error:
        raise Refused(f"{path} is a link or can not be opened: {error.strerror}", hint=LINK_HINT) from None
    with open(fd, "rb") as file:
        data = file.read()
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise Refused(
            f"{path} is not readable: {error}", hint="The data beside it is untouched; restore the record."
        ) from None


def check_folder(path: Path, what: str) -> None:
    """NotFound if there is nothing, Refused if it is anything but a folder (a planted link)."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        raise NotFound(
            f"no {what} on this host", hint="`fly volumes list` shows where each volume is"
        ) from None
    if not stat.S_ISDIR(mode):
        raise Refused(f"{path} is not a folder that flyd made", hint=LINK_HINT)


def run(*command: str, stdin: int | None = None) -> str:
    """What a tool printed; Unavailable with what it complained of. `stdin`: a file's descriptor."""
    try:
        done = subprocess.run(command, stdin=stdin, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise _missing(command[0]) from None
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise Unavailable(
            f"{' '.join(command)}: {said[-1] if said else f'ended with {done.returncode}'}",
            hint="Is the disk of the volumes full (df -h)? Nothing half-made is used; try again.",
        )
    return done.stdout


def _missing(tool: str) -> Unavailable:
    return Unavailable(f"this host has no {tool}", hint="Install it and start flyd again.")


def stream(command: Sequence[str], stdin: IO[bytes] | None = None) -> Generator[bytes]:
    """What a tool prints, as it comes; Unavailable if it fails in the end. Closing it ends the tool."""
    with tempfile.TemporaryFile() as said:
        try:
            tool = subprocess.Popen(
                command, stdin=stdin or subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said
            )
        except FileNotFoundError:
            raise Unavailable(
                f"this host has no {command[0]}", hint="Install it and start flyd again."
            ) from None
        try:
            assert tool.stdout is not None
            while piece := tool.stdout.read(PIECE_BYTES):
                yield piece
            if tool.wait() != 0:
                said.seek(0)
                lines = said.read().decode(errors="replace").strip().splitlines()
                raise Unavailable(
                    f"{command[0]} ended with {tool.returncode} while it sent: {lines[0] if lines else '?'}",
                    hint="Nothing was changed; the next attempt goes on from what has arrived.",
                )
        finally:
            if tool.poll() is None:
                tool.kill()
            assert tool.stdout is not None
            tool.stdout.close()
            tool.wait()
