"""When base backups are taken, tried and dropped. Pure, with the values that etcd holds for it.

A schedule's next backup is due `every_s` after the last complete one was asked for: however many were missed,
one makes up for them. Retention counts what can be restored: a backup whose trial restore failed is none of
the `keep`, and what is younger than the oldest kept one stays. Without a schedule nothing is ever dropped.

Called by pgha/backups.py and pgha/drill.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime

from flyd.model import Value
from flyd.ports import Entropy
from pgha.model import Backup

RETRY_S = 600.0  # after a backup that failed
CLAIM_S = 120.0  # a member that has not been heard of for this long is not at a trial restore any more


class Schedule(Value, frozen=True, kw_only=True):
    """A person's wish. `verify_every_s` 0: no trial restores by themselves."""

    every_s: float
    keep: int
    verify_every_s: float = 0.0


class Drill(Value, frozen=True, kw_only=True):
    """A trial restore that is wished for; `node`: the replica that is at it, last heard of at `seen_at_s`."""

    backup: str
    requested_at_s: float
    node: str = ""
    seen_at_s: float = 0.0


class DrillResult(Value, frozen=True, kw_only=True):
    """What became of a backup's last trial restore. `error`: why it is of no use, or was not tried."""

    backup: str
    node: str
    requested_at_s: float
    finished_at_s: float
    error: str = ""
    tried: bool = True  # False: the error is the place's, not the backup's
    restored_to_s: float = 0.0  # the last commit that it had
    databases: int = 0


class Reached(Value, frozen=True, kw_only=True):
    """How far one base backup gets with the WAL that there is."""

    backup: str
    last_segment: str = ""
    last_commit_s: float = 0.0  # any instant before it can be restored; 0: not known
    missing: str = ""  # the archive goes on, but behind this segment, which it has not


class ArchiveState(Value, frozen=True, kw_only=True):
    """What the primary last found in the archive."""

    reached: tuple[Reached, ...] = ()


def backup_name(now_s: float, entropy: Entropy) -> str:
    """Its time, and something that two asked for at once do not share."""
    return datetime.fromtimestamp(now_s, UTC).strftime("%Y%m%dT%H%M%S") + f"-{entropy.token(3).lower()}"


def backup_due(schedule: Schedule | None, backups: Iterable[Backup], now_s: float) -> bool:
    """Whether the schedule wants one now; `backups`: complete, failed and under way."""
    if schedule is None:
        return False
    asked = list(backups)
    if any(not b.finished_at_s and not b.error for b in asked):
        return False
    complete_s = max((b.requested_at_s for b in asked if b.finished_at_s), default=-schedule.every_s)
    tried_s = max((b.requested_at_s for b in asked), default=-RETRY_S)
    return now_s >= complete_s + schedule.every_s and (
        now_s >= tried_s + min(RETRY_S, schedule.every_s) or tried_s == complete_s
    )


def drill_due(
    schedule: Schedule | None, backups: Iterable[Backup], results: Iterable[DrillResult], now_s: float
) -> str:
    """The newest backup, if none was tried for too long; empty: not now."""
    complete = [b for b in backups if b.finished_at_s and not b.error]
    if schedule is None or not schedule.verify_every_s or not complete:
        return ""
    last_s = max((r.requested_at_s for r in results), default=-schedule.verify_every_s)
    if now_s < last_s + schedule.verify_every_s:
        return ""
    return max(complete, key=lambda b: b.finished_at_s).name


def claimable(drill: Drill, node: str, now_s: float) -> bool:
    """Whether this replica may begin it: nobody is at it, or only an earlier life of its own."""
    return drill.node in ("", node) or now_s > drill.seen_at_s + CLAIM_S


def broken(results: Iterable[DrillResult]) -> frozenset[str]:
    """The backups that were tried and are of no use."""
    return frozenset(r.backup for r in results if r.error and r.tried)


def expired(backups: Sequence[Backup], broken: Collection[str], keep: int) -> list[str]:
    """The complete backups to drop so that the newest `keep` good ones stay, and all that is younger."""
    complete = sorted((b for b in backups if b.finished_at_s and not b.error), key=lambda b: b.finished_at_s)
    good = [b for b in complete if b.name not in broken]
    if keep < 1 or len(good) <= keep:
        return []
    oldest_s = good[-keep].finished_at_s
    return [b.name for b in complete if b.finished_at_s < oldest_s]


def forgotten(recorded: Iterable[Backup], there: Sequence[Backup]) -> list[str]:
    """The records of what is not in the archive any more; failures stay as long as what they follow."""
    names = [b.name for b in there]
    oldest_s = min((b.requested_at_s for b in there), default=0.0)
    return [b.name for b in recorded if b.name not in names and (not b.error or b.requested_at_s < oldest_s)]
