from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyd.network.regions import REGIONS, distance_km, nearest_first


@pytest.mark.parametrize(
    ("origin", "regions", "expected"),
    [
        ("fra", ["iad", "sin", "fra"], ("fra", "iad", "sin")),
        ("ams", ["sin", "iad", "fra"], ("fra", "iad", "sin")),
        ("sin", ["fra", "syd", "nrt"], ("nrt", "syd", "fra")),
        ("nrt", ["lax", "lhr"], ("lax", "lhr")),  # across the date line
        ("ams", ["zz", "aa", "lhr"], ("lhr", "aa", "zz")),
        ("moon", ["sin", "moon", "ams"], ("moon", "ams", "sin")),
        ("moon", ["sin", "ams"], ("ams", "sin")),
        ("ams", ["lhr", "lhr"], ("lhr",)),
        ("ams", [], ()),
    ],
)
def test_nearest_first(origin: str, regions: list[str], expected: tuple[str, ...]) -> None:
    assert nearest_first(origin, regions) == expected


@pytest.mark.parametrize(
    ("one", "other", "km"),
    [("lhr", "cdg", 344), ("iad", "fra", 6540), ("sin", "syd", 6300), ("nrt", "lax", 8800)],
)
def test_distances_are_those_of_an_atlas(one: str, other: str, km: int) -> None:
    assert distance_km(REGIONS[one], REGIONS[other]) == pytest.approx(km, rel=0.02)


def test_every_region_is_on_the_globe_under_its_own_code() -> None:
    for code, region in REGIONS.items():
        assert code == region.code
        assert -90 < region.latitude < 90
        assert -180 < region.longitude <= 180


@settings(max_examples=100)
@given(st.sampled_from(sorted(REGIONS)), st.lists(st.sampled_from([*sorted(REGIONS), "x1", "x2"])))
def test_order_is_a_permutation_that_does_not_depend_on_the_input_order(
    origin: str, regions: list[str]
) -> None:
    ordered = nearest_first(origin, regions)
    assert sorted(ordered) == sorted(set(regions))
    assert ordered == nearest_first(origin, list(reversed(regions)))
    if origin in regions:
        assert ordered[0] == origin
