"""When a machine with a schedule is started again: `hourly`, `daily`, `weekly` or `monthly` (Fly's words).

The time counts from its last start, by its host's wall clock, and is kept in the host's record (durable
before the start is done): a crash repeats no start, and a host that was away for long makes up for one
start, not for all that it missed. Only a machine that rests by itself is started; one that somebody
stopped stays so. Pure; called by decide.py.
"""

from __future__ import annotations

from calendar import monthrange
from datetime import UTC, datetime

HOUR_S = 3600.0
PERIODS_S = {"hourly": HOUR_S, "daily": 24 * HOUR_S, "weekly": 7 * 24 * HOUR_S}
MONTHLY = "monthly"
ROUNDING_S = 1.0
SCHEDULES = (*PERIODS_S, MONTHLY)
LONGEST_MONTH_S = 31 * 24 * HOUR_S


def next_start_s(schedule: str, started_s: float) -> float:
    """The start after the one at `started_s` (both seconds since the epoch); 0 without a schedule.

    A month later is the same day and time of day (UTC), or the last day of a shorter month.
    """
    if not schedule:
        return 0.0
    if schedule != MONTHLY:
        return started_s + PERIODS_S[schedule]
    at = datetime.fromtimestamp(started_s, UTC)
    year, month = (at.year + 1, 1) if at.month == 12 else (at.year, at.month + 1)
    day = min(at.day, monthrange(year, month)[1])
    return at.replace(year=year, month=month, day=day).timestamp()


def wait_s(schedule: str, start_s: float, now_s: float) -> float:
    """Seconds until a start that is due at `start_s`; 0: now.

    One that is further away than the schedule allows was counted by a clock that was wrong: due now.
    """
    left_s = start_s - now_s
    longest_s = PERIODS_S.get(schedule, LONGEST_MONTH_S)
    return 0.0 if left_s > longest_s + ROUNDING_S else max(left_s, 0.0)
