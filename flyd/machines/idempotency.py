"""Which machine a retried create has made: one record for each idempotency key, for a day.

    requests/<app>/<hash of the key>    MadeBy    the API; bound to an etcd lease of KEEP_S

Owns the key's machine id, chosen before anything is placed: the placer finds a machine that an
earlier try has placed by that id. Invariants: a key stands for one request (another one with the
same key is Conflict) and for one machine at a time. What it does not do: if the very call that
placed the machine died before it was marked done, and the machine was destroyed before the retry,
the retry makes it again.

Called by the API.
"""

from __future__ import annotations

import hashlib

import msgspec

from flyd.errors import Conflict, InvalidInput, OutcomeUnknown
from flyd.model import Value, decode, encode
from flyd.placement import ids
from flyd.ports import KV, Entropy, Put, Unchanged
from flyd.store import keys

REQUESTS = keys.ROOT + "requests/"
KEEP_S = 86_400
MAX_KEY_CHARS = 200
ATTEMPTS = 8


class MadeBy(Value, frozen=True, kw_only=True):
    """What a key stands for. `done`: the machine was placed."""

    machine_id: str
    digest: str  # of the request
    lease: int
    done: bool = False


async def remember(kv: KV, app: str, key: str, request: bytes, *, entropy: Entropy) -> MadeBy:
    """The record of a key, made now if there is none; Conflict if it stands for another request."""
    if len(key) > MAX_KEY_CHARS:
        raise InvalidInput(f"an idempotency key has at most {MAX_KEY_CHARS} characters, not {len(key)}")
    digest = hashlib.sha256(request).hexdigest()
    made: MadeBy | None = None
    for _ in range(ATTEMPTS):
        record = await kv.get(_key(app, key))
        if record is not None:
            found = decode(record.value, MadeBy)
            if made is not None and found.lease != made.lease:
                await kv.lease_revoke(made.lease)
            if found.digest != digest:
                raise Conflict(
                    f"idempotency key {key!r} was used for another request",
                    hint="A key belongs to one request and its retries: take a new one for another.",
                )
            return found
        if made is None:
            lease = await kv.lease_grant(KEEP_S)
            made = MadeBy(machine_id=ids.new_machine_id(entropy), digest=digest, lease=lease)
        try:
            put = Put(_key(app, key), encode(made), made.lease)
            if (await kv.txn((Unchanged(put.key, 0),), (put,))).succeeded:
                return made
        except OutcomeUnknown:
            continue
    raise Conflict(f"idempotency key {key!r} was not stored: others use it too", hint="Try again.")


async def mark_done(kv: KV, app: str, key: str, made: MadeBy) -> None:
    """The machine was placed: from now on a retry only looks for it. Losing a race is no error."""
    record = await kv.get(_key(app, key))
    if record is not None and not made.done:
        done = msgspec.structs.replace(made, done=True)
        await kv.txn(
            (Unchanged(record.key, record.mod_revision),), (Put(record.key, encode(done), made.lease),)
        )


def _key(app: str, key: str) -> str:
    return f"{REQUESTS}{app}/{hashlib.sha256(key.encode()).hexdigest()[:32]}"
