"""History files are Elle's: what we write is read back, and Elle's own examples are read."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from integration.histories import edn
from integration.histories.model import Append, Event, Read, transactions

KEYS = st.integers(0, 10**6)
STEPS = st.one_of(
    st.builds(Append, KEYS, st.integers(0, 2**62)),
    st.builds(Read, KEYS, st.none() | st.lists(st.integers(0, 99), max_size=9).map(tuple)),
)
EVENTS = st.builds(
    Event,
    st.sampled_from(("invoke", "ok", "fail", "info")),
    st.integers(0, 99),
    st.integers(0, 2**62),
    st.lists(STEPS, max_size=4).map(tuple),
    st.text(max_size=20),
)


@given(EVENTS)
def test_what_is_written_is_read(event: Event) -> None:
    assert edn.parse(edn.line(event, 0), "here", {}) == event


def test_a_file_is_in_the_order_of_time(tmp_path: Path) -> None:
    begin, end = Event("invoke", 1, 1, (Read(1),)), Event("ok", 1, 2, (Read(1, (5,)),))
    edn.write(tmp_path / "history.edn", [end, begin])
    assert edn.read(tmp_path / "history.edn") == [begin, end]


def test_the_line_is_elles() -> None:
    event = Event("ok", 0, 17, (Append(3, 1), Read(4, (1, 2)), Read(5)), 'said "no"')
    assert edn.line(event, 1) == (
        "{:type :ok, :f :txn, :value [[:append 3 1] [:r 4 [1 2]] [:r 5 nil]], "
        ':process 0, :time 17, :index 1, :error "said \\"no\\""}'
    )


def test_other_ways_to_write_it_are_read(tmp_path: Path) -> None:
    path = tmp_path / "history.edn"
    path.write_text(
        "{:index 0 :type :invoke :process 1 :time 0 :value [[:append 253 1] [:r 255 nil]]}\n\n"
        "{:value [[:append, 253, 1], [:r 255 []]]  :process 1, :type :ok :time 5 :f :txn, :index 1}\n"
        "{:type :invoke, :f :txn, :value [[:app"
    )
    begun, ended = edn.read(path)
    assert begun.steps == (Append(253, 1), Read(255))
    assert ended.steps == (Append(253, 1), Read(255, ()))
    (transaction,) = transactions([ended, begun])
    assert (transaction.outcome, transaction.began_ns, transaction.ended_ns) == ("ok", 0, 5)


@pytest.mark.parametrize(
    "text",
    [
        "{:type :ok}",
        "[1 2]",
        "{:type :done, :value [], :process 1, :time 1}",
        "{:type :ok, :value [[:cas 1 2]], :process 1, :time 1}",
        "{:type :ok, :value [[:r 1 [2]], :process 1, :time 1}",
        "{:type :ok, :value [[:r one [2]]], :process 1, :time 1}",
        "{:type :ok, :value [], :process 1, :time 1} {}",
        "{:type :ok, :value [], :process 1, :time}",
        "nonsense",
    ],
)
def test_a_line_that_is_none_is_refused_with_its_place(tmp_path: Path, text: str) -> None:
    path = tmp_path / "history.edn"
    path.write_text(f"\n{text}\n")
    with pytest.raises(ValueError, match=r"history\.edn:2"):
        edn.read(path)


def test_a_history_that_no_processes_can_have_is_refused() -> None:
    begin, end = Event("invoke", 1, 1, (Append(1, 1),)), Event("ok", 1, 2, (Append(1, 1),))
    with pytest.raises(ValueError, match="never began"):
        transactions([end])
    with pytest.raises(ValueError, match="twice"):
        transactions([begin, begin])
    with pytest.raises(ValueError, match="another"):
        transactions([begin, Event("ok", 1, 2, (Append(1, 2),))])


def test_without_an_end_it_is_unknown() -> None:
    (left,) = transactions([Event("invoke", 1, 1, (Append(1, 1),))])
    assert (left.outcome, left.ended_ns) == ("info", None)
