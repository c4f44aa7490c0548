"""Releases and the runs that roll them out, as they stand in etcd, and how a run begins.

A release is what an app should be (image and configuration); a run is the walk from what
is to what should be, kept in etcd so that any flyd can carry it on. Invariants: versions of
an app grow by one; an app has at most one open run. Both hold by one transaction that
creates release `n` only if it is absent: two callers who saw the same newest version can
not both succeed, and a caller who sees an open run is refused.

`start_deploy` is called by the API; afterwards only the elected deployer writes the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import msgspec

from flyd.deploy.appconfig import AppConfig
from flyd.errors import Conflict, InvalidInput, NotFound, OutcomeUnknown, Refused
from flyd.model import App, AppKind, Machine, Value, decode, encode
from flyd.ports import KV, Clock, Delete, Entropy, Put, Unchanged
from flyd.store import keys

MAX_LINES = 200
"""Lines kept in a run; the oldest go first."""

KEPT_RUNS = 20
"""Ended runs of an app that are kept; older ones go when a new one begins."""

START_ATTEMPTS = 8
"""Tries before a deploy that keeps losing to others is refused."""


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


async def start_deploy(
    kv: KV,
    app: str,
    image: str,
    config: AppConfig,
    *,
    clock: Clock,
    entropy: Entropy,
    regions: Sequence[str] = (),
    description: str = "",
    requested_by: str = "",
) -> DeployRun:
    """Create the next release and its run; the elected deployer takes it from there.

    Raises Conflict with who and when if another deploy of the app is under way.
    """
    token = entropy.token(4)
    for _ in range(START_ATTEMPTS):
        record = await kv.get(keys.app(app))
        if record is None:
            raise NotFound(f"no app is called {app!r}", hint="`fly apps create` makes one.")
        application = decode(record.value, App)
        releases = await list_releases(kv, app)
        runs = await list_runs(kv, app)
        mine = next((r for r in runs if r.id.endswith(token)), None)
        if mine is not None:
            return mine  # the answer of an attempt got lost
        _refuse_second(app, runs)
        version = releases[-1].version + 1 if releases else 1
        complete = [r.version for r in releases if r.status is ReleaseStatus.COMPLETE]
        now_s = clock.wall_s()
        run = DeployRun(
            id=f"{version:08d}-{token}",
            app=app,
            version=version,
            regions=_regions(application, config, tuple(regions)),
            previous_version=complete[-1] if complete else 0,
            requested_by=requested_by,
            created_at_s=now_s,
            updated_at_s=now_s,
        )
        release = Release(
            version=version,
            app=app,
            image=image,
            config=config,
            description=description,
            created_at_s=now_s,
            run_id=run.id,
        )
        compares = [Unchanged(keys.release(app, version), 0), Unchanged(record.key, record.mod_revision)]
        effects = _records(application, release, run, runs)
        try:
            if (await kv.txn(compares, effects)).succeeded:
                return run
        except OutcomeUnknown:
            continue
    raise Conflict(f"the deploy of app {app} was not begun: others kept changing the app", hint="Try again.")


def _records(
    app: App, release: Release, run: DeployRun, earlier: tuple[DeployRun, ...]
) -> list[Put | Delete]:
    """All that a new run writes; the oldest runs go."""
    return [
        Put(keys.release(app.name, release.version), encode(release)),
        Put(keys.run(app.name, run.id), encode(run)),
        Put(keys.app(app.name), encode(msgspec.structs.replace(app, regions=run.regions))),
        *(Delete(keys.run(app.name, old.id)) for old in earlier[: max(0, len(earlier) - KEPT_RUNS)]),
    ]


async def list_releases(kv: KV, app: str) -> tuple[Release, ...]:
    """An app's releases, oldest first."""
    listing = await kv.list(f"{keys.RELEASES}{app}/")
    return tuple(decode(item.value, Release) for item in listing.items)


async def list_runs(kv: KV, app: str) -> tuple[DeployRun, ...]:
    """An app's deploy runs, oldest first."""
    listing = await kv.list(f"{keys.RUNS}{app}/")
    return tuple(decode(item.value, DeployRun) for item in listing.items)


def _refuse_second(app: str, runs: tuple[DeployRun, ...]) -> None:
    """Raise if a run of the app is open."""
    for run in runs:
        if run.state is RunState.RUNNING:
            who = run.requested_by or "somebody"
            raise Conflict(
                f"app {app} is being deployed: version {run.version}, begun by {who} "
                f"at {_clock_time(run.created_at_s)} UTC, now {run.doing or run.phase}",
                hint=f"Watch it: fly releases -a {app}. It ends by itself, complete or undone.",
            )


def _clock_time(at_s: float) -> str:
    seconds = int(at_s) % 86_400
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _regions(app: App, config: AppConfig, asked: tuple[str, ...]) -> tuple[str, ...]:
    """Where the machines go: as asked, else as the app has it, else as fly.toml says; primary first."""
    if app.kind is AppKind.POSTGRES:
        raise Refused(
            f"app {app.name} is a Postgres cluster and takes no releases",
            hint="Deploy an application and attach the cluster to it: fly postgres attach.",
        )
    if asked:
        return tuple(dict.fromkeys(asked))
    regions = tuple(dict.fromkeys(app.regions or config.regions))
    if not regions:
        raise InvalidInput(
            f"app {app.name} has no region to run in",
            hint="Set primary_region in fly.toml, or deploy with --regions ams,iad.",
        )
    if config.primary_region not in regions:
        return regions
    return (config.primary_region, *(r for r in regions if r != config.primary_region))
