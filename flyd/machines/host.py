"""The host loop: makes this host's machines what their claims say, and says what they are.

Owns the workers (one operation per machine at a time, MAX_PARALLEL machines at once, those that
only wait for a machine's end not counted) and the checks of started machines. Invariants:

- Ending or cancelling `run` stops no machine; a new HostLoop over the same run log first
  finishes what the old one had begun, then adopts what runs.
- While etcd is away, machines go on and restarts by policy go on from the last known
  claims; statuses are published when it is back (statuses.py).

Called by the daemon (and the simulator's hosts). Decides nothing itself: that is
decide.py, restart.py and checks.py; acts only through operations.py. When it tries again: attempts.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress

import structlog

from flyd.errors import Conflict, FlydError, InvariantBroken, Unavailable
from flyd.machines import commands
from flyd.machines import decide as decisions
from flyd.machines.assignments import assignment_of, doomed
from flyd.machines.attempts import Attempts
from flyd.machines.checks import Probe, checks_of, keep_checks
from flyd.machines.decide import Decision, NoteExit, Nothing, Perform, Retire, Unclaimed, View, Wait, decide
from flyd.machines.environment import Assignment
from flyd.machines.fencing import ended_soon, stale_copies, wait_fenced, why_abandoned
from flyd.machines.halts import Halts
from flyd.machines.leftovers import free_leftovers
from flyd.machines.operations import RUN_ID_BYTES, Job, Records, Tools, abandon, begin, execute, job_of
from flyd.machines.statuses import Statuses
from flyd.model import (
    CheckStatus,
    Desired,
    ExitStatus,
    Host,
    Machine,
    MachineState,
    MachineStatus,
)
from flyd.ports import KV, Clock, Driver, Entropy, ImageStore, RunLog, SourceStore, Unchanged, VolumeStore
from flyd.store import keys
from flyd.store.mirror import Mirror

log = structlog.get_logger(__name__)

MAX_PARALLEL = 8
RESYNC_S = 30.0  # every machine is looked at this often, although nothing seemed to happen
RETRY_S = 0.5  # after the driver did not answer


class HostLoop:
    """All machines of one host. `run` works until it is cancelled."""

    def __init__(
        self,
        *,
        host: Host,
        kv: KV,
        mirror: Mirror,
        driver: Driver,
        run_log: RunLog,
        volumes: VolumeStore,
        sources: SourceStore,
        clock: Clock,
        entropy: Entropy,
        probe: Probe,
        images: ImageStore | None = None,
    ) -> None:
        self._host = host
        self._kv = kv
        self._mirror = mirror
        self._driver = driver
        self._clock = clock
        self._entropy = entropy
        self._probe = probe
        self._statuses = Statuses(kv, host.name, self._status, self._my_claim)
        self._records = Records(run_log, self._statuses.changed)
        self._attempts = Attempts(self._records, clock)
        self._wakeup = asyncio.Event()
        self._halts = Halts(driver, self._newest, self._wakeup.set)
        self._tools = Tools(
            host, kv, driver, run_log, volumes, sources, clock, self._records, self._halts, images
        )
        self._synced = False
        self._claims: dict[str, tuple[Machine, int]] = {}  # ours, with their revision
        self._freed: dict[str, int] = {}  # revisions of claims that were freed and may still be mirrored
        self._open: dict[str, list[str]] = {}  # machine -> runs that an earlier flyd left open
        self._pending: dict[str, None] = {}
        self._stale: dict[str, None] = {}  # copies that end before anything else begins
        self._fenced: dict[str, int] = {}  # all stale copies, with the revision of the claim that says so
        self._due: dict[str, float] = {}
        self._busy: dict[str, None] = {}
        self._unclaimed: dict[str, None] = {}
        self._check_tasks: dict[str, tuple[str, asyncio.Task[None]]] = {}

    async def run(self) -> None:
        """End stale copies, finish what was begun, adopt what runs; then keep all as claimed, for ever."""
        await wait_fenced(self._mirror, self._host.name)
        for run_id in self._tools.run_log.open_runs():
            machine_id = job_of(self._tools.run_log, run_id).assignment.claim.id
            self._open.setdefault(machine_id, []).append(run_id)
        for machine_id in self._records.ids():
            self._attempts.resume(machine_id)
            self._statuses.changed(machine_id)
        self._wake_all()
        seen = await self._observe_ids()
        async with asyncio.TaskGroup() as group:
            self._group = group
            if self._mirror.revision:
                self._take_claims(seen)
            group.create_task(self._watch_claims(), name="claims")
            group.create_task(self._watch_exits(), name="exits")
            group.create_task(self._keep_machines(), name="machines")

    # ----------------------------------------------------------------------- what to look at

    def _wake(self, machine_id: str) -> None:
        self._pending[machine_id] = None
        self._wakeup.set()

    def _wake_all(self) -> None:
        for machine_id in sorted({*self._records.ids(), *self._claims, *self._open}):
            self._wake(machine_id)

    async def _watch_claims(self) -> None:
        """Look again at every machine whose claim, or whose way to it, changed."""
        await self._mirror.wait_synced()
        self._group.create_task(self._statuses.keep_published(), name="statuses")
        self._group.create_task(self._keep_leftovers_freed(), name="leftovers")
        taken = -1
        while True:
            version = self._mirror.version
            if taken != (taken := self._mirror.changed_at(keys.MACHINES)):
                self._take_claims(())
            self._statuses.claims_changed()
            await self._mirror.wait_change(version)

    def _take_claims(self, seen: Sequence[str]) -> None:
        """Learn the claims as they are now; `seen`: what the driver has, on the first look."""
        mirrored = {
            found.value.id: (found.value, found.mod_revision)
            for found in self._mirror.list(keys.MACHINES, Machine)
        }
        self._freed = {m: revision for m, revision in self._freed.items() if m in mirrored}
        claims = {m: claim for m, claim in mirrored.items() if self._freed.get(m) != claim[1]}
        before, self._claims = self._claims, claims
        if not self._synced:
            self._synced = True
            self._wake_all()
        stale = stale_copies(self._host.name, {*seen, *self._records.ids()}, claims)
        for machine_id in stale:
            # First once: one that can not be ended does not hold up the others for ever.
            if self._fenced.get(machine_id) != stale[machine_id]:
                self._stale[machine_id] = None
                self._halts.hurry(machine_id)
                self._wake(machine_id)
        self._fenced = stale
        for machine_id in sorted({*before, *claims}):
            if before.get(machine_id) == claims.get(machine_id):
                continue
            if self._is_mine(machine_id, before) or self._is_mine(machine_id, claims):
                if decisions.wish_of(before.get(machine_id)) != decisions.wish_of(claims.get(machine_id)):
                    self._attempts.asked(machine_id)
                self._halts.hurry(machine_id)
                self._wake(machine_id)

    def _status(self, machine_id: str) -> MachineStatus | None:
        return decisions.status_of(record) if (record := self._records.get(machine_id)) else None

    def _my_claim(self, machine_id: str) -> tuple[Machine, int] | None:
        return self._claims[machine_id] if self._is_mine(machine_id, self._claims) else None

    def _newest(self, claim: Machine) -> Machine:
        """The claim as it is now; one that is, or meanwhile was, another host's has little time to end."""
        found = self._my_claim(claim.id)
        if found is not None and found[0].epoch <= claim.epoch:
            return found[0]
        return ended_soon(claim) if self._synced else claim

    def _is_mine(self, machine_id: str, claims: Mapping[str, tuple[Machine, int]]) -> bool:
        return machine_id in claims and claims[machine_id][0].host == self._host.name

    async def _watch_exits(self) -> None:
        while True:
            try:
                async for machine_id in self._driver.exits():
                    self._wake(machine_id)
            except Unavailable as error:
                log.warning("host.exits_failed", host=self._host.name, error=str(error))
            await asyncio.sleep(RETRY_S)
            self._wake_all()

    async def _keep_machines(self) -> None:
        """Give each machine that needs a look to a worker, at most MAX_PARALLEL at once."""
        resync_at = self._clock.monotonic_s() + RESYNC_S
        while True:
            now = self._clock.monotonic_s()
            if now >= resync_at:
                resync_at = now + RESYNC_S
                for machine_id in sorted(await self._observe_ids()):
                    self._wake(machine_id)
                self._wake_all()
            for machine_id in [m for m, at in self._due.items() if at <= now]:
                del self._due[machine_id]
                self._pending[machine_id] = None
            for machine_id in list(self._pending):
                held_up = self._stale and machine_id not in self._stale
                if held_up or machine_id in self._busy or self._at_work() >= MAX_PARALLEL:
                    continue
                del self._pending[machine_id]
                self._busy[machine_id] = None
                self._group.create_task(self._attend(machine_id), name=f"machine {machine_id}")
            self._wakeup.clear()
            await self._wait_wakeup(min([resync_at, *self._due.values()]) - now)

    def _at_work(self) -> int:
        """Workers that do more than wait for a machine's end, which may take hours."""
        return len(self._busy) - self._halts.count()

    async def _wait_wakeup(self, timeout_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(max(timeout_s, 0.0)):
                await self._wakeup.wait()

    async def _keep_leftovers_freed(self) -> None:
        """Give back, now and every RESYNC_S, places of machines that are not here and not to be."""
        while True:
            try:
                here = {*await self._driver.observe(), *self._records.ids(), *self._busy, *self._open}
                freed = await free_leftovers(self._kv, self._mirror, self._host.name, here)
                if freed:
                    log.info("host.leftovers_freed", host=self._host.name, machines=freed)
            except Unavailable as error:
                log.warning("host.leftovers_failed", host=self._host.name, error=str(error))
            await asyncio.sleep(RESYNC_S)

    async def _observe_ids(self) -> list[str]:
        try:
            return list(await self._driver.observe())
        except Unavailable as error:
            log.warning("host.observe_failed", host=self._host.name, error=str(error))
            return []

    # ----------------------------------------------------------------------- one machine

    async def _attend(self, machine_id: str) -> None:
        """Bring one machine as near to its claim as is possible now."""
        try:
            await self._finish_open_runs(machine_id)
            while await self._step(machine_id):
                pass
        except InvariantBroken:
            raise
        except (FlydError, OSError) as error:
            self._due[machine_id] = self._clock.monotonic_s() + self._attempts.next_backoff_s(machine_id)
            log.warning("host.machine_failed", host=self._host.name, machine=machine_id, error=str(error))
        finally:
            del self._busy[machine_id]
            self._stale.pop(machine_id, None)
            self._wakeup.set()

    async def _finish_open_runs(self, machine_id: str) -> None:
        while runs := self._open.get(machine_id):
            job, stale = job_of(self._tools.run_log, runs[0]), machine_id in self._stale
            if reason := why_abandoned(job.assignment.claim, stale=stale, learned=self._synced):
                abandon(self._tools, runs[0], reason)
            await execute(self._tools, runs[0])
            self._after_operation(machine_id, job.operation)
            runs.pop(0)
        self._open.pop(machine_id, None)

    async def _step(self, machine_id: str) -> bool:
        """Decide once and carry it out; False when there is nothing (more) to do now."""
        observed = await self._driver.look(machine_id)
        view = View(
            host=self._host.name,
            now=self._clock.monotonic_s(),
            wall_s=self._clock.wall_s(),
            claim=self._claim(machine_id),
            record=self._records.get(machine_id),
            observed=observed,
            not_before=self._attempts.not_before(machine_id),
            learned=self._synced,
        )
        decision: Decision = decide(view)
        self._keep_checks_of(machine_id)
        match decision:
            case Perform(operation=operation):
                await self._perform(machine_id, operation, view)
                return True
            case NoteExit(exit=exit):
                self._attempts.note_exit(machine_id, exit or ExitStatus(at_s=self._clock.wall_s()))
                self._keep_checks_of(machine_id)
                return True
            case Retire():
                await self._retire(machine_id)
            case Wait(until=until):
                self._due[machine_id] = until
            case Unclaimed() if self._synced and machine_id not in self._unclaimed:
                self._unclaimed[machine_id] = None
                log.warning("host.unclaimed_machine", host=self._host.name, machine=machine_id)
            case Unclaimed() | Nothing():
                pass
        return False

    async def _perform(self, machine_id: str, operation: str, view: View) -> None:
        run_id = self._entropy.token(RUN_ID_BYTES)
        begin(self._tools, run_id, Job(operation=operation, assignment=self._assignment(operation, view)))
        self._open[machine_id] = [run_id]
        await self._finish_open_runs(machine_id)

    def _claim(self, machine_id: str) -> Machine | None:
        """The claim, or the last one known while etcd has not been heard since the start."""
        if self._synced:
            found = self._claims.get(machine_id)
            return found[0] if found else None
        record = self._records.get(machine_id)
        return record.assignment.claim if record else None

    def _assignment(self, operation: str, view: View) -> Assignment:
        """What the operation works on: the claim and what belongs to it, as etcd has it now."""
        if operation == decisions.DESTROY and view.record is not None:
            return doomed(view.record.assignment, view.claim)
        if not self._synced and view.record is not None:
            return view.record.assignment
        if view.claim is None:
            raise InvariantBroken(f"{operation} decided for a machine without a claim")
        return assignment_of(view.claim, self._mirror)

    def _after_operation(self, machine_id: str, operation: str) -> None:
        """After a failed one, when to try again; after a destroyed machine, nothing is kept."""
        self._keep_checks_of(machine_id)
        record = self._records.get(machine_id)
        if record is None:
            self._forget_freed_claim(machine_id)
            self._attempts.forget(machine_id)
            self._due.pop(machine_id, None)
        elif record.state is MachineState.FAILED:
            log.warning("host.operation_failed", machine=machine_id, operation=operation, error=record.detail)
            self._attempts.note_failure(machine_id, operation)
        else:
            self._attempts.worked(machine_id)
            if operation == decisions.RECYCLE:
                self._attempts.note_sick(machine_id)

    def _forget_freed_claim(self, machine_id: str) -> None:
        """The mirror may show the claim for a moment after it was freed: that asks for nothing more."""
        found = self._claims.get(machine_id)
        if found and found[0].desired is Desired.DESTROYED:
            self._freed[machine_id] = found[1]
            del self._claims[machine_id]

    async def _retire(self, machine_id: str) -> None:
        """Want a machine gone that has ended for good, unless somebody wants something else by now."""
        found = self._my_claim(machine_id)
        if found is None:
            return  # etcd has not been heard yet: the claim, when it is, wakes us
        claim, revision = found
        unchanged = Unchanged(keys.machine(claim.app, claim.id), revision)
        try:
            await commands.set_desired(self._kv, claim.app, claim.id, Desired.DESTROYED, guards=(unchanged,))
        except Conflict:
            return  # the changed claim wakes us
        log.info("host.machine_retired", machine=machine_id)

    # ----------------------------------------------------------------------- checks

    def _keep_checks_of(self, machine_id: str) -> None:
        """Checks run exactly while the machine is started, anew for each start."""
        record = self._records.get(machine_id)
        started = record is not None and record.state is MachineState.STARTED
        running = self._check_tasks.get(machine_id)
        if running and not (started and record and record.mark == running[0]):
            running[1].cancel()
            del self._check_tasks[machine_id]
            running = None
        if record is None or not started or running or not checks_of(record.assignment.claim.config):
            return

        def report(status: CheckStatus) -> None:
            current = self._records.get(machine_id)
            if current is not None and current.state is MachineState.STARTED:
                self._records.put(machine_id, decisions.checked(current, status))

        def condemn(reason: str) -> None:
            current = self._records.get(machine_id)
            if current is not None and current.state is MachineState.STARTED and not current.sick:
                self._records.put(machine_id, decisions.sickened(current, reason))
                self._wake(machine_id)

        claim = record.assignment.claim
        known = {status.name: status for status in record.checks}
        loop = keep_checks(claim.config, claim.private_ip, known, self._probe, self._clock, report, condemn)
        task = self._group.create_task(loop, name=f"checks of {machine_id}")
        self._check_tasks[machine_id] = (record.mark, task)
