"""A host's membership: its description, and a sign of life under a lease.

The description stays when the host is lost, so that people can see what it was. Whether the host
is cordoned is not its own word: that is kept when it describes itself again. The sign of life
vanishes LEASE_TTL_S after the last renewal. Nothing that runs depends on it: it only tells
placement which hosts can take orders now, and which have lost their machines (flyd/placement/loss.py).
"""

from __future__ import annotations

import asyncio

import msgspec
import structlog

from flyd.errors import NotFound, Unavailable
from flyd.model import Host, decode, encode
from flyd.ports import KV, Put, Unchanged
from flyd.store import keys

log = structlog.get_logger(__name__)

LEASE_TTL_S = 5
RENEW_S = 1.5
RETRY_S = 1.0


async def keep_membership(kv: KV, host: Host) -> None:
    """Describe this host, then renew its lease for ever; a lost lease is made anew."""
    while True:
        try:
            lease = await kv.lease_grant(LEASE_TTL_S)
            try:
                while not await _join(kv, host, lease):
                    pass  # it was cordoned at this very moment
                log.info("host.joined", host=host.name, region=host.region)
                while await kv.lease_keepalive(lease) > 0:
                    await asyncio.sleep(RENEW_S)
                log.warning("host.lease_expired", host=host.name)
            except asyncio.CancelledError:
                await _leave(kv, lease)
                raise
        except (Unavailable, NotFound) as error:  # NotFound: the lease ended before it was used
            log.warning("host.etcd_unavailable", host=host.name, error=error.message)
            await asyncio.sleep(RETRY_S)


async def _join(kv: KV, host: Host, lease: int) -> bool:
    """Describe the host and say that it lives; False if its record changed meanwhile."""
    key = keys.host(host.name)
    stored = await kv.get(key)
    cordoned = stored is not None and decode(stored.value, Host).cordoned
    described = msgspec.structs.replace(host, cordoned=cordoned)
    joined = await kv.txn(
        [Unchanged(key, stored.mod_revision if stored else 0)],
        [Put(key, encode(described)), Put(keys.alive(host.name), b"true", lease)],
    )
    return joined.succeeded


async def _leave(kv: KV, lease: int) -> None:
    """Take the sign of life back, so that nothing is placed here from now on."""
    try:
        await kv.lease_revoke(lease)
    except Unavailable:
        log.info("host.lease_left_to_expire", ttl_s=LEASE_TTL_S)
