"""The supervisor of one machine of the process driver: a process of its own, not a module of flyd.

Run as `python -I -S shim.py <machine directory>` with one JSON request on stdin; imports only the
standard library, and little of it (15 ms to start, about 10 MB, for as long as the machine lives).

What it owns: `run/pid.json`, `run/exit.json` (written whole and fsynced, or not at all),
`log/output.log` and, for its whole life, the lock on `run/lock`.

What always holds:
- One machine directory has at most one shim: the second finds the lock taken and leaves.
- The machine's main process never outlives its shim (PR_SET_PDEATHSIG), so a killed shim is a
  killed machine.
- When exit.json is there, nothing of the machine runs any more: the shim is the subreaper of all
  that the machine started, sessions of their own included, and kills it before it writes.
- flyd's death does not touch it: own session, no pipe to flyd, SIGTERM, SIGINT and SIGHUP ignored.

It does not restart anything and decides nothing: it says what happened and leaves.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import sys
import time
from typing import Any, NoReturn

STARTED = 0  # exit codes of the process that the driver spawns
BROKEN = 1
ALREADY_RUNS = 75

NOT_FOUND = 127  # exit codes of a machine whose command could not be run, as shells say it
NOT_RUNNABLE = 126

LINE_MAX_BYTES = 16 * 1024  # output without a line's end is cut after about this much
CHUNK_BYTES = 64 * 1024

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ)


def prctl(option: int, value: int) -> None:
    """prctl(2); the standard library has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def now_s() -> float:
    """The wall clock; this process has no Clock port to ask."""
    return time.time()  # noqa: TID251


def start_ticks(pid: int) -> int:
    """When a process started, in ticks since boot: with the pid and the boot, its identity."""
    with open(f"/proc/{pid}/stat", "rb") as stat:
        return int(stat.read().rpartition(b")")[2].split()[19])


