"""When a member's disk is low, when it closes and when it opens again; when archiving counts as failing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pgha.disk import FAILING_S, GB, MB, Archiver, Level, Room, failing_since_s, level

SIZES = st.sampled_from([300 * MB, GB, 10 * GB, 100 * GB, 4000 * GB])


def test_limits_of_small_and_large_disks() -> None:
    shown = {
        total: [limit // MB for limit in (room.low(), room.closes(), room.opens())]
        for total in (300 * MB, GB, 100 * GB, 4000 * GB)
        for room in [Room(0, total)]
    }
    assert shown == {
        300 * MB: [160, 64, 128],
        GB: [160, 64, 128],
        100 * GB: [10240, 2048, 4096],
        4000 * GB: [20480, 2048, 4096],
    }


@given(total=SIZES, part=st.floats(0, 1.5), before=st.sampled_from(Level))
def test_what_is_closed_opens_later_than_it_closed(total: int, part: float, before: Level) -> None:
    room = Room(int(Room(0, total).opens() * part), total)
    found = level([room], before)
    if room.free_bytes < room.closes():
        assert found is Level.READ_ONLY
    elif room.free_bytes >= room.opens():
        assert found is not Level.READ_ONLY
    else:
        assert (found is Level.READ_ONLY) == (before is Level.READ_ONLY)
    assert level([room], found) is found  # nothing changes by looking twice


def test_the_worst_place_counts() -> None:
    full, empty = Room(0, GB), Room(GB, GB)
    assert level([empty, full, empty], Level.OK) is Level.READ_ONLY
    assert level([], Level.OK) is Level.OK
    assert level([Room(100 * MB, GB), empty], Level.OK) is Level.LOW


def test_archiving_fails_when_the_next_try_did_not_end_it() -> None:
    now_s = 1e6
    fails = Archiver(failed_s=now_s, failed_segment="S", archived_s=now_s - 5)
    assert failing_since_s(fails, 0, now_s) == (now_s, False)
    later = Archiver(failed_s=now_s + 60, failed_segment="S", archived_s=now_s - 5)
    assert failing_since_s(later, now_s, now_s + FAILING_S) == (now_s, True)
    works = Archiver(failed_s=now_s, failed_segment="S", archived_s=now_s + 60)
    assert failing_since_s(works, now_s, now_s + FAILING_S) == (0, False)
    assert failing_since_s(Archiver(), 0, now_s) == (0, False)
