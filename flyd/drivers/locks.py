"""Locks by name, kept for only as long as somebody holds or awaits them.

For names that strangers may choose (digests) or that never come again (machines): a table of locks
that only grows would let them fill the daemon's memory.
"""

from __future__ import annotations

import asyncio
from weakref import WeakValueDictionary


class Locks:
    """One lock for each name. Use: `async with locks.of(name)`."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def of(self, name: str) -> asyncio.Lock:
        """The lock of this name; the same for all who ask while one of them has it."""
        return self._locks.setdefault(name, asyncio.Lock())

    def __len__(self) -> int:
        """How many are in use."""
        return len(self._locks)
