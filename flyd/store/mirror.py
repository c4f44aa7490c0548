"""A local view of some prefixes of etcd, kept current by one list and one watch.

Owns: `Mirror`. Decisions read it synchronously, so one decision sees one revision.

Invariants: the view is the exact content of the prefixes at `revision`; changes of one
transaction appear together, also across prefixes (that is why there is one watch, on the
prefixes' common beginning). It may lag behind etcd, and stays as it was while etcd cannot
be reached: an effect decided on it must carry compares. `version` grows when the content
changes, never otherwise.

Called by every loop that reads shared state: run `keep` in a TaskGroup, `wait_synced`
once, then `wait_change` before each look. Does not write.
"""

from __future__ import annotations

import asyncio
import os
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar, cast

import msgspec
import structlog

from flyd.errors import Compacted, InvariantBroken, Unavailable
from flyd.model import decode
from flyd.ports import KV, Change, KeyValue

log = structlog.get_logger(__name__)

T = TypeVar("T")

LAST = "\U0010ffff"  # sorts behind every character of a key
RETRY_MIN_S = 0.1
RETRY_MAX_S = 2.0


class Versioned(msgspec.Struct, Generic[T], frozen=True):
    """A decoded value, and the revision to compare with when writing it back (ports.Unchanged)."""

    key: str
    value: T
    mod_revision: int


