"""What one member tells the rest of flyd: lines of history, and its own PostgresMember record.

Writing is a loop of its own with a bounded queue, so a slow etcd never delays the agent; the
times are of when it happened. When the queue is full the oldest line is dropped.

Called by pgha/agent.py.
"""

from __future__ import annotations

import asyncio
from collections import deque

import msgspec
import structlog

from flyd.errors import Unavailable
from flyd.model import Event, PostgresMember, encode
from flyd.ports import KV, Clock
from flyd.store.keys import event as event_key
from pgha import keys

log = structlog.get_logger(__name__)

MAX_QUEUED = 1000
RETRY_S = 0.5
LSN_EVERY_S = 5.0  # a moving LSN alone is not worth a write more often


class Journal:
    """Events and the member record on their way to etcd."""

    def __init__(self, cluster: str, node: str, kv: KV, clock: Clock) -> None:
        self._cluster = cluster
        self._node = node
        self._kv = kv
        self._clock = clock
        self._events: deque[Event] = deque(maxlen=MAX_QUEUED)
        self._member: PostgresMember | None = None  # what is to be written
        self._said: PostgresMember | None = None  # what was last written or queued
        self._wake = asyncio.Event()

    def record(self, kind: str, message: str, **fields: str | int) -> None:
        """A line of history, now."""
        log.info(kind, node=self._node, message=message, **fields)
        named = {"node": self._node} | {name: str(value) for name, value in fields.items()}
        at_s = self._clock.wall_s()
        self._events.append(
            Event(at_s=at_s, app=self._cluster, source=self._node, kind=kind, message=message, fields=named)
        )
        self._wake.set()

    def publish(self, member: PostgresMember) -> None:
        """This is what the member is now; written only when that says something new."""
        if self._said is not None and not _news(self._said, member):
            return
        self._said = self._member = member
        self._wake.set()

    async def write(self) -> None:
        """Bring everything to etcd, for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self.flush()
            except Unavailable:
                self._wake.set()
                await asyncio.sleep(RETRY_S)

    async def flush(self) -> None:
        """Write what is queued; raises Unavailable and keeps the rest."""
        while self._events:
            line = self._events[0]
            await self._kv.put(self._key_of(line), encode(line))
            if self._events and self._events[0] is line:
                self._events.popleft()
        if self._member is not None:
            member = self._member
            await self._kv.put(keys.member(self._cluster, self._node), encode(member))
            if self._member is member:
                self._member = None

    def _key_of(self, line: Event) -> str:
        return event_key(self._cluster, line.at_s, f"{self._node}-{line.kind.rpartition('.')[2]}")


def _news(old: PostgresMember, new: PostgresMember) -> bool:
    same = msgspec.structs.replace(new, flushed_lsn=old.flushed_lsn, updated_at_s=old.updated_at_s)
    if same != old:
        return True
    return new.flushed_lsn != old.flushed_lsn and new.updated_at_s - old.updated_at_s >= LSN_EVERY_S
