"""What the kernel says of processes: who is who, and what a machine left behind.

A pid alone names nothing for long; a process is (boot, pid, start time). Used by the process
driver. Reads /proc; kills only what carries the machine's own mark.
"""

from __future__ import annotations

import os
import select
import signal
import time
from pathlib import Path

from flyd.errors import Unavailable

MARK = "FLYD_MACHINE_DIR"  # in the environment of everything a machine or an exec in it starts
KILL_DEADLINE_S = 5.0
REAP_DEADLINE_S = 5.0
REAP_POLL_S = 0.02

_PROC = Path("/proc")


def boot_id() -> str:
    """Which boot of the host this is: pids of another boot mean nothing."""
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def start_ticks(pid: int) -> int | None:
    """When a living process started, in ticks since boot; None if it is gone or a zombie."""
    state, started = _stat(pid)
    return None if state in (b"Z", b"X") else started


def _stat(pid: int) -> tuple[bytes, int | None]:
    try:
        fields = (_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return b"", None
    return fields[0], int(fields[19])


def wait_reaped(pid: int, started: int) -> bool:
    """Wait until a dead process' pid is free again, at most REAP_DEADLINE_S.

    A machine's shim reaps it; that of a killed shim waits for init, and some inits look only now and
    then. Until then Postgres, for one, takes the pid in its lock file for a living postmaster.
    """
    deadline_s = time.monotonic() + REAP_DEADLINE_S
    while _stat(pid) == (b"Z", started):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(REAP_POLL_S)
    return True


def open_process(pid: int, started: int) -> int | None:
    """A pidfd of exactly that process; None if it is gone (or its pid is another's now)."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    if start_ticks(pid) == started:
        return pidfd
    os.close(pidfd)
    return None


def kill_leftovers(directory: Path, output: str) -> list[int]:
    """SIGKILL all that runs on behalf of a machine directory and wait until it is gone.

    Found by the mark in the environment, or by stdout or stderr being the machine's log pipe
    (`output`, "pipe:[n]"): Postgres, for one, overwrites its environment with its title. Goes
    round until nothing is found, for a process may fork while it is being killed.
    """
    killed: list[int] = []
    deadline_s = time.monotonic() + KILL_DEADLINE_S
    while found := _leftovers(directory, output):
        for pid, pidfd in found:
            if _kill_and_wait(pidfd, deadline_s):
                killed.append(pid)
                continue
            raise Unavailable(
                f"process {pid} of {directory.name} is still there {KILL_DEADLINE_S:g} s after SIGKILL",
                hint=f"it waits for a device or a file system: see `cat /proc/{pid}/stack`",
            )
    return killed


def _kill_and_wait(pidfd: int, deadline_s: float) -> bool:
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000))
    except ProcessLookupError:
        return True
    finally:
        os.close(pidfd)


def _leftovers(directory: Path, output: str) -> list[tuple[int, int]]:
    mark = f"{MARK}={directory}".encode()
    found: list[tuple[int, int]] = []
    for entry in _PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            pidfd = os.pidfd_open(int(entry.name))  # before looking: what we saw is what we kill
        except OSError:
            continue
        if _belongs(entry, mark, output):
            found.append((int(entry.name), pidfd))
        else:
            os.close(pidfd)
    return found


def _belongs(entry: Path, mark: bytes, output: str) -> bool:
    try:
        if start_ticks(int(entry.name)) is None:
            return False
        if mark in (entry / "environ").read_bytes().split(b"\0"):
            return True
        return bool(output) and any(_link(entry / "fd" / fd) == output for fd in ("1", "2"))
    except OSError:
        return False  # gone meanwhile, or another user's (then it is not ours)


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
