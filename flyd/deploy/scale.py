"""Brings a process group to a number of machines, without a deploy.

Owns the steps of a scale. Each is one transaction decided on a fresh reading, and each leaves the app
whole: new machines come with the count that has them; machines to be destroyed are first taken out of
routing with the count that has them no longer. Whoever asks again after a crash, or after somebody
else has changed something, gets the rest done. Invariants: never below the count, also if machines are
destroyed by others meanwhile (the removing transactions compare what is to stay); only machines that
the caller has named are destroyed; nothing is scaled while a deploy is under way. Volumes stay.

Called by the API. What changes is counts.py, where new machines go is the placer's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from flyd.deploy import counts
from flyd.deploy.appconfig import machine_config, process_groups
from flyd.deploy.counts import Change
from flyd.deploy.releases import Release, ReleaseStatus, list_releases, list_runs
from flyd.deploy.requests import refuse_second
from flyd.deploy.rollout import DRAIN_S
from flyd.errors import Conflict, InvalidInput, NotFound, Refused
from flyd.machines import leases
from flyd.model import App, AppKind, Desired, Machine, Value, decode, encode
from flyd.placement.placer import Placer
from flyd.placement.scheduler import Order
from flyd.ports import KV, Put, Unchanged
from flyd.store import keys

MAX_STEP = 30
"""New machines in one transaction."""

MAX_COMPARED = 100
"""Claims that a removing transaction compares; of more, the newest."""

MAX_TAKEN = 25
"""Machines taken out of routing or destroyed in one transaction, which compares each one's lease, too."""

ATTEMPTS = 16
"""Steps that may fail because of others before a scale is given up."""


class Wish(Value, frozen=True, kw_only=True):
    """What somebody wants. `regions` empty: where the group is; `group` empty: the app's first."""

    app: str
    count: int
    group: str = ""
    regions: tuple[str, ...] = ()


class Scale(Value, frozen=True, kw_only=True):
    """A wish against what there is. `revisions`: of the records it was made from, by key."""

    app: App
    release: Release
    group: str
    changes: tuple[Change, ...]
    revisions: dict[str, int]

    @property
    def served(self) -> list[str]:
        """The app's groups with services."""
        config = self.release.config
        return [group for group in process_groups(config) if config.groups[group].services]

    def orders(self, change: Change) -> list[Order]:
        """The machines that the change adds; their ids are made anew by each transaction."""
        config = machine_config(self.release.config, self.group, self.release.image)
        order = Order(app=self.app.name, config=config, region=change.region, release=self.release.version)
        return [order] * change.add

    def unchanged(self, *machines: Machine) -> list[Unchanged]:
        """The compares that the app and these machines are as they were read."""
        compared = [keys.machine(m.app, m.id) for m in machines[-MAX_COMPARED:]]
        return [Unchanged(key, self.revisions[key]) for key in (keys.app(self.app.name), *compared)]

    def counted(self, change: Change, number: int) -> Put:
        """The app's record with so many machines in the change's region."""
        app = counts.recorded(self.app, self.group, {change.region: number}, self.served)
        return Put(keys.app(app.name), encode(app))

    def said(self, change: Change) -> bool:
        """Whether the app's record has the change's number already."""
        return self.app.counts.get(self.group, {}).get(change.region) == change.want


async def plan_scale(kv: KV, wish: Wish) -> Scale:
    """What the wish changes, as etcd stands now; refused while a deploy is under way."""
    record = await kv.get(keys.app(wish.app))
    if record is None:
        raise NotFound(f"no app is called {wish.app!r}", hint="`fly apps create` makes one.")
    app = decode(record.value, App)
    if app.kind is AppKind.POSTGRES:
        raise Refused(
            f"app {app.name} is a Postgres cluster: its members are voters, and change one by one",
            hint=f"fly postgres members add --region REGION -a {app.name}, or members remove",
        )
    refuse_second(app.name, await list_runs(kv, app.name))
    release, group = await current_group(kv, app.name, wish.group)
    items = (await kv.list(f"{keys.MACHINES}{app.name}/")).items
    machines = [decode(item.value, Machine) for item in items]
    revisions = {item.key: item.mod_revision for item in (record, *items)}
    target = _target(wish, app, group, machines, everywhere=bool(release.config.groups[group].services))
    changes = counts.changes(machines, group, target)
    return Scale(app=app, release=release, group=group, changes=changes, revisions=revisions)


