"""The nemesis: every fault once a round, in an order that the seed decides."""

from __future__ import annotations

import pytest

from integration.histories.checker import Anomaly
from integration.histories.nemesis import Harm, Hurt, Plan, counted, hurt, pauses, unexcused

NAMES = ("cut", "freeze", "kill", "move")


async def done_with(seed: int, kinds: int) -> list[str]:
    done: list[str] = []

    def fault(name: str) -> Hurt:
        async def harm() -> None:
            done.append(name)

        return harm

    plan = Plan(minutes=0, seed=seed)
    told = await hurt(plan, {name: fault(name) for name in NAMES}, kinds)
    assert [harm.name for harm in told] == done
    assert len(counted(told)) >= kinds
    return done


async def test_even_without_time_so_many_kinds_are_done() -> None:
    assert len(await done_with(1, 3)) == 3
    assert sorted(await done_with(1, 4)) == sorted(NAMES)


async def test_the_seed_decides_the_order() -> None:
    assert await done_with(7, 4) == await done_with(7, 4)
    assert len({tuple(await done_with(seed, 4)) for seed in range(20)}) > 5


async def test_a_fault_that_does_not_heal_ends_it() -> None:
    async def never_well() -> None:
        raise AssertionError("not within 60 s")

    with pytest.raises(AssertionError, match="not within"):
        await hurt(Plan(1, 1), {"cut": never_well}, 1)


def test_time_and_seed_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLY_HISTORY_MINUTES", "30")
    monkeypatch.setenv("FLY_HISTORY_SEED", "8")
    assert Plan.from_environment(1) == Plan(30, 8)
    monkeypatch.delenv("FLY_HISTORY_MINUTES")
    assert Plan.from_environment(1) == Plan(1, 8)


def test_a_stale_read_is_excused_by_a_frozen_primary_and_nothing_else_is() -> None:
    done = [Harm("host killed", 0, 10), Harm("host frozen", 20, 30), Harm("cut off", 40, 50)]

    def left(kind: str, at_ns: int) -> bool:
        return bool(unexcused([Anomaly(kind, "", (), 0.5, at_ns)], done))

    assert [at_ns for at_ns in (5, 15, 20, 30, 35, 45) if left("stale", at_ns)] == [5, 15, 35]
    assert left("lost", 25)
    assert left("G-single", 25)


def test_the_longest_pause_of_each_kind_of_fault() -> None:
    ms = 10**6
    done = [
        Harm("kill", 100 * ms, 900 * ms),
        Harm("cut", 2000 * ms, 2500 * ms),
        Harm("kill", 3000 * ms, 3900 * ms),
    ]
    acked = [t * ms for t in (90, 120, 150, 700, 800, 1950, 2600, 3010, 3500, 3600, 5000)]
    assert pauses(acked, done) == {"kill": 1.4, "cut": 0.65}
    assert pauses([], done) == {"kill": 0.0, "cut": 0.0}
