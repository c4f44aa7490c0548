"""What must hold of machines, reservations and volumes: at every moment, and at rest.

`Checkers.see_*` are called after every change of etcd and of any host's hardware and raise
`Violation` at once. `problems` lists what is not (yet) as it should be once nothing fails
any more; a run waits for it to be empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from flyd.model import (
    Desired,
    Host,
    Machine,
    MachineState,
    MachineStatus,
    Reservations,
    Volume,
    decode,
)
from flyd.placement.draft import request_of
from flyd.placement.index import Snapshot
from flyd.placement.scheduler import Order, Placement, reserved, schedule
from flyd.ports import Change
from flyd.storage.records import DESTROYED, Destroyed
from flyd.store import keys
from tests.simulation.driver import Hardware
from tests.simulation.ledger import Violation
from tests.simulation.network import SimulatedClock, Store


class Checkers:
    """Watches one world."""

    def __init__(
        self, store: Store, hardware: Mapping[str, Hardware], clocks: Mapping[str, SimulatedClock]
    ) -> None:
        self._store = store
        self._clocks = clocks
        self._hardware = hardware
        self.gone = ""  # a host that never comes back

    def attach(self) -> None:
        """Look after every change from now on."""
        self._store.on_change.append(self.see_store)
        for hardware in self._hardware.values():
            hardware.on_change.append(self.see_hardware)

    # ------------------------------------------------------------------ at every moment

    def see_store(self, changes: Sequence[Change]) -> None:
        """After a transaction."""
        for change in changes:
            if change.value is None:
                continue
            if change.key.startswith(keys.RESERVATIONS):
                self._check_reservations(decode(change.value.value, Reservations))
            elif change.key.startswith(keys.MACHINES):
                self._check_claim(decode(change.value.value, Machine))
            elif change.key.startswith(keys.VOLUMES):
                self._check_volume(decode(change.value.value, Volume))
        self.see_hardware()

    def _check_reservations(self, promised: Reservations) -> None:
        stored = self._store.get(keys.host(promised.host))
        if stored is None:
            raise Violation(f"capacity: promises on {promised.host}, which has never joined")
        capacity = decode(stored.value, Host).capacity
        used = promised.machines.values()
        memory_mb, cpus = sum(r.memory_mb for r in used), sum(r.cpus for r in used)
        disk_gb = sum(promised.volumes_gb.values())
        if memory_mb > capacity.memory_mb or cpus > capacity.cpus or disk_gb > capacity.disk_gb:
            raise Violation(
                f"capacity: {promised.host} promises {memory_mb} MB, {cpus} CPUs, {disk_gb} GB; "
                f"it has {capacity}"
            )
        if len(set(promised.addresses.values())) < len(promised.addresses):
            raise Violation(f"address: given twice on {promised.host}: {promised.addresses}")

    def _check_claim(self, claim: Machine) -> None:
        promised = self._promised(claim.host).machines.get(claim.id)
        if promised != reserved(claim.config.guest):
            raise Violation(
                f"covered: machine {claim.id} is on {claim.host} with a reservation of {promised}"
            )

    def _check_volume(self, volume: Volume) -> None:
        if volume.id in self._hardware[volume.host].purged:
            raise Violation(f"purged: volume {volume.id} is back on {volume.host}, its data is gone for ever")

    def _promised(self, host: str) -> Reservations:
        stored = self._store.get(keys.reservations(host))
        return decode(stored.value, Reservations) if stored is not None else Reservations(host=host)

    def see_hardware(self) -> None:
        """Whatever runs anywhere, is paid for, and has volumes of its own (copies.py: and runs once)."""
        for name, hardware in self._hardware.items():
            held: dict[str, str] = {}
            running = hardware.running()
            promised = self._promised(name) if running else None
            for machine_id, spec in running.items():
                if promised is not None and machine_id not in promised.machines:
                    raise Violation(f"covered: machine {machine_id} runs on {name} without a reservation")
                for volume, _ in spec.mounts:
                    if volume in held:
                        raise Violation(f"volume: {volume} is used by {held[volume]} and {machine_id}")
                    held[volume] = machine_id

    # ------------------------------------------------------------------ at rest

    def problems(self) -> list[str]:
        """What is not as it should be, in words; empty when all is well."""
        claims = [decode(i.value, Machine) for i in self._store.list(keys.MACHINES).items]
        volumes = [decode(i.value, Volume) for i in self._store.list(keys.VOLUMES).items]
        destroyed = [decode(i.value, Destroyed) for i in self._store.list(DESTROYED).items]
        statuses = [decode(i.value, MachineStatus) for i in self._store.list(keys.STATUS).items]
        found: list[str] = []
        for claim in claims:
            status = next((s for s in statuses if s.id == claim.id), None)
            stranded = claim.host == self.gone
            found.extend(self._stranded(claim) if stranded else self._claim_problems(claim, status))
        known = {claim.id for claim in claims}
        found.extend(f"status of {s.id} outlives its claim" for s in statuses if s.id not in known)
        for prefix in (keys.LOSSES, keys.DRAINS):
            records = (item.key for item in self._store.list(prefix).items)
            found.extend(f"{key} is still there" for key in records if key != keys.loss(self.gone))
        for name in (name for name in self._hardware if name != self.gone):
            here = {c.id for c in claims if c.host == name}
            on_disk = {v.id: v for v in volumes if v.host == name}
            kept = {d.volume.id for d in destroyed if d.volume.host == name} | self._kept_besides(name)
            found.extend(self._leaks(name, here, on_disk, kept))
        for volume in volumes:
            if volume.attached_machine and volume.attached_machine not in known:
                found.append(f"volume {volume.id} is held by {volume.attached_machine}, which is gone")
        return found

    def _kept_besides(self, host: str) -> set[str]:
        """What else may be promised disk there; nothing in a world without copies."""
        return set()

    def _claim_problems(self, claim: Machine, status: MachineStatus | None) -> Iterator[str]:
        spec = self._hardware[claim.host].running().get(claim.id)
        said = status.state.value if status is not None else "nothing"
        if claim.desired is Desired.DESTROYED:
            yield f"{claim.id} is to be destroyed on {claim.host} and is still claimed (said: {said})"
        elif claim.desired is Desired.STOPPED:
            if spec is not None or said not in ("stopped", "created"):
                yield f"{claim.id} is to be stopped on {claim.host}: runs {spec is not None}, said {said}"
        elif status is not None and status.instance_id != claim.instance_id:
            yield f"{claim.id} on {claim.host} is to be {claim.instance_id}, and is {status.instance_id}"
        elif spec is None:
            rests = status is not None and status.state in (MachineState.STOPPED, MachineState.FAILED)
            if said == "created" and claim.starts_at_s > self._clocks[claim.host].wall_s():
                return  # it came here at rest, and waits for its time
            if status is not None and 0.0 < status.next_start_s <= self._clocks[claim.host].wall_s():
                yield f"{claim.id} on {claim.host} rests, and its schedule wants it to be started"
            if not rests or claim.config.restart.policy == "always" or claim.config.auto_destroy:
                yield f"{claim.id} is to run on {claim.host} and does not (said: {said})"
        elif said != "started" or spec.instance_id != claim.instance_id:
            yield f"{claim.id} runs on {claim.host} as {spec.instance_id} and said {said}"
        elif claim.id in self._hardware[claim.host].sick() and claim.config.checks:
            yield f"{claim.id} on {claim.host} is sick and runs on"

    def _stranded(self, claim: Machine) -> Iterator[str]:
        """Whatever a host that is gone could lose, is gone from it, unless there is no room elsewhere."""
        once = claim.config.restart.policy == "no" and claim.desired is Desired.STARTED
        if claim.config.mounts or once or claim.desired is Desired.DESTROYED:
            return
        snapshot = Snapshot(
            hosts=(decode(item.value, Host) for item in self._store.list(keys.HOSTS).items),
            alive=(keys.last_part(item.key) for item in self._store.list(keys.ALIVE).items),
            reservations={name: self._promised(name) for name in self._hardware},
        )
        placeable = schedule(request_of(Order(app=claim.app, config=claim.config)), snapshot)
        if isinstance(placeable, Placement):
            yield f"{claim.id} is on {self.gone}, which is gone, and {placeable.host.name} has room"

    def _leaks(
        self, name: str, claimed: set[str], on_disk: Mapping[str, Volume], kept: set[str]
    ) -> Iterator[str]:
        hardware, promised = self._hardware[name], self._promised(name)
        for what, held in (
            ("a reservation", set(promised.machines)),
            ("an address", set(promised.addresses)),
            ("a driver's entry", set(hardware.machines)),
        ):
            for machine_id in sorted(held - claimed):
                yield f"leak: {what} on {name} for {machine_id}, which is gone"
        if set(promised.volumes_gb) != {*on_disk, *kept}:
            rightly = sorted({*on_disk, *kept})
            yield f"leak: disk on {name} is promised to {sorted(promised.volumes_gb)}, not {rightly}"
        for volume_id in sorted(v for v in on_disk if v in hardware.purged):
            yield f"purged: volume {volume_id} of {name} lives, its data is gone for ever"
        for volume_id in sorted(v for v in on_disk if v in hardware.volumes):
            if hardware.volumes[volume_id].destroyed_at_s:
                yield f"volume {volume_id} lives, and is still destroyed on the disk of {name}"
        for volume_id, attachment in sorted(hardware.volumes.items()):
            record = on_disk.get(volume_id)
            owner = record.attached_machine if record is not None else ""
            if attachment.machine and attachment.machine != owner:
                yield f"leak: volume {volume_id} on {name} is attached to {attachment.machine}, not '{owner}'"
        for run_id in hardware.run_log.open_runs():
            yield f"run {run_id} on {name} never ends"