def write_durably(path: str, value: dict[str, Any]) -> None:
    """The file as a whole, on disk, or as it was before."""
    with open(path + ".tmp", "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)
    directory = os.open(os.path.dirname(path), os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


class Log:
    """The machine's output, each line after the time it was seen; two files of bounded size.

    A full disk never blocks the machine: lines are dropped, counted, and the count is logged
    when writing works again.
    """

    def __init__(self, path: str, max_bytes: int) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.partial = b""
        self.lost = 0
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, chunk: bytes) -> None:
        """Take a piece of output; whole lines are written, the rest waits for its end."""
        lines = (self.partial + chunk).split(b"\n")
        self.partial = lines.pop()
        if len(self.partial) > LINE_MAX_BYTES:
            lines.append(self.partial)
            self.partial = b""
        if lines:
            self._append(lines)

    def close(self) -> None:
        """Write what has no line's end."""
        if self.partial:
            self._append([self.partial])
        os.close(self.fd)

    def _append(self, lines: list[bytes]) -> None:
        stamp = b"%.6f " % now_s()
        data = b"".join([stamp + line + b"\n" for line in lines])
        if self.lost:
            data = b"\n%sflyd: %d lines of output were lost: no space\n%s" % (stamp, self.lost, data)
        try:
            if os.fstat(self.fd).st_size + len(data) > self.max_bytes:
                self._rotate()
            while data:
                data = data[os.write(self.fd, data) :]
            self.lost = 0
        except OSError:
            self.lost += len(lines)

    def _rotate(self) -> None:
        os.replace(self.path, self.path + ".1")
        os.close(self.fd)
        self.fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def become_machine(request: dict[str, Any], shim: int, go: int, failed: int, output: int) -> NoReturn:
    """In the child: shed what is the shim's, wait until pid.json is written, then be the command."""
    try:
        os.setsid()
        os.read(go, 1)
        os.umask(0o022)
        if request["identity"] is not None:
            uid, gid, groups = request["identity"]
            os.setgroups(groups)
            os.setgid(gid)
            os.setuid(uid)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after setuid, which clears it
        if os.getppid() != shim:
            os._exit(BROKEN)
        for number in (*IGNORED, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir("work")
        command = request["command"]
        os.execvpe(command[0], command, request["env"])
    except OSError as error:
        os.write(failed, b"%d" % (error.errno or 0))
    os._exit(NOT_RUNNABLE)


def on_child(number: int, frame: object) -> None:
    """Nothing: a handler must be there for the wake-up pipe to be written."""


def ended(main: int) -> os.waitid_result | None:
    """How the main process ended, left unreaped so that its pid stays taken; orphans are reaped."""
    while True:
        result = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if result is None or result.si_pid == main:
            return result
        os.waitpid(result.si_pid, 0)


def children(parent: int) -> list[int]:
    """The direct children of a process; /proc/*/children is not in every kernel."""
    found: list[int] = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as stat:
                    if int(stat.read().rpartition(b")")[2].split()[1]) == parent:
                        found.append(int(name))
            except OSError:
                continue  # it has just ended
    return found


def kill_rest(main: int) -> None:
    """Kill all that the machine started; a killed process' children become ours, so go round."""
    os.killpg(main, signal.SIGKILL)
    while rest := [child for child in children(os.getpid()) if child != main]:
        for child in rest:
            os.kill(child, signal.SIGKILL)
        for child in rest:
            os.waitpid(child, 0)


def supervise(main: int, output: int, wakeup: int, log: Log) -> os.waitid_result:
    """Carry output to the log until the main process ends; then kill the rest and read what is left."""
    poll = select.poll()
    poll.register(output, select.POLLIN)
    poll.register(wakeup, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd == wakeup:
                os.read(wakeup, CHUNK_BYTES)
            elif chunk := os.read(output, CHUNK_BYTES):
                log.write(chunk)
            else:
                poll.unregister(output)
        if result := ended(main):
            break
    kill_rest(main)
    os.set_blocking(output, False)
    try:
        while chunk := os.read(output, CHUNK_BYTES):
            log.write(chunk)
    except BlockingIOError:
        pass  # somebody outside of the machine still holds the pipe; its words are not ours
    return result


def run(request: dict[str, Any], ready: int) -> None:
    """Start the machine, say so on `ready`, and stay until it ends."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    wakeup, wakeup_in = os.pipe()
    os.set_blocking(wakeup_in, False)
    signal.signal(signal.SIGCHLD, on_child)
    signal.set_wakeup_fd(wakeup_in, warn_on_full_buffer=False)
    log = Log("log/output.log", request["log_max_bytes"])
    output, output_in = os.pipe()
    failed, failed_in = os.pipe()
    go, go_in = os.pipe()
    shim = os.getpid()
    main = os.fork()
    if main == 0:
        become_machine(request, shim, go, failed_in, output_in)
    identity = {"shim": shim, "shim_start": start_ticks(shim), "boot_id": request["boot_id"]}
    record = {
        **identity,
        "pid": main,
        "pid_start": start_ticks(main),
        "instance_id": request["instance_id"],
        "output": os.readlink(f"/proc/self/fd/{output}"),
        "started_at_s": now_s(),
    }
    write_durably("run/pid.json", record)
    os.write(go_in, b"g")
    for fd in (go, go_in, failed_in, output_in):
        os.close(fd)
    problem = os.read(failed, 16)  # empty as soon as the command runs
    os.write(ready, b"r")
    os.close(ready)
    result = supervise(main, output, wakeup, log)
    status: dict[str, Any] = {"at_s": now_s()}
    if problem:
        number = int(problem)
        log.write(f"flyd: cannot run {request['command'][0]!r}: {os.strerror(number)}\n".encode())
        status["code"] = NOT_FOUND if number in (errno.ENOENT, errno.ENOTDIR) else NOT_RUNNABLE
    elif result.si_code == os.CLD_EXITED:
        status["code"] = result.si_status
    else:
        status["signal"] = result.si_status
    log.close()
    write_durably("run/exit.json", {**identity, "status": status})
    os.waitpid(main, 0)  # only now: while the driver may still signal the group, its id stays taken


def main() -> None:
    """Detach from the driver, answering it only when the machine runs (or could not)."""
    os.chdir(sys.argv[1])
    request = json.load(sys.stdin)
    lock = os.open("run/lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os._exit(ALREADY_RUNS)
    ready, ready_in = os.pipe()
    if os.fork():
        os.close(ready_in)
        os._exit(STARTED if os.read(ready, 1) else BROKEN)
    os.close(ready)
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    errors = os.open("log/shim.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for fd, target in ((null, 0), (null, 1), (errors, 2)):
        os.dup2(fd, target)
    run(request, ready_in)


if __name__ == "__main__":
    main()
