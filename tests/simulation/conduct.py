"""What people were promised about their machines: leases kept, sick ones restarted, none given up unasked.

Owns `Conduct`, told of every change of etcd, and looking at all hosts each second. Violations:

- lease: somebody changes a machine that somebody else holds.
- given up: a host wants a machine destroyed that is not to go by itself, or that somebody stopped.
- sick: a machine that is to be restarted when its check fails, fails it for SICK_WITHIN_S and runs on,
  although its host's flyd runs and does nothing else with it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from flyd.machines.decide import Record
from flyd.machines.leases import MachineLease, lease_key
from flyd.machines.operations import RECORDS
from flyd.model import Desired, Machine, MachineState, decode
from flyd.ports import Change
from flyd.store import keys
from tests.simulation.driver import Hardware
from tests.simulation.ledger import Violation
from tests.simulation.loop import current
from tests.simulation.network import Store

SICK_WITHIN_S = 60.0  # a few failures at the check's interval, the slowest operation before it
POLL_S = 1.0


class Conduct:
    """Watches how machines are dealt with in one world."""

    def __init__(self, store: Store, hardware: Mapping[str, Hardware], users: Collection[str]) -> None:
        self._store = store
        self._hardware = hardware
        self._users = tuple(users)
        self._claims: dict[str, Machine] = {}
        self._sick_since: dict[tuple[str, str], float] = {}  # (host, machine)
        self._outside = current().world_context()

    def attach(self) -> None:
        """Look after every change from now on, and every POLL_S."""
        self._store.on_change.append(self.see_store)
        self._poll()

    def _poll(self) -> None:
        self.see_sick()
        current().call_later(POLL_S, self._poll, context=self._outside)

    def see_store(self, changes: Sequence[Change]) -> None:
        """After a transaction."""
        for change in changes:
            if not change.key.startswith(keys.MACHINES):
                continue
            before = self._claims.pop(change.key, None)
            if change.value is None:
                continue
            after = self._claims[change.key] = decode(change.value.value, Machine)
            if before is not None:
                self._check_lease(after)
                self._check_given_up(before, after)

    def _check_lease(self, claim: Machine) -> None:
        writer, stored = self._store.writer, self._store.get(lease_key(claim.app, claim.id))
        if writer in self._users and stored is not None:
            owner = decode(stored.value, MachineLease).owner
            if owner != writer:
                raise Violation(f"lease: {writer} changed {claim.id}, which {owner} holds")

    def _check_given_up(self, before: Machine, after: Machine) -> None:
        """A drain, too, destroys machines: those that it has replaced."""
        given_up = before.desired is not after.desired is Desired.DESTROYED
        if not given_up or self._store.writer not in self._hardware or self._store.list(keys.DRAINS).items:
            return
        if not before.config.auto_destroy or before.desired is Desired.STOPPED:
            raise Violation(f"given up: {before.id}, {before.desired.value} before, by {self._store.writer}")

    # ------------------------------------------------------------------ sickness

    def see_sick(self) -> None:
        """Since when each machine has been sick while it should have been restarted."""
        loop = current()
        sick = {
            (host, machine_id): self._sick_since.get((host, machine_id), loop.time())
            for host, hardware in self._hardware.items()
            if loop.runs(f"{host}/flyd")
            for machine_id in hardware.sick()
            if self._could_restart(hardware, machine_id)
        }
        self._sick_since = sick
        for (host, machine_id), since_s in sick.items():
            if loop.time() - since_s > SICK_WITHIN_S:
                raise Violation(
                    f"sick: {machine_id} on {host} for {loop.time() - since_s:.0f} s, and runs on"
                )

    def _could_restart(self, hardware: Hardware, machine_id: str) -> bool:
        """Whether its host takes it for started, and nothing else is done with it."""
        stored = hardware.run_log.records(RECORDS + machine_id).get(RECORDS + machine_id)
        record = decode(stored, Record) if stored is not None else None
        if record is None or record.state is not MachineState.STARTED:
            return False
        checks = record.assignment.claim.config.checks
        return any(check.restart_limit for check in checks.values())
