"""Reading a machine's log as the shim writes it: `<seconds since the epoch> <text>` a line.

Two files of bounded size, `output.log` and the one before it, `output.log.1`. Following looks at
the file every FOLLOW_POLL_S, only while somebody follows and nothing is new: one stat of a cached
inode costs some microseconds, works on every file system, and needs no watch descriptor to be kept
right across rotations. A follower that falls behind by two whole files misses what was between.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

from flyd.model import LogLine

FOLLOW_POLL_S = 0.2
READ_BYTES = 256 * 1024


def parse(machine_id: str, line: bytes) -> LogLine | None:
    """One line of the file; None for what a full disk cut short."""
    stamp, _, text = line.partition(b" ")
    try:
        at_s = float(stamp)
    except ValueError:
        return None
    return LogLine(machine_id=machine_id, at_s=at_s, text=text.decode("utf-8", "replace"))


async def read_lines(machine_id: str, path: Path, tail: int, follow: bool) -> AsyncIterator[LogLine]:
    """The last `tail` lines of both files, then with `follow` each new one until the log is removed."""
    file = _open(path)
    try:
        lines, partial = _tail(file, path, tail)
        while True:
            for line in lines:
                parsed = parse(machine_id, line)
                if parsed is not None:
                    yield parsed
            if not follow:
                return
            chunk = file.read(READ_BYTES) if file else b""
            if not chunk:
                successor = _successor(file, path)
                if successor is None and not path.parent.exists():
                    return
                if successor is None:
                    await asyncio.sleep(FOLLOW_POLL_S)
                elif file is not None and (chunk := file.read(READ_BYTES)):
                    successor.close()  # written between our last read and the rotation
                else:
                    if file is not None:
                        file.close()
                    file, partial = successor, b""
            *lines, partial = (partial + chunk).split(b"\n")
    finally:
        if file is not None:
            file.close()


def _open(path: Path) -> BinaryIO | None:
    try:
        return open(path, "rb", buffering=0)
    except FileNotFoundError:
        return None


def _successor(held: BinaryIO | None, path: Path) -> BinaryIO | None:
    """The file that has taken the held one's name; None if it has not been rotated."""
    newest = _open(path)
    if newest is not None and held is not None and os.path.sameopenfile(newest.fileno(), held.fileno()):
        newest.close()
        return None
    return newest


def _tail(file: BinaryIO | None, path: Path, tail: int) -> tuple[list[bytes], bytes]:
    """The last lines, and what follows the last line's end; leaves `file` at the place it read to."""
    if file is None:
        return [], b""
    lines, partial = _last_lines(file, tail)
    if len(lines) < tail and (before := _open(path.with_name(path.name + ".1"))):
        with before:
            lines = _last_lines(before, tail - len(lines))[0] + lines
    return lines, partial


def _last_lines(file: BinaryIO, count: int) -> tuple[list[bytes], bytes]:
    position = end = file.seek(0, os.SEEK_END)
    data = b""
    while position > 0 and data.count(b"\n") <= count:
        size = min(READ_BYTES, position)
        position -= size
        file.seek(position)
        data = _read_exactly(file, size) + data
    file.seek(end)
    *lines, partial = data.split(b"\n")
    return lines[len(lines) - min(count, len(lines)) :], partial


def _read_exactly(file: BinaryIO, size: int) -> bytes:
    data = b""
    while len(data) < size and (chunk := file.read(size - len(data))):
        data += chunk
    return data
