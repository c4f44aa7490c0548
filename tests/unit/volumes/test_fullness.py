"""When a volume's being nearly full is news."""

from __future__ import annotations

import pytest

from flyd.errors import InvalidInput
from flyd.model import Volume
from flyd.storage.fullness import Level, check_extending, grown_gb, level, story


@pytest.mark.parametrize(
    ("before", "used", "now"),
    [
        (Level.ROOMY, 0, Level.ROOMY),
        (Level.ROOMY, 899, Level.ROOMY),
        (Level.ROOMY, 900, Level.NEARLY_FULL),
        (Level.ROOMY, 980, Level.FULL),
        (Level.ROOMY, 1100, Level.FULL),
        (Level.NEARLY_FULL, 880, Level.NEARLY_FULL),  # about the threshold it is told once
        (Level.NEARLY_FULL, 869, Level.ROOMY),
        (Level.FULL, 951, Level.FULL),
        (Level.FULL, 940, Level.NEARLY_FULL),
        (Level.FULL, 100, Level.ROOMY),
    ],
)
def test_levels(before: Level, used: int, now: Level) -> None:
    assert level(before, used, 1000) is now


def test_the_story_says_what_to_do() -> None:
    told = story(Level.FULL, "vol_1", "data", 2)
    assert "writes fail" in told
    assert "fly volumes extend vol_1 --size 3" in told
    assert "nearly" in story(Level.NEARLY_FULL, "vol_1", "data", 2)


@pytest.mark.parametrize(
    ("percent", "by", "limit", "used_gb", "grown"),
    [
        (0, 1, 10, 4.0, 0),
        (90, 1, 10, 3.5, 0),
        (90, 1, 10, 3.7, 5),
        (90, 3, 6, 4.0, 6),  # no further than the ceiling
        (90, 3, 4, 4.0, 0),
        (90, 3, 2, 4.0, 0),  # it was made larger than that by hand
    ],
)
def test_growing(percent: int, by: int, limit: int, used_gb: float, grown: int) -> None:
    volume = Volume(
        id="v", name="n", app="a", region="r", host="h", size_gb=4,
        extend_percent=percent, extend_gb=by, extend_limit_gb=limit,
    )  # fmt: skip
    assert grown_gb(volume, int(used_gb * (1 << 30))) == grown


@pytest.mark.parametrize(
    ("percent", "by", "limit"),
    [
        (49, 1, 10),
        (100, 1, 10),
        (-1, 1, 10),
        (90, 0, 10),
        (90, 101, 10),
        (90, 1, 0),
        (90, 1, 4),
        (90, 1, 501),
    ],
)
def test_growing_that_makes_no_sense(percent: int, by: int, limit: int) -> None:
    with pytest.raises(InvalidInput, match="it must be"):
        check_extending(percent, by, limit, 4, 500)


def test_growing_that_makes_sense() -> None:
    check_extending(0, -7, -7, 4, 500)
    check_extending(50, 100, 500, 4, 500)
