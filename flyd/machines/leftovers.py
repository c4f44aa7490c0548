"""What is reserved on a host for machines that it has never had, or has no more: given back by the host.

A machine's place is freed by the host that has destroyed it (free.py). But a host that was lost before
it had even seen a claim has nothing to destroy when it comes back, and the claim is another host's by
then. Only the host itself knows that no copy is on it, so it looks now and then.

Called by host.py. Commits by comparing the reservations: a placement here at that moment wins.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from flyd.model import Machine, Reservations, encode
from flyd.ports import KV, Put, Unchanged
from flyd.store import keys
from flyd.store.mirror import Mirror


def leftovers(
    promised: Reservations, claims: Mapping[str, Machine], here: Collection[str]
) -> tuple[str, ...]:
    """Machines with a place on this host, though neither a claim nor anything `here` is theirs."""
    held = sorted({*promised.machines, *promised.addresses})
    return tuple(m for m in held if m not in here and (m not in claims or claims[m].host != promised.host))


async def free_leftovers(kv: KV, mirror: Mirror, host: str, here: Collection[str]) -> tuple[str, ...]:
    """Free the places of leftovers; which. The mirror must hold RESERVATIONS and MACHINES."""
    found = mirror.get(keys.reservations(host), Reservations)
    if found is None:
        return ()
    # Of one revision with the reservations: a machine placed later changes them, and the compare fails.
    claims = {item.value.id: item.value for item in mirror.list(keys.MACHINES, Machine)}
    gone = leftovers(found.value, claims, here)
    if not gone:
        return ()
    kept = msgspec.structs.replace(
        found.value,
        machines={m: size for m, size in found.value.machines.items() if m not in gone},
        addresses={m: number for m, number in found.value.addresses.items() if m not in gone},
    )
    result = await kv.txn((Unchanged(found.key, found.mod_revision),), (Put(found.key, encode(kept)),))
    return gone if result.succeeded else ()
