"""The commands of a person who runs pgha alone: look, move the primary, pause, resume, back up.

They ask what flyd's API asks (requests.py), straight at etcd, and wait until it is done or refused. They
need no agent on the machine that they run on. Called by pgha/main.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from flyd.errors import NotFound, Refused, Unavailable
from flyd.model import Event, PostgresLeader, PostgresMember, Value, decode
from flyd.ports import KV, Clock, Entropy
from flyd.store.keys import EVENTS, postgres_members
from pgha import keys
from pgha.model import RENEW_S, Backup, Lease, Pause
from pgha.requests import paused, request_backup, request_switchover, taken

RENEWED_S = 3 * RENEW_S  # a holder that lives renews its lease in this time
SWITCHOVER_S = 60.0
BACKUP_S = 3600.0
POLL_S = 0.1

Say = Callable[[str], None]


class Overview(Value, frozen=True, kw_only=True):
    """A cluster as etcd knows it."""

    cluster: str
    primary: str
    address: str
    epoch: int
    serving: bool
    lease: str  # renewed, overdue, given back, none
    paused: str | None
    members: tuple[PostgresMember, ...]


async def look(kv: KV, cluster: str) -> Overview:
    """Who leads, whether it lives, and what each member last said; takes up to RENEWED_S."""
    leader, pause = await _leader(kv, cluster), await paused(kv, cluster)
    listing = await kv.list(postgres_members(cluster))
    members = tuple(decode(item.value, PostgresMember) for item in listing.items)
    if leader is None and not members:
        raise NotFound(
            f"etcd knows no Postgres cluster {cluster}",
            hint="Is `cluster` the name that its members run with, and `etcd` theirs?",
        )
    return Overview(
        cluster=cluster,
        primary="" if leader is None else leader.node,
        address="" if leader is None else leader.address,
        epoch=0 if leader is None else leader.epoch,
        serving=leader is not None and leader.serving,
        lease=await _lease(kv, cluster),
        paused=None if pause is None else _pause_text(pause),
        members=members,
    )


def _pause_text(pause: Pause) -> str:
    return f"since {_instant(pause.since_s)}" + (f": {pause.reason}" if pause.reason else "")


def _instant(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


async def _leader(kv: KV, cluster: str) -> PostgresLeader | None:
    item = await kv.get(keys.postgres_leader(cluster))
    return None if item is None else decode(item.value, PostgresLeader)


async def _lease(kv: KV, cluster: str) -> str:
    """Whether its holder writes it anew while we look."""
    first = await kv.get(keys.lease(cluster))
    if first is None:
        return "none"
    if decode(first.value, Lease).released:
        return "given back"
    for _ in range(int(RENEWED_S / POLL_S)):
        await asyncio.sleep(POLL_S)
        now = await kv.get(keys.lease(cluster))
        if now is not None and now.mod_revision != first.mod_revision:
            return "given back" if decode(now.value, Lease).released else "renewed"
    return "overdue"


def table(seen: Overview) -> str:
    """For a person."""
    state = "serving" if seen.serving else "not serving"
    head = f"{seen.cluster}: primary {seen.primary or 'none'} {seen.address}, epoch {seen.epoch}, {state}"
    lines = [f"{head}, lease {seen.lease}"]
    if seen.paused is not None:
        lines.append(f"paused {seen.paused}")
    rows = [("MEMBER", "REGION", "ROLE", "ADDRESS", "TIMELINE", "LSN", "SAYS")]
    rows += [
        (m.node, m.region or "-", m.role, m.address, str(m.timeline), _lsn(m.flushed_lsn), m.detail)
        for m in seen.members
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join(lines)


def _lsn(position: int) -> str:
    return f"{position >> 32:X}/{position & 0xFFFFFFFF:X}"


async def switch_over(kv: KV, cluster: str, target: str, clock: Clock) -> PostgresLeader:
    """Hand over and wait for the successor; `Refused` with the primary's reason if it does not."""
    asked_s = clock.wall_s()
    before = await request_switchover(kv, cluster, target, asked_s)
    async with _deadline(SWITCHOVER_S, f"{cluster} has no new primary", "pgha status"):
        while True:
            wish, leader = await kv.get(keys.switchover(cluster)), await _leader(kv, cluster)
            if leader is not None and leader.epoch > before.epoch and leader.serving:
                return leader
            if wish is None and leader is not None and leader.epoch == before.epoch and leader.serving:
                raise Refused(f"{before.node} stays primary: {await _refusal(kv, cluster, before.node)}")
            await asyncio.sleep(POLL_S)


async def _refusal(kv: KV, cluster: str, node: str) -> str:
    """The newest that was written down."""
    listing = await kv.list(f"{EVENTS}{cluster}/")
    lines = [decode(item.value, Event) for item in listing.items]
    said = [line for line in lines if line.kind == "postgres.switchover_refused" and line.source == node]
    return max(said, key=lambda line: line.at_s).message if said else "see its log"


async def back_up(kv: KV, cluster: str, clock: Clock, entropy: Entropy) -> Backup:
    """A base backup, once it is complete."""
    now_s = clock.wall_s()
    name = f"{datetime.fromtimestamp(now_s, UTC):%Y%m%dT%H%M%S}-{entropy.token(3).lower()}"
    await request_backup(kv, cluster, name, now_s)
    async with _deadline(BACKUP_S, f"the backup {name} is not there yet; it goes on", "pgha backups"):
        while True:
            for backup in await taken(kv, cluster):
                if backup.name == name and backup.error:
                    raise Unavailable(f"the backup {name} failed on {backup.node}: {backup.error}")
                if backup.name == name and backup.finished_at_s:
                    return backup
            await asyncio.sleep(POLL_S)


def backups_table(found: list[Backup]) -> str:
    """For a person."""
    rows = ["NAME                    TAKEN                 SIZE        STATE"]
    for backup in found:
        done = "complete" if backup.finished_at_s else "under way"
        at = _instant(backup.finished_at_s or backup.requested_at_s)
        size = f"{backup.size_bytes / 1e6:.0f} MB"
        rows.append(f"{backup.name:<22}  {at:<20}  {size:<10}  {backup.error or done}")
    return "\n".join(rows)


@asynccontextmanager
async def _deadline(limit_s: float, what: str, then: str) -> AsyncGenerator[None]:
    try:
        async with asyncio.timeout(limit_s):
            yield
    except TimeoutError:
        raise Unavailable(f"{what} after {limit_s:.0f} s", hint=f"`{then}` shows more.") from None
