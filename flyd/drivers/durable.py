"""Writing files so that a power cut leaves the old or the new, never half.

Used by the host's own adapters (process driver, sources). Blocking: call it from a thread
(`asyncio.to_thread`) wherever a slow disk must not stall the loop.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Set a file's content: temporary name, fsync, rename, fsync of the directory."""
    temporary = path.with_name(path.name + ".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with os.fdopen(fd, "wb", closefd=False) as file:
            file.write(data)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(temporary, path)
    sync_directory(path.parent)


def remove_file(path: Path) -> None:
    """Remove a file durably; absent is no error."""
    if path.exists():
        path.unlink()
        sync_directory(path.parent)


def sync_filesystem(path: Path) -> None:
    """Make a whole tree durable at once: one flush instead of one for each of its files."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syncfs(fd) != 0:
            raise OSError(ctypes.get_errno(), "syncfs", str(path))
    finally:
        os.close(fd)
