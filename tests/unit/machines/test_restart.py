from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyd.machines.restart import (
    BACKOFF_FIRST_S,
    BACKOFF_MAX_S,
    RESTART_WINDOW_S,
    Again,
    Stay,
    after_exit,
    backoff_s,
    describe,
)
from flyd.model import ExitStatus, RestartPolicy

CLEAN = ExitStatus(code=0)
FAILED = ExitStatus(code=1)
KILLED = ExitStatus(signal=9)
UNSEEN = ExitStatus()


@pytest.mark.parametrize(
    ("policy", "exit", "again"),
    [
        ("no", CLEAN, False),
        ("no", FAILED, False),
        ("on-failure", CLEAN, False),
        ("on-failure", FAILED, True),
        ("on-failure", KILLED, True),
        ("on-failure", UNSEEN, True),
        ("always", CLEAN, True),
        ("always", FAILED, True),
    ],
)
def test_policies(policy: str, exit: ExitStatus, again: bool) -> None:
    assert isinstance(after_exit(RestartPolicy(policy=policy), exit, (), 100.0), Again) is again


def test_retries_are_counted_within_the_window_only() -> None:
    policy = RestartPolicy(policy="on-failure", max_retries=3)
    now = 1000.0
    recent = (now - 3, now - 2, now - 1)
    verdict = after_exit(policy, FAILED, recent, now)
    assert verdict == Stay(reason="exited with code 1; gave up after 3 restarts in 300 s")
    old = (now - RESTART_WINDOW_S, now - 2, now - 1)
    assert after_exit(policy, FAILED, old, now) == Again(delay_s=backoff_s(3))
    assert isinstance(after_exit(RestartPolicy(policy="always"), FAILED, recent * 50, now), Again)


@settings(max_examples=100)
@given(st.integers(0, 10_000))
def test_back_off_grows_to_its_bound(failures: int) -> None:
    assert BACKOFF_FIRST_S <= backoff_s(failures) <= backoff_s(failures + 1) <= BACKOFF_MAX_S


def test_exits_in_words() -> None:
    assert [describe(e) for e in (CLEAN, KILLED, UNSEEN, ExitStatus(oom_killed=True, signal=9))] == [
        "exited with code 0",
        "ended by signal 9",
        "ended unseen",
        "killed: out of memory",
    ]
