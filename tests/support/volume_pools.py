"""A real btrfs pool in a file, for tests: mounted for a while, its loop device gone with it."""

from __future__ import annotations

import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from volumes.pool import close_pool, open_pool, why_none


@contextmanager
def btrfs_pool(folder: Path, size_gb: int) -> Generator[Path]:
    """The pool's mount point below `folder`; skips the test where there can be none, and says why."""
    if reason := why_none():
        pytest.skip(f"no btrfs pool: {reason}")
    at = folder / "mounted"
    open_pool(at, folder / "pool.btrfs", size_gb)
    try:
        # No flush of the disk below: a process is killed here, the power is not cut.
        subprocess.run(["mount", "-o", "remount,nobarrier", at], check=True)
        yield at
    finally:
        close_pool(at)
        (folder / "pool.btrfs").unlink()
