"""The elected recorder: writes down when hosts are lost and come back, and prunes old history.

Runs inside a leadership scope (store/leader.py) and ends with it; every write
carries the leader's guard, so a deposed recorder tells nothing twice. What was told before is
read from the history itself, so a new recorder goes on where the last one stopped.

Host events belong to no application: they are kept under the app name CLUSTER, which no app
can have. "Lost" means that the host's flyd gave no sign of life for its lease's time; its
machines may well run on (that is what a partition or a dead flyd looks like from here).

Made by flyd/composition.py. Decisions are the two pure functions at the top.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

import msgspec
import structlog

from flyd.errors import Unavailable
from flyd.incidents.timeline import HOST_BACK, HOST_LOST
from flyd.model import Event, Host, decode, encode
from flyd.ports import KV, Clock, Delete, Put, Unchanged
from flyd.store import keys
from flyd.store.mirror import Mirror

log = structlog.get_logger(__name__)

CLUSTER = "_cluster"
EVENTS_KEPT_S = 7 * 24 * 3600.0
EVENTS_MAX = 1000  # of one application
PRUNE_EVERY_S = 600.0
PRUNE_BATCH = 100  # etcd takes 128 operations in one transaction
RETRY_MIN_S = 0.5
RETRY_MAX_S = 5.0


class HostNews(msgspec.Struct, frozen=True):
    """Hosts whose state differs from what was last told, by name."""

    lost: tuple[str, ...]
    back: tuple[str, ...]


def host_news(hosts: Iterable[str], alive: Iterable[str], told_lost: Iterable[str]) -> HostNews:
    """Who is gone, and who is back, since the last line of history."""
    living, told = frozenset(alive), frozenset(told_lost)
    known = sorted(hosts)
    return HostNews(
        lost=tuple(name for name in known if name not in living and name not in told),
        back=tuple(name for name in known if name in living and name in told),
    )


def outdated(event_keys: Iterable[str], now_s: float) -> tuple[str, ...]:
    """Keys of events that are too old, or beyond the newest EVENTS_MAX of their app."""
    by_app: dict[str, list[str]] = {}
    for key in sorted(event_keys):
        by_app.setdefault(key.removeprefix(keys.EVENTS).partition("/")[0], []).append(key)
    oldest_ns = int((now_s - EVENTS_KEPT_S) * 1e9)
    gone: list[str] = []
    for found in by_app.values():
        surplus = max(0, len(found) - EVENTS_MAX)
        gone += [key for i, key in enumerate(found) if i < surplus or _written_ns(key) < oldest_ns]
    return tuple(gone)


def _written_ns(key: str) -> int:
    return int(keys.last_part(key).partition("-")[0])


class Recorder:
    """One flyd's recorder. The mirror must hold HOSTS and ALIVE."""

    def __init__(self, kv: KV, mirror: Mirror, *, clock: Clock) -> None:
        self._kv = kv
        self._mirror = mirror
        self._clock = clock

    async def keep_recording(self, guard: Unchanged) -> None:
        """Record and prune until leadership ends (cancels) this."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_hosts(guard), name="hosts")
            group.create_task(self._keep_pruned(guard), name="prune")

    async def _watch_hosts(self, guard: Unchanged) -> None:
        retry_s = RETRY_MIN_S
        while True:
            try:
                told_lost = await self._told_lost()
                while True:
                    version = self._mirror.version
                    await self._tell(told_lost, guard)
                    retry_s = RETRY_MIN_S
                    await self._mirror.wait_change(version)
            except Unavailable as error:  # an answer may be lost: read again what was told
                if retry_s == RETRY_MIN_S:
                    log.warning("recorder.write_failed", error=error.message)
                await asyncio.sleep(retry_s)
                retry_s = min(retry_s * 2, RETRY_MAX_S)

    async def _told_lost(self) -> dict[str, None]:
        """Hosts whose last line of history says that they are lost."""
        listing = await self._kv.list(f"{keys.EVENTS}{CLUSTER}/")
        last: dict[str, str] = {}
        for item in listing.items:
            event = decode(item.value, Event)
            if event.kind in (HOST_LOST, HOST_BACK):
                last[event.source] = event.kind
        return {host: None for host, kind in last.items() if kind == HOST_LOST}

    async def _tell(self, told_lost: dict[str, None], guard: Unchanged) -> None:
        hosts = {item.value.name: item.value for item in self._mirror.list(keys.HOSTS, Host)}
        alive = [keys.last_part(item.key) for item in self._mirror.list(keys.ALIVE, bytes)]
        news = host_news(hosts, alive, told_lost)
        for name in news.lost:
            await self._write(hosts[name], HOST_LOST, "no sign of life; its machines may run on", guard)
            told_lost[name] = None
        for name in news.back:
            await self._write(hosts[name], HOST_BACK, "gives signs of life again", guard)
            del told_lost[name]

    async def _write(self, host: Host, kind: str, message: str, guard: Unchanged) -> None:
        at_s = self._clock.wall_s()
        line = Event(
            at_s=at_s,
            app=CLUSTER,
            source=host.name,
            kind=kind,
            message=message,
            fields={"region": host.region},
        )
        key = keys.event(CLUSTER, at_s, f"{host.name}-{kind.rpartition('.')[2]}")
        await self._commit([Put(key, encode(line))], guard)
        log.info(kind, host=host.name, region=host.region)

    async def _keep_pruned(self, guard: Unchanged) -> None:
        while True:
            try:
                listing = await self._kv.list(keys.EVENTS)
                gone = outdated((item.key for item in listing.items), self._clock.wall_s())
                for start in range(0, len(gone), PRUNE_BATCH):
                    await self._commit([Delete(key) for key in gone[start : start + PRUNE_BATCH]], guard)
                if gone:
                    log.info("recorder.pruned", events=len(gone))
            except Unavailable as error:
                log.warning("recorder.prune_failed", error=error.message)
            await asyncio.sleep(PRUNE_EVERY_S)

    async def _commit(self, effects: Sequence[Put | Delete], guard: Unchanged) -> None:
        if not (await self._kv.txn([guard], effects)).succeeded:
            raise Unavailable("another flyd records now", hint="Nothing to do: this scope is ending.")
