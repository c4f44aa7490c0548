"""Which snapshots of a volume to take and which to remove: pure. Called by keeper.py."""

from __future__ import annotations

from collections.abc import Sequence

from flyd.model import Value
from flyd.storage.local import VolumeSnapshot

EVERY_S = 24 * 3600.0
KEPT = 5


class Plan(Value, frozen=True, kw_only=True):
    """What is to be done now."""

    take: bool
    remove: tuple[str, ...] = ()  # ids


def plan(
    snapshots: Sequence[VolumeSnapshot], now_s: float, *, every_s: float = EVERY_S, kept: int = KEPT
) -> Plan:
    """One more if none of the schedule's own is younger than `every_s`; with it the newest `kept` stay.

    Those that people have made are no business of the schedule. A snapshot from the future (the clock was
    set back) counts as new for no longer than `every_s`.
    """
    scheduled = sorted((s for s in snapshots if s.scheduled), key=lambda s: (s.made_at_s, s.id))
    take = all(abs(now_s - s.made_at_s) >= every_s for s in scheduled)
    too_many = max(0, len(scheduled) + take - kept)
    return Plan(take=take, remove=tuple(s.id for s in scheduled[:too_many]))
