"""How a deploy begins: the next release and its run, in one transaction, or a refusal.

Invariants: versions of an app grow by one; an app has at most one open run; an edge port has
one owner. All hold by one transaction that creates release `n` only if it is absent and
compares the claims of its ports: two callers who saw the same newest version, or the same
free port, can not both succeed, and a caller who sees an open run is refused.

`start_deploy` is called by the API; the elected deployer takes it from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from flyd.deploy.appconfig import AppConfig
from flyd.deploy.mounts import refuse_lost_data
from flyd.deploy.ports import claims_of, tcp_ports
from flyd.deploy.releases import DeployRun, Release, ReleaseStatus, RunState, list_releases, list_runs
from flyd.errors import Conflict, InvalidInput, NotFound, OutcomeUnknown, Refused
from flyd.model import App, AppKind, Machine, decode, encode
from flyd.placement.volumes import list_volumes
from flyd.ports import KV, Clock, Delete, Entropy, Put, Unchanged
from flyd.store import keys

KEPT_RUNS = 20
"""Ended runs of an app that are kept; older ones go when a new one begins."""

START_ATTEMPTS = 8
"""Tries before a deploy that keeps losing to others is refused."""


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

    Raises Conflict with who and when if another deploy of the app is under way, and with the owner
    of a port that another app has; Refused where it would leave the app's data behind.
    """
    token = entropy.token(4)
    now_s = clock.wall_s()
    asked = DeployRun(
        id=token,
        app=app,
        version=0,
        regions=tuple(regions),
        requested_by=requested_by,
        created_at_s=now_s,
        updated_at_s=now_s,
    )
    wanted = Release(
        version=0, app=app, image=image, config=config, description=description, created_at_s=now_s
    )
    ports = tcp_ports(config)
    for _ in range(START_ATTEMPTS):
        record = await kv.get(keys.app(app))
        if record is None:
            raise NotFound(f"no app is called {app!r}", hint="`fly apps create` makes one.")
        application = decode(record.value, App)
        releases, runs = await list_releases(kv, app), await list_runs(kv, app)
        mine = next((r for r in runs if r.id.endswith(token)), None)
        if mine is not None:
            return mine  # the answer of an attempt got lost
        refuse_second(app, runs)
        run, release = _numbered(asked, wanted, application, releases)
        machines = [decode(i.value, Machine) for i in (await kv.list(f"{keys.MACHINES}{app}/")).items]
        refuse_lost_data(run, release, machines, await list_volumes(kv, app))
        held, claims = claims_of(app, ports, (await kv.list(keys.PORTS)).items)
        compares = [
            Unchanged(keys.release(app, run.version), 0),
            Unchanged(record.key, record.mod_revision),
            *held,
        ]
        effects = [*_records(application, release, run, runs), *claims]
        try:
            if (await kv.txn(compares, effects)).succeeded:
                return run
        except OutcomeUnknown:
            continue
    raise Conflict(f"the deploy of app {app} was not begun: others kept changing the app", hint="Try again.")


def _numbered(
    asked: DeployRun, wanted: Release, app: App, releases: Sequence[Release]
) -> tuple[DeployRun, Release]:
    """The run and the release that were asked for, as the next of the app."""
    version = releases[-1].version + 1 if releases else 1
    complete = [r.version for r in releases if r.status is ReleaseStatus.COMPLETE]
    run = msgspec.structs.replace(
        asked,
        id=f"{version:08d}-{asked.id}",
        version=version,
        regions=_regions(app, wanted.config, asked.regions),
        previous_regions=app.regions,
        counts=app.counts,
        previous_version=complete[-1] if complete else 0,
    )
    return run, msgspec.structs.replace(wanted, version=version, run_id=run.id)


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


def refuse_second(app: str, runs: tuple[DeployRun, ...]) -> None:
    """Raise if a run of the app is open; scale.py asks too."""
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
