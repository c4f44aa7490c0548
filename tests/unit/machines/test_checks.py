from __future__ import annotations

import asyncio

import pytest

from flyd.machines.checks import (
    CRITICAL,
    FAST_INTERVAL_S,
    FAST_STARTUP_S,
    MAX_OUTPUT,
    PASSING,
    WARNING,
    CheckState,
    as_status,
    checks_of,
    judge,
    keep_checks,
    pause_s,
    resumed,
    unprobed,
    worth_reporting,
)
from flyd.model import Check, CheckStatus, MachineConfig, Service

CHECK = Check(kind="http", port=80, interval_s=15.0, grace_period_s=5.0)
CONFIG = MachineConfig(
    image="host:",
    services=(Service(internal_port=80, checks=(CHECK, CHECK)), Service(internal_port=81)),
    checks={"b": CHECK, "a": CHECK},
)


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([(1.0, False)], [WARNING]),
        ([(1.0, False), (4.9, False), (5.0, False)], [WARNING, WARNING, CRITICAL]),
        ([(1.0, True)], [PASSING]),
        ([(9.0, False), (9.5, True)], [CRITICAL, PASSING]),
        ([(1.0, True), (2.0, False)], [PASSING, PASSING]),
        ([(1.0, True), (2.0, False), (2.5, False)], [PASSING, PASSING, CRITICAL]),
        ([(1.0, True), (2.0, False), (2.5, True), (3.0, False)], [PASSING, PASSING, PASSING, PASSING]),
    ],
)
def test_judge(results: list[tuple[float, bool]], expected: list[str]) -> None:
    state, seen = CheckState(), list[str]()
    for age_s, ok in results:
        state = judge(state, CHECK, ok, "x", age_s)
        seen.append(state.status)
    assert seen == expected


def test_output_is_bounded() -> None:
    assert len(judge(CheckState(), CHECK, False, "x" * 10_000, 0.0).output) == MAX_OUTPUT


def test_pace() -> None:
    assert pause_s(CheckState(), CHECK, 1.0) == FAST_INTERVAL_S
    assert pause_s(CheckState(), CHECK, FAST_STARTUP_S) == 15.0
    passing = CheckState(status=PASSING, passed=True)
    assert pause_s(passing, CHECK, 1.0) == 15.0
    assert pause_s(judge(passing, CHECK, False, "", 90.0), CHECK, 90.0) == FAST_INTERVAL_S
    critical = CheckState(status=CRITICAL, passed=True, failures=2)
    assert pause_s(critical, CHECK, 90.0) == 15.0
    assert pause_s(CheckState(), Check(kind="tcp", port=1, interval_s=0.1), 1.0) == 0.1


def test_only_changes_are_worth_reporting() -> None:
    passing = CheckState(status=PASSING, output="200", passed=True)
    assert worth_reporting(CheckState(), passing)
    assert not worth_reporting(passing, CheckState(status=PASSING, output="204", passed=True))
    critical = CheckState(status=CRITICAL, output="refused")
    assert not worth_reporting(critical, critical)
    assert worth_reporting(critical, CheckState(status=CRITICAL, output="timeout"))


def test_names_and_what_gates_routing() -> None:
    named = [(c.name, c.gates_routing) for c in checks_of(CONFIG)]
    assert named == [("service-80-0", True), ("service-80-1", True), ("a", False), ("b", False)]
    assert {c.status for c in unprobed(CONFIG, 1.0)} == {WARNING}


@pytest.mark.parametrize("status", [PASSING, WARNING, CRITICAL])
def test_a_status_is_taken_up_again(status: str) -> None:
    state = resumed(CheckStatus(name="a", status=status, output="x"))
    named = checks_of(CONFIG)[0]
    assert as_status(named, state, 1.0).status == status
    after = judge(state, CHECK, False, "x", 0.0)
    assert after.status == status
    assert resumed(None) == CheckState()


class LoopClock:
    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()

    def wall_s(self) -> float:
        return 5.0


async def test_the_loop_reports_changes_and_bounds_each_probe() -> None:
    answers = {"fine": "ok", "stuck": "hang", "refused": "error"}
    checks = {
        name: Check(kind="tcp", port=1, interval_s=0.005, timeout_s=0.05, grace_period_s=0.0, path=answer)
        for name, answer in answers.items()
    }
    probes = 0

    async def probe(check: Check, address: str) -> tuple[bool, str]:
        nonlocal probes
        probes += 1
        assert address == "127.0.0.1"
        if check.path == "hang":
            await asyncio.Event().wait()
        if check.path == "error":
            raise ConnectionRefusedError("refused")
        return True, "ok"

    reports: list[CheckStatus] = []
    config = MachineConfig(image="host:", checks=checks)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await keep_checks(config, "127.0.0.1", {}, probe, LoopClock(), reports.append)
    assert probes > 10
    assert sorted((r.name, r.status, r.output) for r in reports) == [
        ("fine", PASSING, "ok"),
        ("refused", CRITICAL, "refused"),
        ("stuck", CRITICAL, "no answer in 0.05 s"),
    ]
