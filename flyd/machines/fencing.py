"""Stale copies: machines on this host that etcd has given to another host, or has no claim for.

Owns the rule that they end before anything else begins here. A host that was lost may come back
with machines that run elsewhere by now (flyd/placement/repairs.py). So:

- A flyd that starts first waits for etcd (FENCE_WAIT_S at most) before it finishes, starts or
  restarts anything, and then stops stale copies before it attends to any other machine.
- What an earlier flyd had begun for a stale copy (a start, say) is undone, not finished.
- A stale copy gets STALE_STOP_S to end, whatever its own stop timeout: another copy runs already.

- A machine with a volume is started by no flyd that has not heard etcd since its own start,
  however long that takes: the volume may have been brought back on another host meanwhile
  (flyd/storage/recovery.py), and this host's knowledge of it be of before it went away.

What this does not do: a host that can not see etcd keeps its machines running, and after
FENCE_WAIT_S also starts those without volumes that it knows (design.md, promise 7: the control plane may die
without an application noticing). While it is cut off, a machine that was placed elsewhere therefore runs
twice: here, where no edge and no name leads any more, and there. It ends here as soon as the host
sees etcd. One with a volume is placed elsewhere only where somebody (a person, or the rule that its owner
made) took a copy for the volume of a host that is lost; each of the two then has a volume of its own.

Called by host.py alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

import msgspec
import structlog

from flyd.model import Machine
from flyd.store.mirror import Mirror

log = structlog.get_logger(__name__)

FENCE_WAIT_S = 10.0
STALE_STOP_S = 5.0


def why_abandoned(claim: Machine, *, stale: bool, learned: bool) -> str:
    """Why what an earlier flyd had begun for a machine is not finished; empty if it is."""
    if stale:
        return "the machine has been given to another host"
    if claim.config.mounts and not learned:
        return "etcd has not been heard since flyd's start: the machine's volume may be another host's by now"
    return ""


async def wait_fenced(mirror: Mirror, host: str) -> None:
    """Return once etcd was heard, or after FENCE_WAIT_S without it."""
    try:
        async with asyncio.timeout(FENCE_WAIT_S):
            await mirror.wait_synced()
    except TimeoutError:
        log.warning("host.unfenced", host=host, waited_s=FENCE_WAIT_S, doing="goes on as last known")


def stale_copies(host: str, here: Iterable[str], claims: Mapping[str, tuple[Machine, int]]) -> dict[str, int]:
    """Those of the machines `here` that are not this host's, with the revision of their claim (0: none)."""
    stale = sorted(m for m in here if m not in claims or claims[m][0].host != host)
    return {m: claims[m][1] if m in claims else 0 for m in stale}


def ended_soon(claim: Machine) -> Machine:
    """A stale copy's claim, with the time it gets to end."""
    stop = msgspec.structs.replace(
        claim.config.stop, timeout_s=min(claim.config.stop.timeout_s, STALE_STOP_S)
    )
    config = msgspec.structs.replace(claim.config, stop=stop)
    return msgspec.structs.replace(claim, config=config, stop=None)
