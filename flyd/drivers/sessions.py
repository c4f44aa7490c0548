"""The processes of one session (setsid), as the kernel lists them: found, hung up on, killed.

A command that is run in a machine begins a session; a shell's jobs have process groups of their own
but stay in it. What calls setsid itself leaves it on purpose, and ends with the machine. Called by
both drivers when a session's command has ended, or its client is gone. Kills nothing but its members.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

HANGUP_S = 2.0  # from SIGHUP to SIGKILL: time for a shell to save its history
HANGUP_POLL_S = 0.05

_PROC = Path("/proc")
_END = b"\x04"  # Ctrl-D: on an empty line the end, elsewhere it hands the line over


def typed_end(last_typed: bytes) -> bytes:
    """What tells a terminal's reader that no more input comes, after what was typed last."""
    return _END if last_typed[-1:] in (b"", b"\n", b"\r") else _END * 2


def members(leader: int, is_ours: Callable[[int], bool]) -> list[int]:
    """The living processes of the session that `leader` began (it may have ended), by pid."""
    found: list[int] = []
    for entry in _PROC.iterdir():
        if entry.name.isdecimal() and _session(entry) == leader and is_ours(int(entry.name)):
            found.append(int(entry.name))
    return sorted(found)


async def end_session(leader: int, is_ours: Callable[[int], bool] = lambda pid: True) -> None:
    """End what is left of a session: hung up on as by a lost terminal, then killed.

    `is_ours` is asked of each process before it gets a signal. Cancelled, this kills at once.
    """
    try:
        hung_up = _signal_all(members(leader, is_ours), signal.SIGHUP, signal.SIGCONT)
        with suppress(TimeoutError):
            async with asyncio.timeout(HANGUP_S):
                while hung_up and await asyncio.to_thread(members, leader, is_ours):
                    await asyncio.sleep(HANGUP_POLL_S)
    finally:
        told: list[int] = []
        while fresh := [pid for pid in members(leader, is_ours) if pid not in told]:
            told += _signal_all(fresh, signal.SIGKILL)  # again: one may have forked meanwhile


def _signal_all(pids: list[int], *signals: signal.Signals) -> list[int]:
    for pid in pids:
        for number in signals:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
    return pids


def _session(entry: Path) -> int:
    """The session of a living process, 0 for none."""
    try:
        fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] in (b"Z", b"X") else int(fields[3])
