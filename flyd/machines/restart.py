"""Whether and when a machine whose process ended is started again.

Fly's rules: `no`, `on-failure` (at most max_retries within RESTART_WINDOW_S, then it
stays stopped) and `always`, each with an exponential back-off so that a machine that
dies at once does not burn its host. Pure; called by host.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from flyd.model import ExitStatus, RestartPolicy, Value

RESTART_WINDOW_S = 300.0
BACKOFF_FIRST_S = 0.25
BACKOFF_MAX_S = 30.0


class Again(Value, frozen=True, kw_only=True):
    """Start it again after `delay_s`."""

    delay_s: float


class Stay(Value, frozen=True, kw_only=True):
    """Leave it as it is until somebody asks."""

    reason: str


def backoff_s(failures: int) -> float:
    """The pause after the n-th failure in a row, counted from 1."""
    doublings = min(max(failures - 1, 0), 16)
    return min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0**doublings)


def recent_only(exits: Sequence[float], now: float) -> tuple[float, ...]:
    """The times that still count at `now` (both on the monotonic clock)."""
    return tuple(at for at in exits if now - at < RESTART_WINDOW_S)


def after_exit(policy: RestartPolicy, exit: ExitStatus, recent: Sequence[float], now: float) -> Again | Stay:
    """What follows this exit. `recent` holds the times of earlier exits, not this one.

    An exit whose status nobody saw (the host rebooted) has no code and counts as a failure.
    """
    earlier = recent_only(recent, now)
    clean = exit.code == 0 and exit.signal is None
    if policy.policy == "no":
        return Stay(reason=f"{describe(exit)}; the restart policy is 'no'")
    if policy.policy == "on-failure":
        if clean:
            return Stay(reason=f"{describe(exit)}; the restart policy 'on-failure' lets it rest")
        if len(earlier) >= policy.max_retries:
            return Stay(
                reason=f"{describe(exit)}; gave up after {len(earlier)} restarts in {RESTART_WINDOW_S:.0f} s"
            )
    return Again(delay_s=backoff_s(len(earlier) + 1))


def describe(exit: ExitStatus) -> str:
    """An exit in words."""
    if exit.oom_killed:
        return "killed: out of memory"
    if exit.signal is not None:
        return f"ended by signal {exit.signal}"
    if exit.code is not None:
        return f"exited with code {exit.code}"
    return "ended unseen"
