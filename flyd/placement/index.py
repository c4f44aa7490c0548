"""The cluster as placement sees it, indexed: one decision looks at a few hosts, not at all of them.

Owns `Snapshot`. It is changed one record at a time, so that following etcd costs what changed
and not what there is. Invariant: what it answers follows from the records in it alone,
whatever the order in which they came (tests/unit/placement/test_index.py).

Filled from etcd by snapshot.py, read by scheduler.py. Pure: it knows no store and no clock.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

from flyd.model import Desired, Host, Machine, Reservations, Resources, Volume

K = TypeVar("K")

Group = tuple[str, str]
"""An application's process group: the machines that are kept apart."""


class Spread:
    """Where the machines of one process group are; those that are to be destroyed do not count."""

    def __init__(self) -> None:
        self.on_host: dict[str, int] = {}  # hosts with at least one, whatever their state
        self.in_region: dict[str, int] = {}  # on living hosts
        self.open: dict[str, dict[int, dict[str, None]]] = {}  # region -> machines -> open hosts with so many

    def copy(self) -> Spread:
        """Another one, with the same machines."""
        copied = Spread()
        copied.on_host = dict(self.on_host)
        copied.in_region = dict(self.in_region)
        copied.open = {r: {n: dict(hosts) for n, hosts in by.items()} for r, by in self.open.items()}
        return copied

    def count(self, host: str, by: int) -> tuple[int, int]:
        """Add machines on a host; how many there were and are."""
        before = self.on_host.get(host, 0)
        _set_or_drop(self.on_host, host, before + by)
        return before, before + by

    def reopen(self, region: str, host: str, before: int, after: int) -> None:
        """Keep `open` true for an open host whose count has changed."""
        levels = self.open.setdefault(region, {})
        if before:
            del levels[before][host]
            if not levels[before]:
                del levels[before]
        if after:
            levels.setdefault(after, {})[host] = None


