"""Releases and the runs that roll them out, as they stand in etcd.

A release is what an app should be (image and configuration); a run is the walk from what
is to what should be, kept in etcd so that any flyd can carry it on. A run is begun by
requests.py; afterwards only the elected deployer writes it.
"""

from __future__ import annotations

from enum import StrEnum

from flyd.deploy.appconfig import AppConfig
from flyd.model import Machine, Value, decode
from flyd.ports import KV
from flyd.store import keys

MAX_LINES = 200
"""Lines kept in a run; the oldest go first."""


class ReleaseStatus(StrEnum):
    """How the roll-out of a release went."""

    RUNNING = "running"
    COMPLETE = "complete"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


class Release(Value, frozen=True, kw_only=True):
    """One version of an application."""

    version: int
    app: str
    image: str
    config: AppConfig
    status: ReleaseStatus = ReleaseStatus.RUNNING
    description: str = ""
    created_at_s: float = 0.0
    run_id: str = ""


class RunState(StrEnum):
    """Whether a run goes on, and how it ended."""

    RUNNING = "running"
    COMPLETE = "complete"
    FAILED = "failed"


class Phase(StrEnum):
    """Which plan a run walks."""

    PLANNING = "planning"
    ROLLING = "rolling out"
    UNDOING = "undoing"
    ENDED = "ended"


class Slot(Value, frozen=True, kw_only=True):
    """One place for a machine: what is to be there, and what is there when the run begins.

    `old` is the whole claim, so that the walk back can restore exactly what was there.
    """

    region: str
    group: str
    number: int = 0
    old: Machine | None = None
    wanted: bool = True  # False: the new release has no machine here
    old_first: bool = False  # old and new share a volume: the old one must go first

    @property
    def key(self) -> str:
        """Unique within a run, and the same however often the run is planned."""
        return f"{self.region}/{self.group}/{self.number}"


class RunLine(Value, frozen=True, kw_only=True):
    """One line of a run, for people."""

    at_s: float
    text: str


class DeployRun(Value, frozen=True, kw_only=True):
    """The walk of one release. `done` counts the steps of the phase's plan that are behind us."""

    id: str
    app: str
    version: int
    regions: tuple[str, ...]  # first is the primary region
    previous_regions: tuple[str, ...] | None = None  # the app's before; None: an older flyd did not say
    counts: dict[str, dict[str, int]] = {}  # the app's when the run began; flyd/deploy/counts.py
    previous_version: int = 0  # the newest complete release before this one, 0: none
    requested_by: str = ""
    state: RunState = RunState.RUNNING
    phase: Phase = Phase.PLANNING
    slots: tuple[Slot, ...] = ()
    done: int = 0
    reached: int = 0  # undoing: how many forward steps had been begun
    doing: str = ""  # the current step, in words
    lines: tuple[RunLine, ...] = ()
    error: str = ""
    reasons: dict[str, str] = {}  # each host's, where it failed because none could take a machine
    created_at_s: float = 0.0
    updated_at_s: float = 0.0


async def list_releases(kv: KV, app: str) -> tuple[Release, ...]:
    """An app's releases, oldest first."""
    listing = await kv.list(f"{keys.RELEASES}{app}/")
    return tuple(decode(item.value, Release) for item in listing.items)


async def list_runs(kv: KV, app: str) -> tuple[DeployRun, ...]:
    """An app's deploy runs, oldest first."""
    listing = await kv.list(f"{keys.RUNS}{app}/")
    return tuple(decode(item.value, DeployRun) for item in listing.items)
