"""Keeps this host's way to the machines of all others as the cluster's state says. A thin loop.

Wakes on a change of the known hosts and on each change that the kernel reports of links, addresses
and routes, so that what a cut or a clumsy hand took away comes back at once; nothing is polled.
While etcd is away the hosts stay as they were last known. Run in flyd/daemon.py's TaskGroup.
Ending it takes nothing away: traffic goes on without flyd.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Protocol

import structlog

from flyd.errors import Unavailable
from flyd.model import Host
from flyd.network.expelled import expelled_hosts, read_memberships
from flyd.network.mesh_plan import MeshChanges, MeshMode, MeshPlan, MeshState, Route, changes, mesh_plan
from flyd.store import keys
from flyd.store.mirror import Mirror

log = structlog.get_logger(__name__)

PREFIXES = (keys.HOSTS, keys.MEMBERSHIPS)
"""What the mirror must hold for `keep_mesh`."""

COALESCE_S = 0.1  # one cut is reported in many lines
RETRY_MIN_S = 0.5
RETRY_MAX_S = 5.0
USUAL_MTU = 1500


class MeshLink(Protocol):
    """This host's end of the mesh: flyd/network/wireguard.py."""

    async def state(self) -> MeshState:
        """What is there now."""
        ...

    async def apply(self, changes: MeshChanges) -> None:
        """Carry the changes out as far as possible; `Unavailable` names what could not be done."""
        ...

    async def underlay_mtu(self, endpoints: Iterable[str]) -> int:
        """The smallest MTU on the way to the endpoints, 0 if that can not be told."""
        ...

    def greet(self, routes: Iterable[Route]) -> None:
        """Send a packet each way, so that the other end learns at once how we are reached now."""
        ...

    def events(self) -> AsyncIterator[None]:
        """Ticks whenever links, addresses or routes change; `Unavailable` when it can not listen on."""
        ...


async def keep_mesh(host: Host, mirror: Mirror, link: MeshLink, mode: MeshMode) -> None:
    """Keep `host` (with its public key and endpoint) connected to all others, for ever."""
    await mirror.wait_synced()
    wake = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(_watch_hosts(host, mirror, wake), name="mesh hosts")
        group.create_task(_watch_link(link, wake), name="mesh link")
        await _keep_applied(host, mirror, link, mode, wake)


async def _keep_applied(
    host: Host, mirror: Mirror, link: MeshLink, mode: MeshMode, wake: asyncio.Event
) -> None:
    mtu = USUAL_MTU
    left_out: dict[str, str] = {}
    retry_s = RETRY_MIN_S
    while True:
        wake.clear()
        hosts, expelled = _known(host, mirror)
        try:
            mtu = await link.underlay_mtu(_endpoints(host, hosts)) or mtu
            plan = mesh_plan(host, hosts, mode, mtu, expelled)
            if plan.left_out != left_out:
                left_out = plan.left_out
                log.warning("mesh.hosts_left_out", host=host.name, reasons=left_out)
            await _apply(host, link, plan)
            link.greet(plan.routes)
        except Unavailable as error:
            if retry_s == RETRY_MIN_S:
                log.warning("mesh.incomplete", host=host.name, error=error.message)
            await _wait_or(wake, retry_s)
            retry_s = min(retry_s * 2, RETRY_MAX_S)
        else:
            retry_s = RETRY_MIN_S
            await wake.wait()
        await asyncio.sleep(COALESCE_S)


async def _apply(host: Host, link: MeshLink, plan: MeshPlan) -> None:
    todo = changes(plan, await link.state())
    if not todo:
        return
    await link.apply(todo)
    log.info(
        "mesh.changed",
        host=host.name,
        created=todo.create,
        peers_set=len(todo.set_peers),
        peers_removed=len(todo.remove_peers),
        routes_set=len(todo.set_routes),
        routes_removed=len(todo.remove_routes),
        mtu=plan.mtu,
    )


def _known(host: Host, mirror: Mirror) -> tuple[list[Host], tuple[str, ...]]:
    """All hosts, and the names of those that were expelled."""
    hosts = [v.value for v in mirror.list(keys.HOSTS, Host)]
    return hosts, expelled_hosts(host.name, read_memberships(mirror))


def _endpoints(host: Host, hosts: list[Host]) -> list[str]:
    return [h.wg_endpoint for h in hosts if h.wg_endpoint and h.name != host.name]


async def _watch_hosts(host: Host, mirror: Mirror, wake: asyncio.Event) -> None:
    """Other keys of the mirror change all the time; only hosts matter here."""
    seen = 0  # not the version now: the loop may have looked before it
    known: tuple[list[Host], tuple[str, ...]] = ([], ())
    while True:
        seen = await mirror.wait_change(seen)
        now = _known(host, mirror)
        if now != known:
            known = now
            wake.set()


async def _watch_link(link: MeshLink, wake: asyncio.Event) -> None:
    retry_s = RETRY_MIN_S
    while True:
        try:
            async for _ in link.events():
                wake.set()
                retry_s = RETRY_MIN_S
        except Unavailable as error:
            log.warning("mesh.events_ended", error=error.message, again_in_s=retry_s)
        await asyncio.sleep(retry_s)
        retry_s = min(retry_s * 2, RETRY_MAX_S)
        wake.set()  # what happened meanwhile was not heard


async def _wait_or(wake: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await wake.wait()
    except TimeoutError:
        return
