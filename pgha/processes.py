"""Running Postgres' programs as an unprivileged user, and making sure that they are dead.

Postgres refuses to run as root, so a root agent drops to `postgres` or `nobody`. Every child gets a
parent-death signal: an agent that is SIGKILLed takes its Postgres with it. Backends call setsid, so
neither process groups nor the postmaster's death say that all is over (T8): see process_table.py.

Called by pgha/postgres.py. Linux only.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from flyd.errors import InvalidInput, Unavailable
from pgha.process_table import send, server_pids

USERS = ("postgres", "nobody")
GONE_S = 5.0  # after SIGKILL
GONE_POLL_S = 0.002

# PR_SET_PDEATHSIG is 1; it is set after setuid, which clears it.
LAUNCH = """
import ctypes, os, sys
parent, uid, gid, number = map(int, sys.argv[1:5])
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
if ctypes.CDLL(None).prctl(1, number, 0, 0, 0) != 0 or os.getppid() != parent:
    sys.exit(70)
try:
    os.execv(sys.argv[5], sys.argv[5:])
except OSError as error:
    sys.exit(f"{sys.argv[5]}: {error.strerror}")
"""


def unprivileged() -> pwd.struct_passwd:
    """Who runs Postgres: ourselves, or for root the first of USERS that exists."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid())
    for name in USERS:
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise InvalidInput(
        "Postgres must not run as root and there is no user to run it as",
        hint="add a user named postgres (adduser --system postgres)",
    )


def bound_command(
    command: Sequence[str], user: pwd.struct_passwd, death_signal: signal.Signals
) -> tuple[str, ...]:
    """The command that runs `command` as `user` and gets `death_signal` when we die.

    A second interpreter does it, as root, before exec: Python code between fork and exec
    (`preexec_fn`) may deadlock in a process with gRPC's threads.
    """
    numbers = (str(os.getpid()), str(user.pw_uid), str(user.pw_gid), str(int(death_signal)))
    return (sys.executable, "-I", "-S", "-c", LAUNCH, *numbers, *command)


class Tools:
    """Postgres' programs, run to their ends as its user."""

    def __init__(self, bin_dir: str, home: Path) -> None:
        self._bin = Path(bin_dir)
        self._home = home
        self._user = unprivileged()

    def env(self) -> dict[str, str]:
        """What every program of Postgres gets."""
        return {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "HOME": str(self._home)}

    async def run(
        self,
        name: str,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        stdin: bytes = b"",
        timeout_s: float,
    ) -> None:
        """It has to succeed."""
        code, output = await self.attempt(name, *arguments, env=env, stdin=stdin, timeout_s=timeout_s)
        if code != 0:
            raise Unavailable(f"{name} in {self._home} ended with {code}: {output[-500:]}")

    async def attempt(
        self,
        name: str,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        stdin: bytes = b"",
        timeout_s: float,
    ) -> tuple[int, str]:
        """Its exit code and what it printed."""
        process = await asyncio.create_subprocess_exec(
            *bound_command((str(self._bin / name), *arguments), self._user, signal.SIGKILL),
            cwd=self._home,
            env=self.env() | dict(env or {}),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(timeout_s):
                output, _ = await process.communicate(stdin)
        except TimeoutError:
            raise Unavailable(f"{name} took longer than {timeout_s} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return process.returncode or 0, output.decode(errors="replace").strip()


async def kill_all(data_dir: Path) -> None:
    """SIGKILL every process of the server, until there is none."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + GONE_S
    while pids := server_pids(data_dir):
        for pid in pids:
            send(pid, signal.SIGKILL)
        if loop.time() > deadline_s:
            raise Unavailable(f"processes {pids} of {data_dir} do not die")
        await asyncio.sleep(GONE_POLL_S)


def require_reachable(path: Path, user: pwd.struct_passwd) -> None:
    """Refuse a directory that `user` cannot get to, before Postgres fails in its own words."""
    for folder in (path, *path.parents):
        mode = folder.stat()
        bit = 0o100 if mode.st_uid == user.pw_uid else 0o010 if mode.st_gid == user.pw_gid else 0o001
        if not mode.st_mode & bit:
            raise InvalidInput(
                f"Postgres runs as {user.pw_name}, who cannot enter {folder}",
                hint=f"chmod o+x {folder}, or keep the data elsewhere",
            )


def give_tree(path: Path, user: pwd.struct_passwd) -> None:
    """Make the directory and all in it the user's, if we are root."""
    if os.geteuid() != 0:
        return
    shutil.chown(path, user.pw_uid, user.pw_gid)
    for root, folders, files in os.walk(path):
        for name in folders + files:
            os.chown(os.path.join(root, name), user.pw_uid, user.pw_gid, follow_symlinks=False)
