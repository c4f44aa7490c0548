"""The processes of a local cluster: started so that they outlive the command, found by a mark.

Everything that belongs to a host carries FLYD_HOST=<cluster>/<host> in its environment,
machines included (the process driver passes it on). A host is lost by killing all
processes with its mark and all their descendants, as a power cut would.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from flyd.errors import Refused

MARK = "FLYD_HOST"
# The kernel shows no environment of a process that is in the middle of exec: one look may miss it.
EMPTY_LOOKS = 2
LOOK_PAUSE_S = 0.02


def start_detached(command: Sequence[str], env: Mapping[str, str], log_path: Path, mark: str) -> int:
    """Start a process in a session of its own, its output appended to a file; its pid."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            command,
            env={**env, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
        )
    return process.pid


def find_marked(mark: str) -> dict[int, str]:
    """Living processes whose mark is `mark` or lies below it, and their descendants: pid -> command."""
    parents: dict[int, int] = {}
    commands: dict[int, str] = {}
    marked: set[int] = set()
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
            state, parent = stat.rpartition(")")[2].split()[:2]
            environ = (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except (OSError, ValueError):
            continue  # it ended meanwhile, or is not ours to read
        if state == "Z":
            continue
        pid = int(entry.name)
        parents[pid], commands[pid] = int(parent), command
        if any(item == wanted or item.startswith(wanted + b"/") for item in environ):
            marked.add(pid)
    grown = True
    while grown:
        children = {pid for pid, parent in parents.items() if parent in marked} - marked
        marked |= children
        grown = bool(children)
    marked.discard(os.getpid())
    return {pid: commands[pid] for pid in sorted(marked)}


def kill_marked(mark: str) -> int:
    """SIGKILL everything with the mark until nothing is left; how many there were.

    All are stopped first: nothing may answer a client while the rest is being killed.
    """
    killed: set[int] = set()
    empty = 0
    while empty < EMPTY_LOOKS:
        found = find_marked(mark)
        empty = 0 if found else empty + 1
        if not found:
            time.sleep(LOOK_PAUSE_S)
        for stop in (signal.SIGSTOP, signal.SIGKILL):
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, stop)
        killed |= set(found)
    return len(killed)


def signal_marked(mark: str, number: signal.Signals) -> int:
    """Send a signal to everything with the mark; how many processes there were."""
    found = find_marked(mark)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return len(found)


def check_free(address: str, port: int, what: str) -> None:
    """Refuse if somebody listens there already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise Refused(
                f"{what} needs {address}:{port}, which is taken ({error.strerror})",
                hint=f"`ss -ltnp 'sport = :{port}'` shows by whom; `--base N` chooses other addresses.",
            ) from None
