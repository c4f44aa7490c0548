"""Every mount of a volume, from when to when; and that no volume ever has two, nor a stale one.

Owns `Mounts`, told of every change of etcd and of hardware. A mount is a process that runs with a volume,
whatever anybody's records say. While it lasts the process writes to the volume. Violations:

- two mounts: one volume is mounted twice at one instant, on whatever hosts. Checked as it happens, and again
  over all recorded intervals at the end of a run.
- moved while mounted: a volume goes on elsewhere by a move, and the old one is still mounted.
- early: a flyd that began after its machine had lost a volume mounts that for it.
- stale mount: a machine that has lost its volume keeps it mounted for FENCED_WITHIN_S although its host's
  flyd can see etcd.
- lost: a volume that was moved does not hold all that was written to the old one; one that was brought
  back from a copy holds what was never written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from flyd.model import Event, Volume, decode
from flyd.ports import Change
from flyd.storage.recovery import VOLUME_MOVED, VOLUME_RECOVERED
from flyd.store import keys
from tests.simulation.copies import FENCED_WITHIN_S
from tests.simulation.driver import Hardware
from tests.simulation.ledger import Violation
from tests.simulation.loop import current
from tests.simulation.network import Store

POLL_S = 1.0


class Mount(msgspec.Struct):
    """One process with one volume; `ended_s` 0: it runs."""

    volume: str
    machine: str
    host: str
    pid: int
    began_s: float
    ended_s: float = 0.0


class Mounts:
    """Watches all volumes of one world."""

    def __init__(self, store: Store, hardware: Mapping[str, Hardware]) -> None:
        self.recorded: list[Mount] = []
        self.moved = self.recovered = 0
        self._store = store
        self._hardware = hardware
        self._open: dict[tuple[str, str, int], Mount] = {}  # host, volume, pid
        self._owners: dict[str, tuple[str, str]] = {}  # volume -> its host and machine, as etcd has them
        self._left_s: dict[tuple[str, str], float] = {}  # (volume, machine): when etcd took it away
        self._born_s: Mapping[str, float] = {}
        self._sees_since: Mapping[str, float] = {}
        self._writes = 0
        self._outside = current().world_context()

    def attach(self, born_s: Mapping[str, float], sees_since: Mapping[str, float]) -> None:
        """Look from now on. Kept up by copies.py: when each host's flyd began, since when it sees etcd."""
        self._born_s, self._sees_since = born_s, sees_since
        self._store.on_change.append(self.see_store)
        for hardware in self._hardware.values():
            hardware.on_change.append(self.see_hardware)
        self._poll()

    def _poll(self) -> None:
        for mount in self._open.values():
            self._write(mount)
        self._check_stale()
        current().call_later(POLL_S, self._poll, context=self._outside)

    def _write(self, mount: Mount) -> None:
        self._writes += 1
        disk = self._hardware[mount.host].volumes[mount.volume]
        disk.content = (*disk.content, self._writes)

    # ------------------------------------------------------------------ etcd

    def see_store(self, changes: Sequence[Change]) -> None:
        """After a transaction."""
        for change in changes:
            if change.key.startswith(keys.VOLUMES):
                self._see_owner(keys.last_part(change.key), change)
        for change in changes:
            if change.key.startswith(keys.EVENTS) and change.value is not None:
                line = decode(change.value.value, Event)
                if line.kind in (VOLUME_MOVED, VOLUME_RECOVERED):
                    self._see_relocated(line)

    def _see_owner(self, volume_id: str, change: Change) -> None:
        volume = decode(change.value.value, Volume) if change.value is not None else None
        owner = (volume.host, volume.attached_machine) if volume is not None else ("", "")
        before = self._owners.get(volume_id, ("", ""))
        self._owners[volume_id] = owner
        if before[1] and before[1] != owner[1]:
            self._left_s[volume_id, before[1]] = current().time()
        self._left_s.pop((volume_id, owner[1]), None)

    def _see_relocated(self, line: Event) -> None:
        old_id, new_id = line.fields["old"], line.source
        old = self._hardware[line.fields["from"]].volumes.get(old_id)
        new = self._hardware[line.fields["to"]].volumes[new_id]
        written = old.content if old is not None else ()
        if line.kind == VOLUME_RECOVERED:
            self.recovered += 1
            if written[: len(new.content)] != new.content:
                raise Violation(f"lost: {new_id}, brought back, holds what was never written to {old_id}")
            return
        self.moved += 1
        mounted = [m for m in self._open.values() if m.volume == old_id]
        if mounted:
            raise Violation(f"moved while mounted: {old_id} to {new_id}, and {mounted[0].machine} has it")
        if written != new.content:
            raise Violation(
                f"lost: {new_id} holds {len(new.content)} of the {len(written)} writes of {old_id}"
            )

    # ------------------------------------------------------------------ hardware

    def see_hardware(self) -> None:
        """Begin and end intervals by what runs now."""
        now_s = current().time()
        there: dict[tuple[str, str, int], str] = {}
        for host, hardware in self._hardware.items():
            for machine_id, spec in hardware.running().items():
                for path, _ in spec.mounts:
                    key = (host, keys.last_part(path), hardware.machines[machine_id].pid)
                    there[key] = machine_id
        for key in [key for key in self._open if key not in there]:
            self._open.pop(key).ended_s = now_s
        for key, machine_id in there.items():
            if key not in self._open:
                self._begin(Mount(key[1], machine_id, key[0], key[2], now_s))

    def _begin(self, mount: Mount) -> None:
        for other in self._open.values():
            if other.volume == mount.volume:
                raise Violation(
                    f"two mounts: {mount.volume} by {other.machine} on {other.host} and by "
                    f"{mount.machine} on {mount.host}"
                )
        left_s = self._left_s.get((mount.volume, mount.machine))
        if left_s is not None and self._born_s.get(mount.host, 0.0) > left_s:
            raise Violation(
                f"early: {mount.machine} on {mount.host} mounts {mount.volume}, which it had lost"
            )
        self._open[mount.host, mount.volume, mount.pid] = mount
        self.recorded.append(mount)
        self._write(mount)

    def _check_stale(self) -> None:
        now_s = current().time()
        for mount in self._open.values():
            left_s, sees_s = self._left_s.get((mount.volume, mount.machine)), self._sees_since.get(mount.host)
            if left_s is not None and sees_s is not None and now_s - max(left_s, sees_s) > FENCED_WITHIN_S:
                raise Violation(f"stale mount: {mount.machine} on {mount.host} keeps {mount.volume}")

    # ------------------------------------------------------------------ at the end

    def check_recorded(self) -> None:
        """No two recorded intervals of one volume have an instant in common."""
        double = overlap(self.recorded, current().time())
        if double is not None:
            raise Violation(f"two mounts: {double[0]} and {double[1]}")


def overlap(mounts: Sequence[Mount], now_s: float) -> tuple[Mount, Mount] | None:
    """Two mounts of one volume that have an instant in common, if there are such."""
    last: dict[str, Mount] = {}
    for mount in sorted(mounts, key=lambda m: (m.volume, m.began_s)):
        before = last.get(mount.volume)
        if before is not None and mount.began_s < (before.ended_s or now_s):
            return before, mount
        if before is None or (mount.ended_s or now_s) >= (before.ended_s or now_s):
            last[mount.volume] = mount
    return None
