"""The host loop: makes this host's machines what their claims say, and says what they are.

Owns the workers (one operation per machine at a time, MAX_PARALLEL machines at once), the
back-off between attempts and the checks of started machines. Invariants:

- Ending or cancelling `run` stops no machine; a new HostLoop over the same run log first
  finishes what the old one had begun, then adopts what runs.
- While etcd is away, machines go on and restarts by policy go on from the last known
  claims; statuses are published when it is back (statuses.py).

Called by the daemon (and the simulator's hosts). Decides nothing itself: that is
decide.py, restart.py and checks.py; acts only through operations.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import msgspec
import structlog

from flyd.errors import FlydError, InvariantBroken, Unavailable
from flyd.machines import decide as decisions
from flyd.machines.checks import Probe, checks_of, keep_checks
from flyd.machines.decide import Decision, NoteExit, Nothing, Perform, Record, Unclaimed, View, Wait, decide
from flyd.machines.environment import Assignment, VolumeGrant
from flyd.machines.operations import RUN_ID_BYTES, Job, Records, Tools, begin, execute, job_of
from flyd.machines.restart import Again, after_exit, backoff_s, describe, recent_only
from flyd.machines.statuses import Statuses
from flyd.model import (
    App,
    AppKind,
    CheckStatus,
    Desired,
    ExitStatus,
    Host,
    Machine,
    MachineState,
    MachineStatus,
    Secrets,
    Volume,
)
from flyd.ports import KV, Clock, Driver, Entropy, ImageStore, RunLog, SourceStore, VolumeStore
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
        self._tools = Tools(host, kv, driver, run_log, volumes, sources, clock, self._records, images)
        self._synced = False
        self._claims: dict[str, tuple[Machine, int]] = {}  # ours, with their revision
        self._freed: dict[str, int] = {}  # revisions of claims that were freed and may still be mirrored
        self._open: dict[str, list[str]] = {}  # machine -> runs that an earlier flyd left open
        self._pending: dict[str, None] = {}
        self._due: dict[str, float] = {}
        self._busy: dict[str, None] = {}
        self._wakeup = asyncio.Event()
        self._not_before: dict[str, float] = {}
        self._exits: dict[str, tuple[float, ...]] = {}
        self._failures: dict[str, int] = {}
        self._unclaimed: dict[str, None] = {}
        self._check_tasks: dict[str, tuple[str, asyncio.Task[None]]] = {}

    async def run(self) -> None:
        """Finish what was begun, adopt what runs, then keep all machines as claimed, for ever."""
        for run_id in self._tools.run_log.open_runs():
            machine_id = job_of(self._tools.run_log, run_id).assignment.claim.id
            self._open.setdefault(machine_id, []).append(run_id)
        now = self._clock.monotonic_s()
        for machine_id in self._records.ids():
            record = self._records.get(machine_id)
            # Times of a former flyd's exits mean nothing on this clock: count them as of now.
            self._exits[machine_id] = (now,) * (record.recent_exits if record else 0)
            self._statuses.changed(machine_id)
        self._wake_all()
        async with asyncio.TaskGroup() as group:
            self._group = group
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
        while True:
            version = self._mirror.version
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
            for machine_id in sorted({*before, *claims}):
                if before.get(machine_id) == claims.get(machine_id):
                    continue
                if self._is_mine(machine_id, before) or self._is_mine(machine_id, claims):
                    self._not_before.pop(machine_id, None)  # somebody asked: no back-off holds that up
                    self._wake(machine_id)
            self._statuses.claims_changed()
            await self._mirror.wait_change(version)

    def _status(self, machine_id: str) -> MachineStatus | None:
        record = self._records.get(machine_id)
        return decisions.status_of(record) if record else None

    def _my_claim(self, machine_id: str) -> tuple[Machine, int] | None:
        return self._claims[machine_id] if self._is_mine(machine_id, self._claims) else None

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
                if machine_id in self._busy or len(self._busy) >= MAX_PARALLEL:
                    continue
                del self._pending[machine_id]
                self._busy[machine_id] = None
                self._group.create_task(self._attend(machine_id), name=f"machine {machine_id}")
            self._wakeup.clear()
            await self._wait_wakeup(min([resync_at, *self._due.values()]) - now)

    async def _wait_wakeup(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(max(timeout_s, 0.0)):
                await self._wakeup.wait()
        except TimeoutError:
            return

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
            self._due[machine_id] = self._clock.monotonic_s() + self._next_backoff_s(machine_id)
            log.warning("host.machine_failed", host=self._host.name, machine=machine_id, error=str(error))
        finally:
            del self._busy[machine_id]
            self._wakeup.set()

    async def _finish_open_runs(self, machine_id: str) -> None:
        while runs := self._open.get(machine_id):
            await execute(self._tools, runs[0])
            self._after_operation(machine_id, job_of(self._tools.run_log, runs[0]).operation)
            runs.pop(0)
        self._open.pop(machine_id, None)

    async def _step(self, machine_id: str) -> bool:
        """Decide once and carry it out; False when there is nothing (more) to do now."""
        observed = (await self._driver.observe()).get(machine_id)
        claim = self._claim(machine_id)
        view = View(
            host=self._host.name,
            now=self._clock.monotonic_s(),
            claim=claim,
            record=self._records.get(machine_id),
            observed=observed,
            not_before=self._not_before.get(machine_id, 0.0),
        )
        decision: Decision = decide(view)
        self._keep_checks_of(machine_id)
        match decision:
            case Perform(operation=operation):
                await self._perform(machine_id, operation, view)
                return True
            case NoteExit(exit=exit):
                self._note_exit(machine_id, exit or ExitStatus(at_s=self._clock.wall_s()))
                return True
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
            kept = view.record.assignment
            doomed = msgspec.structs.replace(kept.claim, desired=Desired.DESTROYED)
            return msgspec.structs.replace(kept, claim=doomed)
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
            for kept in (self._not_before, self._exits, self._failures, self._due):
                kept.pop(machine_id, None)
        elif record.state is not MachineState.FAILED:
            self._failures.pop(machine_id, None)
        else:
            log.warning("host.operation_failed", machine=machine_id, operation=operation, error=record.detail)
            self._note_failure(machine_id, operation, record)

    def _forget_freed_claim(self, machine_id: str) -> None:
        """The mirror may show the claim for a moment after it was freed: that asks for nothing more."""
        found = self._claims.get(machine_id)
        if found and found[0].desired is Desired.DESTROYED:
            self._freed[machine_id] = found[1]
            del self._claims[machine_id]

    def _note_exit(self, machine_id: str, exit: ExitStatus) -> None:
        record = self._records.get(machine_id)
        if record is None:
            raise InvariantBroken(f"machine {machine_id} exited without a record")
        now = self._clock.monotonic_s()
        earlier = recent_only(self._exits.get(machine_id, ()), now)
        verdict = after_exit(record.assignment.claim.config.restart, exit, earlier, now)
        again = isinstance(verdict, Again)
        reason = describe(exit) if isinstance(verdict, Again) else verdict.reason
        self._records.put(machine_id, decisions.exited(record, exit, len(earlier), again, reason))
        self._exits[machine_id] = (*earlier, now)
        if isinstance(verdict, Again):
            self._not_before[machine_id] = now + verdict.delay_s
        self._keep_checks_of(machine_id)
        log.info("host.machine_exited", machine=machine_id, exit=describe(exit), again=again)

    def _note_failure(self, machine_id: str, operation: str, record: Record) -> None:
        """A failed start counts like an exit; anything else is tried again for as long as it is wanted."""
        now = self._clock.monotonic_s()
        if operation not in (decisions.START, decisions.RESTART):
            self._not_before[machine_id] = now + self._next_backoff_s(machine_id)
            return
        earlier = recent_only(self._exits.get(machine_id, ()), now)
        verdict = after_exit(record.assignment.claim.config.restart, ExitStatus(), earlier, now)
        again = isinstance(verdict, Again)
        self._exits[machine_id] = (*earlier, now)
        self._not_before[machine_id] = now + (verdict.delay_s if isinstance(verdict, Again) else 0.0)
        self._records.put(machine_id, decisions.gave_up(record, len(earlier), again))

    def _next_backoff_s(self, machine_id: str) -> float:
        failures = self._failures.get(machine_id, 0) + 1
        self._failures[machine_id] = failures
        return backoff_s(failures)

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

        claim = record.assignment.claim
        known = {status.name: status for status in record.checks}
        loop = keep_checks(claim.config, claim.private_ip, known, self._probe, self._clock, report)
        task = self._group.create_task(loop, name=f"checks of {machine_id}")
        self._check_tasks[machine_id] = (record.mark, task)


def assignment_of(claim: Machine, mirror: Mirror) -> Assignment:
    """A claim with its app's secrets, its volumes' epochs and the databases it may name."""
    app = mirror.get(keys.app(claim.app), App)
    secrets = mirror.get(keys.secrets(claim.app), Secrets)
    grants: list[VolumeGrant] = []
    for mount in claim.config.mounts:
        found = mirror.get(keys.volume(claim.app, mount.volume), Volume) if mount.volume else None
        if found and found.value.host == claim.host and found.value.attached_machine == claim.id:
            volume = found.value
            grants.append(
                VolumeGrant(id=volume.id, epoch=volume.epoch, size_gb=volume.size_gb, path=mount.path)
            )
    databases = {
        found.value.name: found.value.endpoint_port
        for found in mirror.list(keys.APPS, App)
        if found.value.kind is AppKind.POSTGRES and found.value.endpoint_port
    }
    regions = app.value.regions if app else ()
    return Assignment(
        claim=claim,
        primary_region=regions[0] if regions else claim.region,
        secrets=secrets.value.values if secrets else {},
        volumes=tuple(grants),
        databases=databases,
    )
