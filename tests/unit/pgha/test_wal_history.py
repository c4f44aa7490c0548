"""What of an archive is history: forks, what restores may read, what retention may delete."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pgha.wal import PLACEHOLDER, SEGMENT_BYTES
from pgha.wal_history import (
    Base,
    Fork,
    Histories,
    Segment,
    ends,
    fits,
    forks,
    newest,
    numbered,
    reach,
    segment,
    unneeded,
    valid_bytes,
)

MB = 1 << 20
WAY = {2: 5 * SEGMENT_BYTES + MB, 3: 9 * SEGMENT_BYTES, 4: None}


def names(*places: tuple[int, int]) -> list[str]:
    return [Segment(*place).name() for place in places]


def test_names() -> None:
    assert Segment(3, 0x105).name() == "000000030000000100000005"
    assert segment("000000030000000100000005") == Segment(3, 0x105)
    for name in ("00000003.history", "000000030000000100000005.partial", ".000000030000000100000005.n.7"):
        assert segment(name) is None
    for tail in ("", ".partial", ".00000028.backup"):
        assert numbered("000000030000000100000005" + tail) == 0x105
    assert numbered("00000003.history") is None


def test_a_history_file() -> None:
    text = "1\t0/1558D00\tno recovery target specified\n\n2\t1/5000018\tno recovery target specified\n"
    assert forks(text) == (Fork(1, 0x1558D00), Fork(2, 0x105000018))
    assert forks(PLACEHOLDER) is None


def test_only_what_lies_before_a_fork_counts() -> None:
    expected = {(2, 4): SEGMENT_BYTES, (2, 5): MB, (2, 6): 0, (3, 8): SEGMENT_BYTES, (3, 9): 0, (7, 1): 0}
    assert {place: valid_bytes(Segment(*place), WAY) for place in expected} == expected
    assert valid_bytes(Segment(4, 99), WAY) == SEGMENT_BYTES


def test_a_backup_of_what_an_old_primary_did_alone_does_not_fit() -> None:
    fork = WAY[2]
    assert fork is not None
    assert fits(Base(Segment(2, 5), fork), WAY)
    assert not fits(Base(Segment(2, 5), fork + 1), WAY)
    assert not fits(Base(Segment(7, 5), 0), WAY)
    known: Histories = {2: (Fork(1, 0),), 4: (Fork(1, 0), Fork(2, fork))}  # 3 never was
    assert ends(known, newest(known)) == {1: 0, 2: fork, 4: None}


def test_reach_ends_at_the_first_gap() -> None:
    base = Segment(2, 4)
    assert reach(names((2, 4), (2, 5), (3, 5), (3, 6)), base, WAY) == Segment(3, 6)
    assert reach(names((2, 4), (2, 5), (3, 6), (3, 7)), base, WAY) == Segment(
        2, 5
    )  # 3's own beginning is not
    assert reach(names((2, 4), (3, 5), (3, 7)), base, WAY) == Segment(3, 5)
    assert reach(names((2, 5), (3, 5)), base, WAY) is None
    assert reach(names((2, 4), (2, 5), (2, 6)), base, WAY) == Segment(2, 5)  # 2/6 lies behind the fork


@st.composite
def archives(draw: st.DrawFn) -> tuple[list[str], dict[int, int | None], list[Segment]]:
    """A whole archive of some timelines, with what lies behind forks; base backups on the way."""
    way: dict[int, int | None] = {}
    there: list[str] = []
    bases: list[Segment] = []
    at, timelines = SEGMENT_BYTES, draw(st.integers(1, 4))
    for timeline in range(1, timelines + 1):
        end = at + draw(st.integers(0, 4 * SEGMENT_BYTES))
        last = (end - 1) // SEGMENT_BYTES + draw(st.integers(0, 2))
        numbers = range(at // SEGMENT_BYTES, last + 1)
        there += [Segment(timeline, number).name() for number in numbers]
        there += [f"{timeline:08X}.history"] * (timeline > 1)
        way[timeline] = end if timeline < timelines else None
        bases += [Segment(timeline, n) for n in numbers if valid_bytes(Segment(timeline, n), way)]
        at = end
    return there, way, draw(st.lists(st.sampled_from(bases or [Segment(1, 1)]), min_size=1, max_size=4))


@given(archive=archives())
def test_retention_leaves_every_kept_backup_all_that_it_could_be_restored_to(
    archive: tuple[list[str], dict[int, int | None], list[Segment]],
) -> None:
    there, way, kept = archive
    gone = frozenset(unneeded(there, kept))
    left = [name for name in there if name not in gone]
    for base in kept:
        assert reach(left, base, way) == reach(there, base, way)
    assert not any(name.endswith(".history") for name in gone)
    assert all((numbered(name) or 0) >= min(base.number for base in kept) for name in left if segment(name))
    assert unneeded(there, []) == []
