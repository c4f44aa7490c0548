"""What a machine's processes are and what they listen on, as the host's kernel shows it in /proc.

Used by both drivers for `processes`. A process that ends while it is being looked at is left out.
Reads only; blocks for some milliseconds, so the drivers call it from a thread.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable
from pathlib import Path

from flyd.model.machine import ListenSocket, Process

_PROC = Path("/proc")
_TABLES = ("tcp", "tcp6", "udp", "udp6")
_RECEIVES = {"tcp": "0A", "tcp6": "0A", "udp": "07", "udp6": "07"}  # LISTEN; a UDP socket without a peer
_COMMAND_MAX = 200
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_KB = os.sysconf("SC_PAGE_SIZE") // 1024
_STAT_PPID, _STAT_UTIME, _STAT_STIME = 1, 11, 12  # of the fields after the name

Sockets = dict[str, ListenSocket]  # by inode


def descendants(root: int) -> list[int]:
    """The processes that `root` and its children started, without `root` itself."""
    children: dict[int, list[int]] = {}
    for pid in _pids():
        if (fields := _stat(pid)) is not None:
            children.setdefault(int(fields[_STAT_PPID]), []).append(pid)
    found: list[int] = []
    waiting = [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return sorted(found)


def container_members(main: int) -> list[int]:
    """The processes in the pid namespace of `main`; its descendants where that is flyd's own."""
    namespace = _link(main, "ns/pid")
    if not namespace or namespace == _link(os.getpid(), "ns/pid"):
        return [main, *descendants(main)]
    return [pid for pid in _pids() if _link(pid, "ns/pid") == namespace]


def look_at(pids: Iterable[int]) -> tuple[Process, ...]:
    """These processes, as far as they still live, by pid."""
    tables: dict[str, Sockets] = {}  # by network namespace
    found: list[Process] = []
    for pid in sorted(pids):
        fields = _stat(pid)
        if fields is None or fields[0] in (b"Z", b"X"):
            continue
        network = _link(pid, "ns/net")
        if network not in tables:
            tables[network] = _sockets(pid)
        ticks = int(fields[_STAT_UTIME]) + int(fields[_STAT_STIME])
        found.append(
            Process(
                pid=pid,
                command=_command(pid),
                memory_kb=_memory_kb(pid),
                cpu_s=round(ticks / _TICKS_PER_S, 2),
                listens=_listens(pid, tables[network]),
            )
        )
    return tuple(found)


def socket_of(protocol: str, line: str) -> tuple[str, ListenSocket] | None:
    """The inode and socket of one line of /proc/<pid>/net/<protocol>; None unless it receives."""
    fields = line.split()
    if len(fields) < 10 or fields[3] != _RECEIVES[protocol]:
        return None
    address, _, port = fields[1].partition(":")
    return fields[9], ListenSocket(protocol=protocol, address=address_of(address), port=int(port, 16))


def address_of(text: str) -> str:
    """An address as the kernel writes it: hex, each 32-bit word with its lowest byte first."""
    words = [bytes.fromhex(text[start : start + 8])[::-1] for start in range(0, len(text), 8)]
    return str(ipaddress.ip_address(b"".join(words)))


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir(_PROC) if entry.isdigit()]


def _stat(pid: int) -> list[bytes] | None:
    try:
        return (_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _link(pid: int, name: str) -> str:
    try:
        return os.readlink(_PROC / str(pid) / name)
    except OSError:
        return ""


def _command(pid: int) -> str:
    try:
        words = (_PROC / str(pid) / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    except OSError:
        return ""
    return b" ".join(words).decode("utf-8", "replace")[:_COMMAND_MAX]


def _memory_kb(pid: int) -> int:
    try:
        return int((_PROC / str(pid) / "statm").read_bytes().split()[1]) * _PAGE_KB
    except (OSError, IndexError):
        return 0


def _sockets(pid: int) -> Sockets:
    found: Sockets = {}
    for protocol in _TABLES:
        try:
            lines = (_PROC / str(pid) / "net" / protocol).read_text().splitlines()[1:]
        except OSError:
            continue  # no IPv6 here, or the process is gone
        found.update(pair for line in lines if (pair := socket_of(protocol, line)) is not None)
    return found


def _listens(pid: int, sockets: Sockets) -> tuple[ListenSocket, ...]:
    found: dict[ListenSocket, None] = {}
    try:
        descriptors = os.listdir(_PROC / str(pid) / "fd")
    except OSError:
        return ()
    for descriptor in descriptors:
        target = _link(pid, f"fd/{descriptor}")
        if target.startswith("socket:[") and (socket := sockets.get(target[8:-1])) is not None:
            found[socket] = None
    return tuple(sorted(found, key=lambda s: (s.port, s.protocol, s.address)))
