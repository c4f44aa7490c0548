"""Which processes belong to a Postgres server: those whose working directory is its data directory.

Postgres enters it at start, and its backends inherit it, so this also finds those whose postmaster
is dead (T8). Standard library only: pgha/killer.py must start fast and need nothing. Linux only.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path


def server_pids(data_dir: Path) -> list[int]:
    """Every process whose working directory is `data_dir`: postmaster, backends, leftovers."""
    target = os.path.realpath(data_dir)
    found: list[int] = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            if os.readlink(f"/proc/{entry}/cwd").removesuffix(" (deleted)") == target and _alive(entry):
                found.append(int(entry))
        except OSError:
            continue  # it ended meanwhile, or is not ours to look at
    return found


def walreceivers(data_dir: Path) -> list[int]:
    """The processes of this server that stream from a primary."""
    found: list[int] = []
    for pid in server_pids(data_dir):
        try:
            if b"walreceiver" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def send(pid: int, number: signal.Signals) -> None:
    """Signal a process; one that is gone is no error."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _alive(pid: str) -> bool:
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state not in ("Z", "X")
