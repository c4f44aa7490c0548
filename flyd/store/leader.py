"""Leadership as a scope: one of several contenders works, the others wait.

Owns the keys leaders/<role>, each under a lease. Invariants: `work` runs only while this
contender can prove that its lease has not ended, by its own clock counted from before the
renewal was *sent*; then it is cancelled. A clock argument can still fail (a process frozen
inside `work`), so every effect on shared state also carries `Leadership.guard`: etcd itself
refuses what a former leader sends late.

Called for the loops of which only one may work in the cluster: deploys, history, repairs. One host
leads all of them, in the role CONTROLLER: every campaign costs each host a watch, every term renewals.
`work` handles its own errors: whatever it raises ends `lead` too. Does not decide who leads best.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import structlog

from flyd.errors import Compacted, NotFound, OutcomeUnknown, Unavailable
from flyd.ports import KV, Put, Unchanged
from flyd.store import keys

log = structlog.get_logger(__name__)

CONTROLLER = "controller"
LEADER_TTL_S = 5
MARGIN_S = 0.5  # the scope ends this long before the lease may end
RENEWALS_PER_TTL = 4
RETRY_S = 0.5  # after etcd failed us, or work ended by itself
RENEW_RETRY_S = 0.1
RESIGN_TIMEOUT_S = 1.0


class Leadership(msgspec.Struct, frozen=True):
    """One term of leadership."""

    role: str
    name: str
    mod_revision: int  # of the leader's key: no two terms share it

    @property
    def guard(self) -> Unchanged:
        """The compare that every effect of this term carries."""
        return Unchanged(keys.leader(self.role), self.mod_revision)


Work = Callable[[Leadership], Awaitable[None]]


async def lead(kv: KV, role: str, name: str, work: Work, *, ttl_s: int = LEADER_TTL_S) -> None:
    """Campaign for the role for ever; run `work` during each term, cancelled when it ends."""
    reachable = True
    while True:
        try:
            await _wait_vacant(kv, keys.leader(role))
            await _serve_term(kv, role, name, work, ttl_s)
            reachable = True
        except Unavailable as e:
            if reachable:
                log.warning("leader.campaign_failed", role=role, name=name, error=str(e))
            reachable = False
            await asyncio.sleep(RETRY_S)


async def _wait_vacant(kv: KV, key: str) -> None:
    while True:
        listing = await kv.list(key)
        if all(item.key != key for item in listing.items):
            return
        try:
            async for batch in kv.watch(key, listing.revision + 1):
                if any(change.key == key and change.value is None for change in batch.changes):
                    return
        except Compacted:
            continue  # look again: the deletion may be among what is gone


async def _serve_term(kv: KV, role: str, name: str, work: Work, ttl_s: int) -> None:
    """Try to win the role; if won, lead until leadership is lost or `work` ends."""
    asked_s = asyncio.get_running_loop().time()
    lease = await kv.lease_grant(ttl_s)
    try:
        leadership = await _win(kv, role, name, lease)
        if leadership is None:
            return
        log.info("leader.won", role=role, name=name, revision=leadership.mod_revision)
        if await _work_while_proven(kv, leadership, lease, asked_s + ttl_s - MARGIN_S, work, ttl_s):
            log.info("leader.resigned", role=role, name=name)
            await asyncio.sleep(RETRY_S)
        else:
            log.warning("leader.lost", role=role, name=name)
    finally:
        await _resign(kv, lease)


async def _win(kv: KV, role: str, name: str, lease: int) -> Leadership | None:
    key = keys.leader(role)
    try:
        result = await kv.txn([Unchanged(key, 0)], [Put(key, name.encode(), lease)])
    except OutcomeUnknown:
        held = await kv.get(key)
        if held is None or held.lease != lease:
            return None
        return Leadership(role=role, name=name, mod_revision=held.mod_revision)
    except NotFound:  # this process stood still for so long that the lease ended before it was used
        return None
    return Leadership(role=role, name=name, mod_revision=result.revision) if result.succeeded else None


async def _work_while_proven(
    kv: KV, leadership: Leadership, lease: int, proven_until_s: float, work: Work, ttl_s: int
) -> bool:
    """True if `work` ended by itself, False if it was cancelled for want of proof."""
    scope = asyncio.timeout_at(proven_until_s)
    try:
        async with scope, asyncio.TaskGroup() as tasks:
            await asyncio.sleep(0)  # winning may have taken longer than the proof lasts: then end here
            renewal = tasks.create_task(_keep_lease(kv, lease, scope, ttl_s))
            await work(leadership)
            renewal.cancel()
    except TimeoutError:
        return False
    return True


async def _keep_lease(kv: KV, lease: int, scope: asyncio.Timeout, ttl_s: int) -> None:
    """Renew, and move the scope's end with each renewal; end it at once if the lease is gone."""
    loop = asyncio.get_running_loop()
    pause_s = ttl_s / RENEWALS_PER_TTL
    while True:
        await asyncio.sleep(pause_s)
        sent_s = loop.time()
        try:
            granted_s = await kv.lease_keepalive(lease)
        except Unavailable as e:
            if pause_s != RENEW_RETRY_S:
                log.warning("leader.renewal_failed", lease=lease, error=str(e))
            pause_s = RENEW_RETRY_S
            continue
        pause_s = ttl_s / RENEWALS_PER_TTL
        if scope.expired():
            return
        if granted_s == 0:
            scope.reschedule(loop.time())
            return
        # Never later than what was asked for: etcd may have granted more than it keeps.
        scope.reschedule(sent_s + min(granted_s, ttl_s) - MARGIN_S)


async def _resign(kv: KV, lease: int) -> None:
    """End the lease, so that the next leader need not wait for it; it ends by itself anyway."""
    try:
        async with asyncio.timeout(RESIGN_TIMEOUT_S):
            await kv.lease_revoke(lease)
    except (Unavailable, TimeoutError) as e:
        log.info("leader.resign_failed", lease=lease, error=str(e))
