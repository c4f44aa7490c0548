"""Keeps this host's edge as the cluster's state says. A thin loop.

On each change of the mirror it builds the view, decides the configuration
(flyd/edge/routes.py) and publishes it if it differs. Bursts are published at most every
COALESCE_S, but a change of a Postgres leader goes out at once, whenever it comes. Run in
flyd/daemon.py's TaskGroup. While etcd cannot be reached the mirror stays as it was, and so
does the edge.
"""

from __future__ import annotations

import asyncio

from flyd.edge.resources import EdgeConfig
from flyd.edge.routes import EdgeView, edge_config
from flyd.edge.xds import AdsServer
from flyd.model import App, AppKind, Host, Machine, MachineStatus, PostgresLeader, PostgresMember
from flyd.store import keys
from flyd.store.mirror import Mirror

COALESCE_S = 0.02
PREFIXES = (keys.APPS, keys.MACHINES, keys.STATUS, keys.PG)
"""What the mirror must hold for `keep_edge`."""


async def keep_edge(host: Host, mirror: Mirror, ads: AdsServer) -> None:
    """Publish what `host`'s edge is to serve, for ever."""
    await mirror.wait_synced()
    published: EdgeConfig | None = None
    seen = 0
    while True:
        seen = await mirror.wait_change(seen)
        view = edge_view(host, mirror)
        config = edge_config(view)
        if config != published:
            ads.publish(config)
            published = config
        try:
            async with asyncio.timeout(COALESCE_S):
                await _wait_leader_change(mirror, view, seen)
        except TimeoutError:
            continue


def edge_view(host: Host, mirror: Mirror) -> EdgeView:
    """What the edge depends on, as of the mirror's revision."""
    apps = tuple(v.value for v in mirror.list(keys.APPS, App))
    return EdgeView(
        host=host,
        apps=apps,
        machines=tuple(v.value for v in mirror.list(keys.MACHINES, Machine)),
        statuses={v.value.id: v.value for v in mirror.list(keys.STATUS, MachineStatus)},
        leaders=_leaders(mirror, apps),
        members={name: _members(mirror, name) for name in _clusters(apps)},
    )


def _clusters(apps: tuple[App, ...]) -> list[str]:
    return [app.name for app in apps if app.kind is AppKind.POSTGRES]


def _members(mirror: Mirror, cluster: str) -> tuple[PostgresMember, ...]:
    return tuple(v.value for v in mirror.list(keys.postgres_members(cluster), PostgresMember))


def _leaders(mirror: Mirror, apps: tuple[App, ...]) -> dict[str, PostgresLeader]:
    found = ((name, mirror.get(keys.postgres_leader(name), PostgresLeader)) for name in _clusters(apps))
    return {name: leader.value for name, leader in found if leader is not None}


async def _wait_leader_change(mirror: Mirror, view: EdgeView, seen: int) -> None:
    while _leaders(mirror, view.apps) == view.leaders:
        seen = await mirror.wait_change(seen)
