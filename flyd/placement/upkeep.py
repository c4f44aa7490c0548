"""What operators ask of hosts: cordon, uncordon, drain, remove, the grace period. Each one transaction.

A command only writes what is wanted; the elected repairer (repairs.py) does it. Each compares the
host's record, so a placement that chose the host at that moment fails and chooses again. Repeating a
command whose answer got lost changes nothing. Called by the API and by the simulator's operator.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from flyd.errors import Conflict, InvalidInput, NotFound, OutcomeUnknown, Refused
from flyd.hosts.membership import LEASE_TTL_S
from flyd.machines.free import free
from flyd.model import Desired, Host, Machine, Reservations, Volume, decode, encode
from flyd.model.cluster import Drain, DrainLine, DrainState, LossRule
from flyd.ports import KV, Clock, Delete, Entropy, KeyValue, Put, Unchanged
from flyd.storage.records import DESTROYED
from flyd.store import keys

ATTEMPTS = 16
RETRY_S = 0.05
GRACE_MIN_S = 2.0 * LEASE_TTL_S
GRACE_MAX_S = 7 * 24 * 3600.0
DRAIN_ID_BYTES = 5
SHOWN_LEFT = 20


async def cordon(kv: KV, name: str) -> Host:
    """Place nothing on the host from now on; what is there stays."""
    return (await _change(kv, name, True, lambda drain: drain))[0]


async def uncordon(kv: KV, name: str) -> Host:
    """Let the host take machines again; a drain ends, and what it had begun is taken back."""

    def ended(drain: Drain | None) -> Drain | None:
        if drain is None or drain.state is DrainState.DRAINED:
            return None
        return msgspec.structs.replace(drain, state=DrainState.CANCELLED)

    return (await _change(kv, name, False, ended))[0]


async def drain(kv: KV, name: str, *, force: bool, clock: Clock, entropy: Entropy) -> Drain:
    """Cordon the host and begin to move everything off it; the drain that is under way, if there is one."""
    now_s = clock.wall_s()
    fresh = Drain(
        id=entropy.token(DRAIN_ID_BYTES),
        host=name,
        begun_at_s=now_s,
        force=force,
        lines=(DrainLine(at_s=now_s, text=f"{name} is cordoned; moving everything off it"),),
    )

    def begun(drain: Drain | None) -> Drain | None:
        if drain is None:
            return fresh
        if drain.state is DrainState.CANCELLED:
            raise Conflict(
                f"an earlier drain of host {name} was cancelled and is still being taken back",
                hint="Try again in a moment.",
            )
        return msgspec.structs.replace(drain, force=drain.force or force, state=DrainState.DRAINING)

    found = (await _change(kv, name, True, begun))[1]
    assert found is not None
    return found


async def set_grace(kv: KV, grace_s: float) -> LossRule:
    """Set how long a host may be silent before its machines are placed elsewhere."""
    if not GRACE_MIN_S <= grace_s <= GRACE_MAX_S:
        raise InvalidInput(
            f"a grace period of {grace_s:g} s is not possible",
            hint=f"Between {GRACE_MIN_S:g} s and 7 days: a sign of life alone may be {LEASE_TTL_S} s old.",
        )
    rule = LossRule(grace_s=grace_s)
    await kv.put(keys.HOST_LOSS, encode(rule))
    return rule


async def remove(kv: KV, name: str) -> None:
    """Delete the host's records; Refused while machines or volumes are left on it.

    Of a lost host, machines that were destroyed are given back here, because it can not do that
    itself: who removes it says that it will not come back. Destroyed volumes go with their host.
    """
    for _ in range(ATTEMPTS):
        host, alive = await _host(kv, name), await kv.get(keys.alive(name))
        promised = await kv.get(keys.reservations(name))
        claims = await _claims_on(kv, name)
        if alive is None:
            for claim in [claim for claim in claims if claim.desired is Desired.DESTROYED]:
                await free(kv, name, claim)
                claims.remove(claim)
            promised = await kv.get(keys.reservations(name))
        # Read before the volumes: one that comes back meanwhile is then seen, or fails the compare.
        kept = (await kv.list(f"{DESTROYED}{name}/")).items
        _refuse_left(name, await _left(kv, name, claims, promised if alive else None))
        held = (host, alive, promised, *kept)
        compares = [Unchanged(record.key, record.mod_revision) for record in held if record is not None]
        compares += [Unchanged(keys.alive(name), 0)] if alive is None else []
        compares += [Unchanged(keys.reservations(name), 0)] if promised is None else []
        gone = (
            keys.host(name),
            keys.alive(name),
            keys.reservations(name),
            keys.drain(name),
            keys.loss(name),
            *(record.key for record in kept),
        )
        try:
            if (await kv.txn(compares, [Delete(key) for key in gone])).succeeded:
                return
        except OutcomeUnknown:
            if await kv.get(keys.host(name)) is None:
                return
        await asyncio.sleep(RETRY_S)
    raise Conflict(f"host {name} was not removed: its records kept changing", hint="Try again.")


async def _left(kv: KV, name: str, claims: Sequence[Machine], promised: KeyValue | None) -> list[str]:
    """What is on the host, in words. `promised`: its reservations, where it can still give them back."""
    left = [f"machine {claim.id} of app {claim.app}" for claim in claims]
    for item in (await kv.list(keys.VOLUMES)).items:
        volume = decode(item.value, Volume)
        if volume.host == name:
            left.append(f"volume {volume.id} ({volume.name}, {volume.size_gb} GB) of app {volume.app}")
    if promised is not None:
        known = {claim.id for claim in claims}
        held = decode(promised.value, Reservations).machines
        left += [f"a copy of machine {m}, which is being ended" for m in sorted(held) if m not in known]
    return left


def _refuse_left(name: str, left: Sequence[str]) -> None:
    if left:
        shown = "".join(f"\n  {line}" for line in left[:SHOWN_LEFT])
        more = f"\n  and {len(left) - SHOWN_LEFT} more" if len(left) > SHOWN_LEFT else ""
        raise Refused(
            f"host {name} is not removed: {len(left)} things are left on it:{shown}{more}",
            hint=f"`fly hosts drain {name}` moves machines off. What has its data there is given up by "
            "`fly machine destroy ID --force`, then `fly volumes destroy ID`.",
        )


async def _change(
    kv: KV, name: str, cordoned: bool, drained: Callable[[Drain | None], Drain | None]
) -> tuple[Host, Drain | None]:
    """Set the host's cordon and its drain (None: no record), if neither changed meanwhile."""
    for _ in range(ATTEMPTS):
        record, held = await _host(kv, name), await kv.get(keys.drain(name))
        host = msgspec.structs.replace(decode(record.value, Host), cordoned=cordoned)
        before = decode(held.value, Drain) if held is not None else None
        after = drained(before)
        effects: list[Put | Delete] = []
        if host != decode(record.value, Host):
            effects.append(Put(record.key, encode(host)))
        if after != before:
            key = keys.drain(name)
            effects.append(Put(key, encode(after)) if after is not None else Delete(key))
        if not effects:
            return host, after
        compares = (
            Unchanged(record.key, record.mod_revision),
            Unchanged(keys.drain(name), held.mod_revision if held is not None else 0),
        )
        try:
            if (await kv.txn(compares, effects)).succeeded:
                return host, after
        except OutcomeUnknown:
            continue  # the change repeated is no change
        await asyncio.sleep(RETRY_S)
    raise Conflict(f"host {name} was not changed: others kept changing its records", hint="Try again.")


async def _host(kv: KV, name: str) -> KeyValue:
    record = await kv.get(keys.host(name))
    if record is None:
        known = [keys.last_part(item.key) for item in (await kv.list(keys.HOSTS)).items]
        raise NotFound(f"no host is called {name!r}", hint=f"Hosts: {', '.join(known) or 'none'}.")
    return record


async def _claims_on(kv: KV, name: str) -> list[Machine]:
    claims = (decode(item.value, Machine) for item in (await kv.list(keys.MACHINES)).items)
    return [claim for claim in claims if claim.host == name]
