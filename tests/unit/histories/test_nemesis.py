"""The nemesis: every fault once a round, in an order that the seed decides."""

from __future__ import annotations

import pytest

from integration.histories.nemesis import Hurt, Plan, counted, hurt

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