class Snapshot:
    """Hosts, what is promised on them, volumes and machines. A host is open if it lives and is uncordoned."""

    def __init__(
        self,
        *,
        hosts: Iterable[Host] = (),
        alive: Iterable[str] = (),
        reservations: Mapping[str, Reservations] | None = None,
        volumes: Iterable[Volume] = (),
        machines: Iterable[Machine] = (),
    ) -> None:
        self.alive: dict[str, None] = {}  # names of hosts that hold their lease
        self.reservations: dict[str, Reservations] = {}  # by host; absent: nothing promised yet
        self.free: dict[str, Resources] = {}  # what is left of each host
        self.roomy: dict[str, list[tuple[int, str]]] = {}  # region -> (-free memory, open host), sorted
        self._hosts: dict[str, Host] = {}
        self._machines: dict[str, Machine] = {}  # by id
        self._volumes: dict[str, dict[str, Volume]] = {}  # app -> id -> volume
        self._sorted_volumes: dict[str, tuple[Volume, ...]] = {}  # app -> by id, until one changes
        self._spreads: dict[Group, Spread] = {}
        self._groups_on: dict[str, dict[Group, int]] = {}  # the same counts, by host
        for host in hosts:
            self.put_host(host)
        for name in alive:
            self.set_alive(name, True)
        for promised in (reservations or {}).values():
            self.put_reservations(promised)
        for volume in volumes:
            self.put_volume(volume)
        for machine in machines:
            self.put_machine(machine)

    # ------------------------------------------------------------------ what is asked

    @property
    def hosts(self) -> Collection[Host]:
        """All that ever joined, alive or not."""
        return self._hosts.values()

    @property
    def machines(self) -> Collection[Machine]:
        """All, also those that are to be destroyed."""
        return self._machines.values()

    @property
    def volumes(self) -> Collection[Volume]:
        """All, attached or not."""
        return [volume for of_app in self._volumes.values() for volume in of_app.values()]

    def host(self, name: str) -> Host | None:
        """A host, alive or not."""
        return self._hosts.get(name)

    def machine(self, machine_id: str) -> Machine | None:
        """A machine's claim."""
        return self._machines.get(machine_id)

    def is_open(self, name: str) -> bool:
        """Whether the host takes machines at all."""
        host = self._hosts.get(name)
        return host is not None and not host.cordoned and name in self.alive

    def volumes_of(self, app: str) -> tuple[Volume, ...]:
        """The app's volumes, by id."""
        found = self._sorted_volumes.get(app)
        if found is None and app in self._volumes:  # of others nothing is kept: anybody may ask for any name
            found = tuple(sorted(self._volumes[app].values(), key=lambda v: v.id))
            self._sorted_volumes[app] = found
        return found or ()

    def volume(self, app: str, volume_id: str) -> Volume | None:
        """One of the app's volumes."""
        return self._volumes.get(app, {}).get(volume_id)

    def spread(self, app: str, group: str, *, without: str = "") -> Spread:
        """Where the group's machines are, one machine left out if it is among them. To be read only."""
        spread = self._spreads.get((app, group), _NOWHERE)
        machine = self._machines.get(without)
        if machine is None or _group(machine) != (app, group) or not _counts(machine):
            return spread
        lesser = spread.copy()
        self._count_in(lesser, machine.host, -1)
        return lesser

    # ------------------------------------------------------------------ what has changed

    def put_host(self, host: Host) -> None:
        """A host has joined, or described itself anew."""
        groups = self._withdraw(host.name)
        self._hosts[host.name] = host
        self._admit(host.name, groups)

    def drop_host(self, name: str) -> None:
        """A host has been removed."""
        groups = self._withdraw(name)
        self._hosts.pop(name, None)
        self._admit(name, groups)

    def set_alive(self, name: str, alive: bool) -> None:
        """A host's sign of life has come or gone."""
        groups = self._withdraw(name)
        if alive:
            self.alive[name] = None
        else:
            self.alive.pop(name, None)
        self._admit(name, groups)

    def put_reservations(self, promised: Reservations) -> None:
        """What is promised on a host; an empty record: nothing any more."""
        self._unlist(promised.host)
        self.reservations[promised.host] = promised
        self._list(promised.host)

    def put_volume(self, volume: Volume) -> None:
        """A volume has been created or changed."""
        self._volumes.setdefault(volume.app, {})[volume.id] = volume
        self._sorted_volumes.pop(volume.app, None)

    def drop_volume(self, app: str, volume_id: str) -> None:
        """A volume is gone."""
        of_app = self._volumes.get(app, {})
        of_app.pop(volume_id, None)
        if not of_app:
            self._volumes.pop(app, None)
        self._sorted_volumes.pop(app, None)

    def put_machine(self, machine: Machine) -> None:
        """A machine has been placed or changed."""
        self.drop_machine(machine.id)
        self._machines[machine.id] = machine
        if _counts(machine):
            self._count(_group(machine), machine.host, 1)

    def drop_machine(self, machine_id: str) -> None:
        """A machine is gone."""
        machine = self._machines.pop(machine_id, None)
        if machine is not None and _counts(machine):
            self._count(_group(machine), machine.host, -1)

    # ------------------------------------------------------------------ the index

    def _withdraw(self, name: str) -> dict[Group, int]:
        """Take a host that is about to change out of the index; what must be counted again."""
        self._unlist(name)
        groups = dict(self._groups_on.get(name, {}))
        for group, number in groups.items():
            self._count(group, name, -number)
        return groups

    def _admit(self, name: str, groups: Mapping[Group, int]) -> None:
        self._list(name)
        for group, number in groups.items():
            self._count(group, name, number)

    def _unlist(self, name: str) -> None:
        free = self.free.pop(name, None)
        if free is not None and self.is_open(name):
            roomy = self.roomy[self._hosts[name].region]
            del roomy[bisect_left(roomy, (-free.memory_mb, name))]
            if not roomy:
                del self.roomy[self._hosts[name].region]

    def _list(self, name: str) -> None:
        host = self._hosts.get(name)
        if host is None:
            return
        self.free[name] = free = free_capacity(host, self.reservations.get(name))
        if self.is_open(name):
            insort(self.roomy.setdefault(host.region, []), (-free.memory_mb, name))

    def _count(self, group: Group, host: str, by: int) -> None:
        spread = self._spreads.setdefault(group, Spread())
        after = self._count_in(spread, host, by)
        if not spread.on_host:
            del self._spreads[group]
        _set_or_drop(self._groups_on.setdefault(host, {}), group, after)

    def _count_in(self, spread: Spread, name: str, by: int) -> int:
        before, after = spread.count(name, by)
        host = self._hosts.get(name)
        if host is not None and name in self.alive:
            _set_or_drop(spread.in_region, host.region, spread.in_region.get(host.region, 0) + by)
            if not host.cordoned:
                spread.reopen(host.region, name, before, after)
        return after


def free_capacity(host: Host, promised: Reservations | None) -> Resources:
    """What is left of a host after all that is promised on it."""
    machines = promised.machines.values() if promised else ()
    volumes_gb = promised.volumes_gb.values() if promised else ()
    return Resources(
        cpus=host.capacity.cpus - sum(r.cpus for r in machines),
        memory_mb=host.capacity.memory_mb - sum(r.memory_mb for r in machines),
        disk_gb=host.capacity.disk_gb - sum(volumes_gb),
    )


_NOWHERE = Spread()


def _group(machine: Machine) -> Group:
    return machine.app, machine.config.process_group


def _counts(machine: Machine) -> bool:
    return machine.desired is not Desired.DESTROYED


def _set_or_drop(counts: dict[K, int], key: K, number: int) -> None:
    if number:
        counts[key] = number
    else:
        counts.pop(key, None)
