"""When a backup is due, when one is tried, and what retention drops."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pgha.backup_plan import (
    CLAIM_S,
    RETRY_S,
    Drill,
    DrillResult,
    Schedule,
    backup_due,
    broken,
    claimable,
    drill_due,
    expired,
    forgotten,
)
from pgha.model import Backup

DAY_S = 86400.0
DAILY = Schedule(every_s=DAY_S, keep=3, verify_every_s=7 * DAY_S)


def complete(name: str, at_s: float) -> Backup:
    return Backup(name=name, requested_at_s=at_s, finished_at_s=at_s + 10)


def failed(name: str, at_s: float) -> Backup:
    return Backup(name=name, requested_at_s=at_s, error="no")


def result(backup: str, at_s: float, error: str = "", *, tried: bool = True) -> DrillResult:
    return DrillResult(
        backup=backup, node="b", requested_at_s=at_s, finished_at_s=at_s, error=error, tried=tried
    )


def test_a_backup_is_due() -> None:
    now = 100 * DAY_S
    assert backup_due(DAILY, [], now)
    assert not backup_due(None, [], now)
    assert not backup_due(DAILY, [complete("a", now - DAY_S + 1)], now)
    assert backup_due(DAILY, [complete("a", now - DAY_S)], now)
    assert not backup_due(DAILY, [complete("a", now - 9 * DAY_S), Backup(name="b", requested_at_s=now)], now)
    assert not backup_due(DAILY, [failed("a", now - RETRY_S + 1)], now)
    assert backup_due(DAILY, [failed("a", now - RETRY_S)], now)


@given(away_days=st.floats(1, 400), looks=st.integers(2, 20))
def test_one_backup_makes_up_for_all_that_were_missed(away_days: float, looks: int) -> None:
    now, backups = 1000 * DAY_S, [complete("before", 1000 * DAY_S - away_days * DAY_S)]
    for look in range(looks):
        if backup_due(DAILY, backups, now + look):
            backups.append(complete(f"n{look}", now + look))
    assert len(backups) == 2


def test_a_trial_is_due() -> None:
    now, two = 100 * DAY_S, [complete("a", 98 * DAY_S), complete("b", 99 * DAY_S)]
    assert drill_due(DAILY, two, [], now) == "b"
    assert drill_due(DAILY, [], [], now) == drill_due(None, two, [], now) == ""
    assert drill_due(Schedule(every_s=DAY_S, keep=3), two, [], now) == ""
    assert drill_due(DAILY, two, [result("a", now - 7 * DAY_S + 1)], now) == ""
    assert drill_due(DAILY, [*two, failed("c", now)], [result("a", now - 7 * DAY_S)], now) == "b"


def test_who_may_begin_a_trial() -> None:
    at_it = Drill(backup="a", requested_at_s=0, node="b", seen_at_s=1000)
    assert claimable(Drill(backup="a", requested_at_s=0), "c", 0)
    assert claimable(at_it, "b", 1000)
    assert not claimable(at_it, "c", 1000 + CLAIM_S)
    assert claimable(at_it, "c", 1001 + CLAIM_S)


backups_made = st.lists(st.sampled_from("+-x"), max_size=12).map(
    lambda kinds: [
        failed(f"{n}", n * 100.0) if kind == "-" else complete(f"{n}{kind}", n * 100.0)
        for n, kind in enumerate(kinds)
    ]
)


@given(made=backups_made, keep=st.integers(1, 5))
def test_the_newest_good_ones_stay_and_all_that_is_younger(made: list[Backup], keep: int) -> None:
    bad = broken([result(b.name, 0, "damaged") for b in made if b.name.endswith("x")])
    gone = expired(made, bad, keep)
    good = [b.name for b in made if b.name.endswith("+")]
    assert [name for name in good if name not in gone] == (good[-keep:] if len(good) > keep else good)
    kept = [b for b in made if b.finished_at_s and b.name not in gone]
    kept_from_s = min((b.finished_at_s for b in kept), default=0.0)
    assert all(b.finished_at_s < kept_from_s for b in made if b.name in gone)
    assert not expired(kept, bad, keep)


def test_a_trial_that_was_not_made_says_nothing_of_the_backup() -> None:
    assert broken([result("a", 0, "no room", tried=False), result("b", 0), result("c", 0, "torn")]) == {"c"}


def test_records_go_with_what_they_are_about() -> None:
    there = [complete("b", 200), complete("c", 300)]
    recorded = [complete("a", 100), *there, failed("old", 150), failed("new", 250)]
    assert forgotten(recorded, there) == ["a", "old"]
    assert forgotten([failed("x", 1)], []) == []
