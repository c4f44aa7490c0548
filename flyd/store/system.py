"""The operating system's clock and randomness: the real ports.Clock and ports.Entropy.

The only module that asks the system for the time or for chance. Called by the
composition roots.
"""

from __future__ import annotations

import secrets
import time


class SystemClock:
    """ports.Clock. `monotonic_s` is also asyncio's clock, so the two may be compared."""

    def monotonic_s(self) -> float:
        """Seconds on a clock that never jumps."""
        return time.monotonic()

    def wall_s(self) -> float:
        """Seconds since the epoch."""
        return time.time()  # noqa: TID251 - this is the adapter


class SystemEntropy:
    """ports.Entropy."""

    def token(self, n_bytes: int) -> str:
        """`n_bytes` of the system's randomness, as hex."""
        return secrets.token_hex(n_bytes)
