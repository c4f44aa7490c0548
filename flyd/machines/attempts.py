"""When each machine of a host is tried again: the back-off after exits, failures and sickness.

Owns the times of recent exits (on this process' clock; a new flyd counts those that its records
tell of as of now) and the moment before which nothing is tried. What follows an exit is
restart.py's word. Called by host.py alone.
"""

from __future__ import annotations

import structlog

from flyd.errors import InvariantBroken
from flyd.machines import decide as decisions
from flyd.machines.decide import Record
from flyd.machines.operations import Records
from flyd.machines.restart import Again, Stay, after_exit, backoff_s, describe, recent_only
from flyd.model import ExitStatus
from flyd.ports import Clock

log = structlog.get_logger(__name__)


class Attempts:
    """The attempts of one host's machines."""

    def __init__(self, records: Records, clock: Clock) -> None:
        self._records = records
        self._clock = clock
        self._not_before: dict[str, float] = {}
        self._exits: dict[str, tuple[float, ...]] = {}
        self._failures: dict[str, int] = {}

    def resume(self, machine_id: str) -> None:
        """Take over from a former flyd, whose times mean nothing on this clock."""
        record = self._records.get(machine_id)
        self._exits[machine_id] = (self._clock.monotonic_s(),) * (record.recent_exits if record else 0)

    def not_before(self, machine_id: str) -> float:
        """The monotonic time before which nothing is tried; 0: at once."""
        return self._not_before.get(machine_id, 0.0)

    def asked(self, machine_id: str) -> None:
        """Somebody wants something of the machine: no back-off holds that up."""
        self._not_before.pop(machine_id, None)

    def worked(self, machine_id: str) -> None:
        """An operation has succeeded."""
        self._failures.pop(machine_id, None)

    def forget(self, machine_id: str) -> None:
        """The machine is gone."""
        for kept in (self._not_before, self._exits, self._failures):
            kept.pop(machine_id, None)

    def next_backoff_s(self, machine_id: str) -> float:
        """How long to wait after one more failure in a row."""
        failures = self._failures.get(machine_id, 0) + 1
        self._failures[machine_id] = failures
        return backoff_s(failures)

    def note_exit(self, machine_id: str, exit: ExitStatus) -> None:
        """The process ended by itself."""
        record = self._record(machine_id)
        verdict, earlier = self._count(machine_id, record, exit)
        again, retry_at_s = self._hold(machine_id, verdict)
        reason = describe(exit) if isinstance(verdict, Again) else verdict.reason
        self._records.put(machine_id, decisions.exited(record, exit, earlier, again, reason, retry_at_s))
        log.info("host.machine_exited", machine=machine_id, exit=describe(exit), again=again)

    def note_sick(self, machine_id: str) -> None:
        """An unhealthy machine was ended: that counts as a failure, whatever its exit code."""
        record = self._record(machine_id)
        verdict, earlier = self._count(machine_id, record, ExitStatus())
        again, retry_at_s = self._hold(machine_id, verdict)
        reason = record.sick if isinstance(verdict, Again) else f"{record.sick}; {verdict.reason}"
        self._records.put(machine_id, decisions.judged(record, earlier, again, reason, retry_at_s))
        log.warning("host.machine_unhealthy", machine=machine_id, reason=record.sick, again=again)

    def note_failure(self, machine_id: str, operation: str) -> None:
        """A failed start counts like an exit; anything else is tried again for as long as it is wanted."""
        if operation not in (decisions.START, decisions.RESTART):
            self._not_before[machine_id] = self._clock.monotonic_s() + self.next_backoff_s(machine_id)
            return
        record = self._record(machine_id)
        verdict, earlier = self._count(machine_id, record, ExitStatus())
        again, retry_at_s = self._hold(machine_id, verdict)
        self._records.put(machine_id, decisions.gave_up(record, earlier, again, retry_at_s))

    def _record(self, machine_id: str) -> Record:
        record = self._records.get(machine_id)
        if record is None:
            raise InvariantBroken(f"machine {machine_id} ended without a record")
        return record

    def _count(self, machine_id: str, record: Record, exit: ExitStatus) -> tuple[Again | Stay, int]:
        """The policy's word on this exit, and how many came before it within the window."""
        now = self._clock.monotonic_s()
        earlier = recent_only(self._exits.get(machine_id, ()), now)
        self._exits[machine_id] = (*earlier, now)
        return after_exit(record.assignment.claim.config.restart, exit, earlier, now), len(earlier)

    def _hold(self, machine_id: str, verdict: Again | Stay) -> tuple[bool, float]:
        """Whether it is tried again, and when, by the wall clock."""
        if isinstance(verdict, Stay):
            self._not_before.pop(machine_id, None)
            return False, 0.0
        self._not_before[machine_id] = self._clock.monotonic_s() + verdict.delay_s
        return True, self._clock.wall_s() + verdict.delay_s