async def current_group(kv: KV, app: str, group: str) -> tuple[Release, str]:
    """The release that machines are made of now, and one of its groups: the first, if none is named."""
    complete = [r for r in await list_releases(kv, app) if r.status is ReleaseStatus.COMPLETE]
    if not complete:
        raise Refused(
            f"app {app} has no complete release to make machines of", hint="Deploy it first: fly deploy"
        )
    release = complete[-1]
    names = process_groups(release.config)
    if group and group not in names:
        raise NotFound(
            f"release {release.version} of app {app} has no process group {group!r}",
            hint=f"Its groups: {', '.join(names)}.",
        )
    return release, group or names[0]


def _target(
    wish: Wish, app: App, group: str, machines: Sequence[Machine], *, everywhere: bool
) -> dict[str, int]:
    """How many machines each region is to have."""
    there = {m.region for m in machines if counts.members([m], group, m.region)}
    usual = app.regions if everywhere else app.regions[:1]
    regions = wish.regions or tuple(r for r in app.regions if r in there) or usual
    if not wish.regions:
        regions = (*regions, *sorted(there - frozenset(regions)))
    if not 0 <= wish.count <= counts.MAX_COUNT:
        raise InvalidInput(f"{wish.count} machines: it must be 0 to {counts.MAX_COUNT}")
    if not regions:
        raise InvalidInput(f"app {app.name} has no region to run in", hint="Name one: --region ams")
    have = {region: len(counts.members(machines, group, region)) for region in regions}
    return counts.spread(wish.count, tuple(dict.fromkeys(regions)), have)


async def scale(kv: KV, placer: Placer, wish: Wish, destroyable: Sequence[str]) -> Scale:
    """Do it; the end as it was read, with nothing left to change.

    Raises Unplaceable before anything is changed if not all new machines have a place, Conflict if a
    machine would be destroyed that is not named in `destroyable`.
    """
    lost = 0
    began = False
    while True:
        now = await plan_scale(kv, wish)
        _refuse_unnamed(now, destroyable)
        if not began:
            await placer.preview([order for change in now.changes for order in now.orders(change)])
            began = True
            wish = msgspec.structs.replace(wish, regions=tuple(change.region for change in now.changes))
        try:
            if not await _step(kv, placer, now):
                return now
        except Conflict:
            lost += 1
            if lost == ATTEMPTS:
                raise


async def _step(kv: KV, placer: Placer, now: Scale) -> bool:
    """One transaction; False: there is nothing left to do. First all that is new, then what goes."""
    for change in now.changes:
        orders = now.orders(change)[:MAX_STEP]
        if orders:
            count = now.counted(change, len(change.keep) + len(orders))
            await placer.place_all(orders, guards=now.unchanged(), effects=[count])
            return True
    for change in now.changes:
        routed = [m for m in change.remove if not m.cordoned]
        if routed:
            taken = routed[:MAX_TAKEN]
            puts = [_put(msgspec.structs.replace(m, cordoned=True)) for m in taken]
            await _commit(kv, now, change, [now.counted(change, change.want), *puts], taken)
            await asyncio.sleep(DRAIN_S if any(m.config.services for m in routed) else 0.0)
            return True
        if change.remove:
            taken = change.remove[:MAX_TAKEN]
            puts = [_put(msgspec.structs.replace(m, desired=Desired.DESTROYED)) for m in taken]
            await _commit(kv, now, change, [now.counted(change, change.want), *puts], taken)
            return True
        if not now.said(change):
            await _commit(kv, now, change, [now.counted(change, change.want)])
            return True
    return False


async def _commit(
    kv: KV, now: Scale, change: Change, effects: list[Put], taken: Sequence[Machine] = ()
) -> None:
    """Only if all that stays and all that goes is as it was read, and nobody holds what is `taken`."""
    guards = now.unchanged(*change.keep, *change.remove)
    guards += [await leases.guard(kv, now.app.name, machine.id, "") for machine in taken]
    if not (await kv.txn(guards, effects)).succeeded:
        raise Conflict(f"app {now.app.name} was changed by others while it was being scaled")


def _put(machine: Machine) -> Put:
    return Put(keys.machine(machine.app, machine.id), encode(machine))


def _refuse_unnamed(now: Scale, destroyable: Sequence[str]) -> None:
    unnamed = [m.id for change in now.changes for m in change.remove if m.id not in destroyable]
    if unnamed:
        raise Conflict(
            f"scaling app {now.app.name} would destroy machines that nobody has agreed to: "
            f"{', '.join(unnamed)}",
            hint="They may have come meanwhile. Look again: fly scale count ... --dry-run",
        )
