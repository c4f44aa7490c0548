"""Health checks: the state of a check from its results, and the loop that probes.

Owns when a check counts as passing, warning (no pass yet, in its grace period) or
critical. A first pass counts at once; losing it takes FAILURES_TO_CRITICAL failures in a
row, so that one slow answer does not take a machine out of routing. Until the first pass,
and while failures are being counted, probes come fast. A check with a restart_limit condemns
its machine once it has failed that often in a row, at its own pace, past its grace period.

`judge` and friends are pure; `keep_checks` is run by host.py for each started machine and
reports changes only. The probe itself (TCP, HTTP) is flyd/machines/probes.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from flyd.model import Check, CheckStatus, MachineConfig, Value
from flyd.ports import Clock

PASSING = "passing"
WARNING = "warning"
CRITICAL = "critical"

FAILURES_TO_CRITICAL = 2
FAST_INTERVAL_S = 0.25
FAST_STARTUP_S = 60.0  # a machine that has not passed by then is probed at its own interval
MAX_OUTPUT = 200

Probe = Callable[[Check, str], Awaitable[tuple[bool, str]]]
Report = Callable[[CheckStatus], None]
Condemn = Callable[[str], None]


class NamedCheck(Value, frozen=True, kw_only=True):
    """A check with the name it is shown by, and whether routing waits for it."""

    name: str
    check: Check
    gates_routing: bool


class CheckState(Value, frozen=True, kw_only=True):
    """What is known of one check."""

    status: str = WARNING
    output: str = "not probed yet"
    passed: bool = False  # ever, in this run of the machine
    failures: int = 0  # in a row
    failing_since_s: float | None = None  # age of the machine at the first of them past the grace period


def checks_of(config: MachineConfig) -> tuple[NamedCheck, ...]:
    """All checks of a machine: its services' (they gate routing), then its own."""
    of_services = tuple(
        NamedCheck(name=f"service-{service.internal_port}-{number}", check=check, gates_routing=True)
        for service in config.services
        for number, check in enumerate(service.checks)
    )
    own = tuple(
        NamedCheck(name=name, check=config.checks[name], gates_routing=False)
        for name in sorted(config.checks)
    )
    return of_services + own


def unprobed(config: MachineConfig, now_wall_s: float) -> tuple[CheckStatus, ...]:
    """The statuses of a machine that has just started: a check not yet made does not pass."""
    state = CheckState()
    return tuple(as_status(named, state, now_wall_s) for named in checks_of(config))


def as_status(named: NamedCheck, state: CheckState, now_wall_s: float) -> CheckStatus:
    """The state as it is published."""
    return CheckStatus(
        name=named.name,
        status=state.status,
        output=state.output,
        updated_at_s=now_wall_s,
        gates_routing=named.gates_routing,
    )


def resumed(status: CheckStatus | None) -> CheckState:
    """The state to go on from when a new flyd takes over a running machine."""
    if status is None:
        return CheckState()
    return CheckState(
        status=status.status,
        output=status.output,
        passed=status.status != WARNING,
        failures=FAILURES_TO_CRITICAL if status.status == CRITICAL else 0,
    )


def judge(state: CheckState, check: Check, ok: bool, output: str, age_s: float) -> CheckState:
    """The state after one result, `age_s` seconds after the machine's start."""
    output = output[:MAX_OUTPUT]
    if ok:
        return CheckState(status=PASSING, output=output, passed=True)
    failures = state.failures + 1
    since_s = state.failing_since_s
    if since_s is None and age_s >= check.grace_period_s:
        since_s = age_s
    if not state.passed:
        status = WARNING if age_s < check.grace_period_s else CRITICAL
    else:
        status = CRITICAL if failures >= FAILURES_TO_CRITICAL else state.status
    return CheckState(
        status=status, output=output, passed=state.passed, failures=failures, failing_since_s=since_s
    )


def condemns(state: CheckState, check: Check, age_s: float) -> bool:
    """Whether the machine is to be restarted: as many failures as the limit, at the check's own interval.

    Probes come faster than that while a machine starts or is in doubt; those do not count for more.
    """
    if not check.restart_limit or state.failing_since_s is None:
        return False
    enough_s = (check.restart_limit - 1) * check.interval_s
    return state.failures >= check.restart_limit and age_s - state.failing_since_s >= enough_s


def pause_s(state: CheckState, check: Check, age_s: float) -> float:
    """How long to wait before the next probe."""
    starting = not state.passed and age_s < FAST_STARTUP_S
    doubtful = state.passed and 0 < state.failures < FAILURES_TO_CRITICAL
    return min(check.interval_s, FAST_INTERVAL_S) if starting or doubtful else check.interval_s


def worth_reporting(before: CheckState, after: CheckState) -> bool:
    """Only what changes somebody's view: another status, or another reason while not passing."""
    if before.status != after.status:
        return True
    return after.status != PASSING and before.output != after.output


async def keep_checks(
    config: MachineConfig,
    address: str,
    known: Mapping[str, CheckStatus],
    probe: Probe,
    clock: Clock,
    report: Report,
    condemn: Condemn = lambda reason: None,
) -> None:
    """Probe all checks of a machine that has just been found running, until cancelled.

    `condemn` is told, perhaps again and again, why the machine is to be restarted.
    """
    began = clock.monotonic_s()

    async def keep_one(named: NamedCheck) -> None:
        check = named.check
        state = resumed(known.get(named.name))
        while True:
            ok, output = await _probed(probe, check, address)
            age_s = clock.monotonic_s() - began
            after = judge(state, check, ok, output, age_s)
            if worth_reporting(state, after):
                report(as_status(named, after, clock.wall_s()))
            if condemns(after, check, age_s):
                condemn(f"check {named.name} failed {check.restart_limit} times in a row: {after.output}")
            state = after
            await asyncio.sleep(pause_s(state, check, age_s))

    async with asyncio.TaskGroup() as group:
        for named in checks_of(config):
            group.create_task(keep_one(named), name=f"check {named.name} of {address}")


async def _probed(probe: Probe, check: Check, address: str) -> tuple[bool, str]:
    """One probe, never longer than the check's timeout."""
    try:
        async with asyncio.timeout(check.timeout_s):
            return await probe(check, address)
    except TimeoutError:
        return False, f"no answer in {check.timeout_s:g} s"
    except OSError as error:
        return False, str(error)
