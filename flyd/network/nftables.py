"""Keeps the kernel's firewall as flyd/network/firewall.py says.

Owns `Nftables`, the adapter (two tables named `flyd`, and the chain FLYD where Docker's iptables
rules are), and `keep_firewall`, the thin loop that applies the rules when they change, and again when
somebody removed them (`nft flush ruleset`): the kernel reports that, nothing is polled.

Invariants: tables are replaced in one transaction, so there is no moment without isolation; no
table or chain of others is changed, but for one jump out of DOCKER-USER. Run `keep_firewall` in
flyd/daemon.py's TaskGroup, before machines start. Ending it leaves the rules in force.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

import structlog

from flyd.errors import Unavailable
from flyd.model import App, Host, Machine
from flyd.network.commands import lines, run
from flyd.network.expelled import read_memberships
from flyd.network.firewall import (
    DOCKER_CHAIN,
    TABLE,
    FirewallView,
    docker_chain,
    docker_chain6,
    firewall_view,
    rules,
)
from flyd.store import keys
from flyd.store.mirror import Mirror

log = structlog.get_logger(__name__)

PREFIXES = (keys.HOSTS, keys.MEMBERSHIPS, keys.APPS, keys.MACHINES)
"""What the mirror must hold for `keep_firewall`."""

COALESCE_S = 0.05
RETRY_MIN_S = 0.5
RETRY_MAX_S = 5.0
DOCKER_USER = "DOCKER-USER"
IPTABLES = ("iptables", "ip6tables")


class Firewall(Protocol):
    """Where rules are put in force."""

    async def apply(self, view: FirewallView) -> None:
        """Put the view's rules in force, all at once."""
        ...

    async def intact(self) -> bool:
        """Whether what was applied last is still there."""
        ...

    def events(self) -> AsyncIterator[None]:
        """Ticks whenever rules come or go."""
        ...


class Nftables:
    """The kernel's firewall, for a mesh on `interface` and a DNS on `dns_port`."""

    def __init__(self, interface: str, dns_port: int) -> None:
        self._interface = interface
        self._dns_port = dns_port

    async def apply(self, view: FirewallView) -> None:
        """Put the view's rules in force. Machines' traffic passes Docker's rules where there are any."""
        await run("nft", "-f", "-", stdin=rules(view, self._interface, self._dns_port))
        for iptables, chain in (("iptables", docker_chain(view)), ("ip6tables", docker_chain6(view))):
            if not await self._docker_filters(iptables):
                continue
            await run(f"{iptables}-restore", "--wait", "--noflush", stdin=chain)
            if not await self._succeeds(iptables, "--wait", "-C", DOCKER_USER, "-j", DOCKER_CHAIN):
                await run(iptables, "--wait", "-I", DOCKER_USER, "-j", DOCKER_CHAIN)

    async def intact(self) -> bool:
        """Whether our tables and our jump out of Docker's chain are there."""
        for family in ("inet", "bridge"):
            if not await self._succeeds("nft", "list", "chain", family, TABLE, "isolate"):
                return False
        for iptables in IPTABLES:
            jump = (iptables, "--wait", "-C", DOCKER_USER, "-j", DOCKER_CHAIN)
            if await self._docker_filters(iptables) and not await self._succeeds(*jump):
                return False
        return True

    async def events(self) -> AsyncIterator[None]:
        """A chain came or went: ours may be gone, or Docker's just be there."""
        async for _ in lines("nft", "monitor", "chains"):
            yield

    async def remove(self) -> None:
        """Take all our rules away: for a host that leaves the cluster."""
        for family in ("inet", "bridge"):
            await run("nft", "-f", "-", stdin=f"table {family} {TABLE}\ndelete table {family} {TABLE}\n")
        for iptables in IPTABLES:
            if await self._docker_filters(iptables):
                await run(iptables, "--wait", "-D", DOCKER_USER, "-j", DOCKER_CHAIN)
                await run(iptables, "--wait", "-F", DOCKER_CHAIN)
                await run(iptables, "--wait", "-X", DOCKER_CHAIN)

    async def _docker_filters(self, iptables: str) -> bool:
        """Whether Docker keeps rules there."""
        return await self._succeeds(iptables, "--wait", "-n", "-L", DOCKER_USER)

    async def _succeeds(self, *command: str) -> bool:
        try:
            await run(*command)
        except Unavailable:
            return False
        return True


async def keep_firewall(host: Host, mirror: Mirror, firewall: Firewall) -> None:
    """Keep the rules of `host` in force, for ever."""
    await mirror.wait_synced()
    wake, suspect = asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(_watch_state(mirror, wake), name="firewall state")
        group.create_task(_watch_rules(firewall, wake, suspect), name="firewall rules")
        applied: FirewallView | None = None
        retry_s = RETRY_MIN_S
        while True:
            wake.clear()
            view = read_firewall(host, mirror)
            try:
                if view != applied or (suspect.is_set() and not await firewall.intact()):
                    await firewall.apply(view)
                    applied = view
                    log.info("firewall.applied", host=host.name, networks=len(view.networks))
                suspect.clear()
                retry_s = RETRY_MIN_S
                await wake.wait()
                await asyncio.sleep(COALESCE_S)
            except Unavailable as error:
                applied = None
                log.error("firewall.not_applied", host=host.name, error=error.message, again_in_s=retry_s)
                await asyncio.sleep(retry_s)
                retry_s = min(retry_s * 2, RETRY_MAX_S)


def read_firewall(host: Host, mirror: Mirror) -> FirewallView:
    """What the rules of `host` depend on, as of the mirror's revision."""
    return firewall_view(
        host,
        hosts=[v.value for v in mirror.list(keys.HOSTS, Host)],
        apps=[v.value for v in mirror.list(keys.APPS, App)],
        machines=[v.value for v in mirror.list(keys.MACHINES, Machine)],
        memberships=read_memberships(mirror),
    )


async def _watch_state(mirror: Mirror, wake: asyncio.Event) -> None:
    """Wake on every change; the loop compares views."""
    seen = 0  # not the version now: the loop may have looked before it
    while True:
        seen = await mirror.wait_change(seen)
        wake.set()


async def _watch_rules(firewall: Firewall, wake: asyncio.Event, suspect: asyncio.Event) -> None:
    retry_s = RETRY_MIN_S
    while True:
        try:
            async for _ in firewall.events():
                suspect.set()
                wake.set()
                retry_s = RETRY_MIN_S
        except Unavailable as error:
            log.warning("firewall.events_ended", error=error.message, again_in_s=retry_s)
        await asyncio.sleep(retry_s)
        retry_s = min(retry_s * 2, RETRY_MAX_S)
        suspect.set()  # what happened meanwhile was not heard
        wake.set()
