"""Leases on machines: who may change one just now, so that two operators (or scripts) do not mix.

    leases/<app>/<machine>    MachineLease    the API; bound to an etcd lease of the same length

Owns taking, renewing and giving back, and the guard that every change by the API carries.
Invariants: at most one lease of a machine at a time; a lease whose holder died goes with its etcd
lease, so nobody compares clocks; a change is one transaction with the lease's own revision, so
none slips in after the lease was taken by somebody else.

Deploys and drains wait for a lease before they take a machine away, and say whose it is (`words`);
other loops (repairs of lost hosts, restarts by policy) do not ask: a lease keeps people apart.
Called by the API; commands.py and updates.py take the guard.
"""

from __future__ import annotations

import msgspec

from flyd.errors import Conflict, InvalidInput, NotFound, OutcomeUnknown
from flyd.model import Value, decode, encode
from flyd.ports import KV, Clock, Delete, Entropy, KeyValue, Put, Unchanged
from flyd.store import keys

LEASES = keys.ROOT + "leases/"
MIN_TTL_S = 2
MAX_TTL_S = 86_400
NONCE_BYTES = 16
ATTEMPTS = 8


class MachineLease(Value, frozen=True, kw_only=True):
    """A hold on a machine. `lease` is etcd's; the times are for people."""

    machine: str
    nonce: str
    owner: str
    description: str = ""
    ttl_s: int
    lease: int
    expires_at_s: float = 0.0


def lease_key(app: str, machine_id: str) -> str:
    """Where a machine's lease is."""
    return f"{LEASES}{app}/{machine_id}"


async def guard(kv: KV, app: str, machine_id: str, nonce: str) -> Unchanged:
    """What a change has to compare; Conflict with the holder's name unless `nonce` is the lease's."""
    record = await kv.get(lease_key(app, machine_id))
    if record is None:
        if nonce:
            raise _gone(machine_id)
        return Unchanged(lease_key(app, machine_id), 0)
    held = decode(record.value, MachineLease)
    if held.nonce != nonce:
        raise _held(held)
    return Unchanged(record.key, record.mod_revision)


async def find(kv: KV, app: str, machine_id: str) -> MachineLease:
    """The lease on a machine, with its nonce; NotFound if nobody holds one."""
    record = await kv.get(lease_key(app, machine_id))
    if record is None:
        raise _nobody(machine_id)
    return decode(record.value, MachineLease)


async def acquire(
    kv: KV,
    app: str,
    machine_id: str,
    *,
    owner: str,
    description: str = "",
    ttl_s: int,
    clock: Clock,
    entropy: Entropy,
) -> MachineLease:
    """Take the machine for `ttl_s` seconds; Conflict with the holder's name if somebody has it."""
    if not MIN_TTL_S <= ttl_s <= MAX_TTL_S:
        raise InvalidInput(f"a lease lasts {MIN_TTL_S} to {MAX_TTL_S} s, not {ttl_s}")
    nonce = entropy.token(NONCE_BYTES)
    key = lease_key(app, machine_id)
    taken: MachineLease | None = None
    for _ in range(ATTEMPTS):
        there = await kv.get(key)
        if there is not None:
            held = decode(there.value, MachineLease)
            if held.nonce == nonce:  # an attempt whose answer was lost
                return held
            await _revoke(kv, taken)
            raise _held(held)
        machine = await kv.get(keys.machine(app, machine_id))
        if machine is None:
            await _revoke(kv, taken)
            raise NotFound(f"no machine {machine_id!r}", hint="`fly machine list` shows all.")
        if taken is None:
            taken = MachineLease(
                machine=machine_id,
                nonce=nonce,
                owner=owner,
                description=description,
                ttl_s=ttl_s,
                lease=await kv.lease_grant(ttl_s),
                expires_at_s=clock.wall_s() + ttl_s,
            )
        compares = (Unchanged(key, 0), Unchanged(machine.key, machine.mod_revision))
        try:
            result = await kv.txn(compares, (Put(key, encode(taken), taken.lease),))
        except OutcomeUnknown:
            continue
        if result.succeeded:
            return taken
    await _revoke(kv, taken)
    raise Conflict(f"machine {machine_id} kept changing while its lease was being taken", hint="Try again.")


async def renew(kv: KV, app: str, machine_id: str, nonce: str, *, clock: Clock) -> MachineLease:
    """Let the lease's time begin anew; Conflict if it is another's, or has run out."""
    for _ in range(ATTEMPTS):
        record, held = await _mine(kv, app, machine_id, nonce)
        if await kv.lease_keepalive(held.lease) <= 0:
            raise _gone(machine_id)
        renewed = msgspec.structs.replace(held, expires_at_s=clock.wall_s() + held.ttl_s)
        put = Put(record.key, encode(renewed), held.lease)
        try:
            result = await kv.txn((Unchanged(record.key, record.mod_revision),), (put,))
        except OutcomeUnknown:
            continue
        if result.succeeded:
            return renewed
    raise Conflict(f"the lease on machine {machine_id} kept changing while it was being renewed")


async def release(kv: KV, app: str, machine_id: str, nonce: str, *, force: bool = False) -> None:
    """Give the machine back; with `force` whoever holds it. NotFound if nobody does."""
    for _ in range(ATTEMPTS):
        if force:
            record = await kv.get(lease_key(app, machine_id))
            if record is None:
                raise _nobody(machine_id)
            held = decode(record.value, MachineLease)
        else:
            record, held = await _mine(kv, app, machine_id, nonce)
        try:
            compare = Unchanged(record.key, record.mod_revision)
            result = await kv.txn((compare,), (Delete(record.key),))
        except OutcomeUnknown:
            if await kv.get(record.key) is None:
                return
            continue
        if result.succeeded:
            await _revoke(kv, held)
            return
    raise Conflict(f"the lease on machine {machine_id} kept changing while it was being released")


async def _mine(kv: KV, app: str, machine_id: str, nonce: str) -> tuple[KeyValue, MachineLease]:
    record = await kv.get(lease_key(app, machine_id))
    if record is None:
        raise _gone(machine_id)
    held = decode(record.value, MachineLease)
    if held.nonce != nonce:
        raise _held(held)
    return record, held


async def _revoke(kv: KV, taken: MachineLease | None) -> None:
    if taken is not None:
        await kv.lease_revoke(taken.lease)


def holder(held: MachineLease) -> str:
    """Who holds the machine, and what for."""
    what_for = f" for {held.description}" if held.description else ""
    return f"machine {held.machine} is leased by {held.owner or 'somebody'}{what_for}"


def words(held: MachineLease) -> str:
    """Who holds the machine, what for and until when (unless it is renewed)."""
    seconds = int(held.expires_at_s) % 86_400
    until = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d} UTC"
    return f"{holder(held)} until {until}"


def _held(held: MachineLease) -> Conflict:
    return Conflict(
        holder(held),
        hint=f"It is free at most {held.ttl_s} s after its holder's last sign; "
        f"`fly machine lease view {held.machine}` shows it, `lease clear` takes it away.",
    )


def _gone(machine_id: str) -> Conflict:
    return Conflict(
        f"the lease on machine {machine_id} is gone: it was not renewed in time, or given back",
        hint="Take it anew; somebody else may have changed the machine meanwhile.",
    )


def _nobody(machine_id: str) -> NotFound:
    return NotFound(f"nobody holds a lease on machine {machine_id}")