class Mirror:
    """The keys under `prefixes`, as of `revision`, without those that are `ignored`."""

    def __init__(
        self, kv: KV, prefixes: Sequence[str], *, ignored: Callable[[str], bool] = lambda _: False
    ) -> None:
        self.version = 0
        self.revision = 0
        self._kv = kv
        self._prefixes = tuple(prefixes)
        self._ignored = ignored
        self._common = os.path.commonprefix(self._prefixes)  # noqa: RUF071 - of characters, not path parts
        self._entries: dict[str, KeyValue] = {}
        self._order: list[str] = []  # the keys of _entries, sorted
        self._decoded: dict[type[Any], dict[str, Versioned[Any]]] = {}  # of the newest revisions
        self._changed_at = dict.fromkeys(self._prefixes, 0)  # the version of each prefix's last change
        self._lists: dict[tuple[str, type[Any]], tuple[int, list[Versioned[Any]]]] = {}  # of whole prefixes
        self._heard_at: float | None = None
        self._synced = asyncio.Event()
        self._changed = asyncio.Event()
        self._followers: list[Callable[[str], None]] = []
        self._heard = asyncio.Event()

    async def keep(self) -> None:
        """Keep the view current, for ever."""
        listed = False
        retry_s = RETRY_MIN_S
        while True:
            try:
                if not listed:
                    await self._relist()
                    listed = True
                async for batch in self._kv.watch(self._common, self.revision + 1):
                    self._apply(batch.changes, batch.revision)
                    retry_s = RETRY_MIN_S
            except Compacted as e:
                log.info("mirror.compacted", prefix=self._common, compact_revision=e.compact_revision)
                listed = False
            except Unavailable as e:
                if retry_s == RETRY_MIN_S:
                    log.warning("mirror.etcd_unavailable", prefix=self._common, error=str(e))
                await asyncio.sleep(retry_s)
                retry_s = min(retry_s * 2, RETRY_MAX_S)

    async def wait_synced(self) -> None:
        """Return once the view has been read for the first time."""
        await self._synced.wait()

    def stale_s(self) -> float:
        """Seconds since etcd was last heard of: how old the view may be. 0 before the first view."""
        if self._heard_at is None:
            return 0.0
        return asyncio.get_running_loop().time() - self._heard_at

    async def wait_change(self, version: int) -> int:
        """Return the newest version as soon as it is not `version`."""
        while self.version == version:
            await self._changed.wait()
        return self.version

    async def wait_revision(self, revision: int) -> None:
        """Return once the view is at least as new as `revision`, also where nothing in it has changed."""
        while self.revision < revision:
            await self._heard.wait()

    def follow(self, tell: Callable[[str], None]) -> None:
        """Call `tell` with each key that is there, and from now on with each that changes or vanishes.

        Called while a batch is being applied: `tell` notes the key and reads it later.
        """
        for key in self._order:
            tell(key)
        self._followers.append(tell)

    def get(self, key: str, kind: type[T]) -> Versioned[T] | None:
        """The key's value as `kind`: `bytes` and `str` as stored, anything else from JSON."""
        entry = self._entries.get(key)
        return self._decode(entry, kind) if entry is not None else None

    def list(self, prefix: str, kind: type[T]) -> list[Versioned[T]]:
        """All values under `prefix` (within the mirror's own prefixes), in key order."""
        version = self._changed_at.get(prefix)
        if version is None:
            return self._list(prefix, kind)
        held = self._lists.get((prefix, kind))
        if held is None or held[0] != version:
            held = version, self._list(prefix, kind)
            self._lists[prefix, kind] = held
        return held[1].copy()

    def changed_at(self, prefix: str) -> int:
        """The version at which anything under one of the mirror's prefixes has changed last.

        Of any other prefix that is not known: it may have changed just now.
        """
        return self._changed_at.get(prefix, self.version)

    def _list(self, prefix: str, kind: type[T]) -> list[Versioned[T]]:
        decoded = self._decoded.setdefault(kind, {})
        first, end = bisect_left(self._order, prefix), bisect_left(self._order, prefix + LAST)
        return [decoded.get(key) or self._decode(self._entries[key], kind) for key in self._order[first:end]]

    async def _relist(self) -> None:
        listing = await self._kv.list(self._common)
        present = {kv.key for kv in listing.items}
        gone = [Change(key, None, listing.revision) for key in self._order if key not in present]
        now = [Change(kv.key, kv, kv.mod_revision) for kv in listing.items]
        self._apply([*gone, *now], listing.revision)
        self._synced.set()

    def _apply(self, changes: Iterable[Change], revision: int) -> None:
        relevant = [c for c in changes if c.key.startswith(self._prefixes) and not self._ignored(c.key)]
        applied = [self._apply_one(c) for c in relevant]
        for change, changed in zip(relevant, applied, strict=True):
            if changed:
                for prefix in self._prefixes:
                    if change.key.startswith(prefix):
                        self._changed_at[prefix] = self.version + 1
                for tell in self._followers:
                    tell(change.key)
        self.revision = revision
        self._heard_at = asyncio.get_running_loop().time()
        if any(applied):
            self._bump()
        self._heard.set()
        self._heard = asyncio.Event()

    def _apply_one(self, change: Change) -> bool:
        held = self._entries.get(change.key)
        if change.value is None:
            if held is None:
                return False
            del self._entries[change.key]
            del self._order[bisect_left(self._order, change.key)]
            self._forget_decoded(change.key)
            return True
        if held is None:
            insort(self._order, change.key)
        elif held.mod_revision == change.value.mod_revision:
            return False
        self._entries[change.key] = change.value
        self._forget_decoded(change.key)
        return True

    def _forget_decoded(self, key: str) -> None:
        for decoded in self._decoded.values():
            decoded.pop(key, None)

    def _bump(self) -> None:
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    def _decode(self, entry: KeyValue, kind: type[T]) -> Versioned[T]:
        decoded = self._decoded.setdefault(kind, {})
        found = decoded.get(entry.key)
        if found is None:
            found = decoded[entry.key] = Versioned(entry.key, _value(entry, kind), entry.mod_revision)
        return found


def _value(entry: KeyValue, kind: type[T]) -> T:
    if kind is bytes:
        return cast(T, entry.value)
    if kind is str:
        return cast(T, entry.value.decode())
    try:
        return decode(entry.value, kind)
    except msgspec.DecodeError as e:
        raise InvariantBroken(
            f"etcd key {entry.key} (revision {entry.mod_revision}) is no {kind.__name__}: {e}",
            hint=f"see what wrote it with: etcdctl get {entry.key}; "
            "a host with a newer flyd may use a format that this one does not know",
        ) from e
