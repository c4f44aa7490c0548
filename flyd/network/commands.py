"""The system's network programs (ip, wg, nft, iptables): run with a deadline, or listened to.

Called by the adapters wireguard.py and nftables.py. Decides nothing.
"""

from __future__ import annotations

import asyncio
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator

from flyd.errors import Refused, Unavailable

COMMAND_TIMEOUT_S = 10.0


async def run(*command: str, stdin: str = "") -> str:
    """What the command prints. `Unavailable` with its own words if it fails or hangs."""
    process = await _start(*command)
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT_S):
            out, err = await process.communicate(stdin.encode())
    except TimeoutError:
        raise Unavailable(f"`{' '.join(command)}` did not end within {COMMAND_TIMEOUT_S:g} s") from None
    finally:
        await _end(process)
    if process.returncode:
        words = " ".join(err.decode(errors="replace").split())
        raise Unavailable(f"`{' '.join(command)}` failed ({process.returncode}): {words}")
    return out.decode()


async def lines(*command: str) -> AsyncIterator[str]:
    """Each line that the command prints, as it comes; `Unavailable` when it ends."""
    process = await _start(*command)
    assert process.stdout is not None
    try:
        while line := await process.stdout.readline():
            yield line.decode(errors="replace")
    finally:
        await _end(process)
    raise Unavailable(f"`{' '.join(command)}` ended ({process.returncode})")


async def _start(*command: str) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, stderr=PIPE, start_new_session=True
        )
    except FileNotFoundError:
        raise Refused(
            f"this host has no `{command[0]}`",
            hint="On Debian: apt-get install iproute2 nftables wireguard-tools wireguard-go",
        ) from None


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
        await process.wait()
