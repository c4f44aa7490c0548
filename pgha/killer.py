"""The killer: a process of its own that ends Postgres when the lease's deadline passes (I8).

It needs neither the agent, nor the network, nor Postgres' cooperation. The agent writes the
deadline (CLOCK_MONOTONIC, seconds; 0: none) to its standard input after each renewal. When the
deadline passes, or the agent is gone (end of input), every process of the data directory gets
SIGKILL. It then waits for the next deadline, or ends with the agent.

`KillerProcess` is the agent's side (ports.Killer). `main` is the process: standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PACKAGE_PARENT = Path(__file__).resolve().parent.parent
LOCK_ALL = 3  # MCL_CURRENT | MCL_FUTURE: never wait for a disk
PRIORITY = -10
CODE = "import sys; sys.path.insert(0, sys.argv[1]); from pgha.killer import main; main(sys.argv[2])"


class KillerProcess:
    """Keeps a killer running and tells it the deadline."""

    def __init__(self, data_dir: str) -> None:
        self._data_dir = data_dir
        self._process: subprocess.Popen[bytes] | None = None

    def arm(self, deadline_s: float) -> None:
        """Postgres is to be dead at `deadline_s`, unless a later deadline comes; 0: unless one comes."""
        if self._process is None or self._process.poll() is not None:
            if deadline_s == 0:
                return
            self._process = self._start()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, BlockingIOError):  # it died: the next `arm` starts another
            self._process.stdin.write(f"{deadline_s!r}\n".encode())

    def close(self) -> None:
        """End of input: it kills what is left and ends."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        command = (sys.executable, "-I", "-S", "-c", CODE, str(PACKAGE_PARENT), self._data_dir)
        process = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0, cwd="/", start_new_session=True)
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        return process


def main(data_dir: str) -> None:
    """The process: wait for deadlines, kill when one passes."""
    from pgha.process_table import send, server_pids

    ctypes.CDLL(None).mlockall(LOCK_ALL)  # as far as our rights go, like the next line
    with contextlib.suppress(OSError):
        os.nice(PRIORITY)
    os.set_blocking(0, False)
    deadline_s, armed, agent = 0.0, False, True
    while agent or armed:
        left_s = max(0.0, deadline_s - time.monotonic()) if armed else None
        readable = select.select([0], [], [], left_s)[0] if agent else []
        if readable:
            lines = os.read(0, 65536)
            agent = bool(lines)
            if lines:
                deadline_s = float(lines.split()[-1])
                armed = deadline_s > 0
        if (armed and time.monotonic() >= deadline_s) or not agent:
            while pids := server_pids(Path(data_dir)):
                for pid in pids:
                    send(pid, signal.SIGKILL)
                time.sleep(0.001)
            armed = False
