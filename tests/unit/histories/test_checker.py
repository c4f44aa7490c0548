"""The checker of list-append histories: one history for each anomaly, clean ones, and laws."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from integration.histories.checker import Report, check
from integration.histories.model import Append, Event, Read, Step, Transaction, transactions

Outcome = Literal["ok", "fail", "info"]
SECOND = 10**9


def steps(text: str) -> tuple[Step, ...]:
    """`1+5` appends 5 to 1; `1=5,6` reads it, `1=` empty; `1?` is a read without an answer."""
    found: list[Step] = []
    for word in text.split():
        if "+" in word:
            key, _, value = word.partition("+")
            found.append(Append(int(key), int(value)))
        elif word.endswith("?"):
            found.append(Read(int(word[:-1])))
        else:
            key, _, values = word.partition("=")
            found.append(Read(int(key), tuple(int(v) for v in values.split(",") if v)))
    return tuple(found)


def together(*texts: str) -> list[Transaction]:
    """Transactions that ran side by side; `!` before one that failed, `?` before one that is unknown."""
    made: list[Transaction] = []
    for n, text in enumerate(texts):
        outcome: Outcome = "fail" if text[0] == "!" else "info" if text[0] == "?" else "ok"
        ended = None if outcome == "info" else SECOND + n
        made.append(Transaction(n, n, outcome, steps(text.lstrip("!?")), n, ended))
    return made


def in_turn(*texts: str) -> list[Transaction]:
    """Transactions of which each began a second after the one before had ended."""
    return [
        replace(t, began_ns=2 * n * SECOND, ended_ns=None if t.ended_ns is None else (2 * n + 1) * SECOND)
        for n, t in enumerate(together(*texts))
    ]


ANOMALIES = {
    "garbage": together("1+1", "1=1,7"),
    "duplicate": together("1+1", "1=1,1"),
    "incompatible-order": together("1+1", "1+2", "1=1,2", "1=2"),
    "internal: own append": together("1+1 1=", "1=1"),
    "internal: not the end": together("1+1", "1+2 1=2,1"),
    "internal: changes under it": together("1+1", "1= 1=1"),
    "internal: the future": together("1=1 1+1"),
    "G1a": together("!1+1", "1=1"),
    "G1b": together("1+1 1+2", "1=1"),
    "G0": together("1+1 2+1", "1+2 2+2", "1=1,2", "2=2,1"),
    "G1c": together("1+1 2=1", "2+1 1=1"),
    "G-single": together("1+1 2+1", "1= 2=1", "1=1"),
    "G2-item: write skew": together("1= 2+1", "2= 1+1", "1=1 2=1"),
    "internal: appends out of order": together("1+1 1+2 1+3", "1=2,1,3"),
    "lost: half of what others saw": in_turn("?1+1 2+1", "1=1", "2="),
    "lost": in_turn("1+1", "1+2", "1=1", "1+3", "1=1,3"),
    "stale": in_turn("1+1", "1=", "1=1"),
}


@pytest.mark.parametrize("name", ANOMALIES)
def test_each_anomaly_is_found_and_only_it(name: str) -> None:
    report = check(ANOMALIES[name])
    assert set(report.kinds()) == {name.partition(":")[0]}, report.text()


CLEAN = {
    "one after the other": in_turn("1+1", "1=1", "1+2 2+1", "1=1,2 2=1"),
    "its own appends in the middle": in_turn("1+1 1=1 1+2 1=1,2", "1=1,2"),
    "own appends behind another's": in_turn("1+1", "1+2 1=1,2 1+3", "1=1,2,3"),
    "read, then append": in_turn("1= 1+1 1=1", "1=1"),
    "one that failed and is not seen": in_turn("1+1", "!1+2", "1=1"),
    "unknown, happened": in_turn("?1+1", "1=1"),
    "unknown, happened late": in_turn("?1+1", "1=", "1+2", "1=2", "1=2,1"),
    "unknown, never happened": in_turn("?1+1", "1+2", "1=2"),
    "unknown read": in_turn("?1?", "1+2", "1=2"),
    "side by side, either may be first": together("1+1", "1=", "1=1"),
    "nothing": [],
}


@pytest.mark.parametrize("name", CLEAN)
def test_clean_histories_pass(name: str) -> None:
    report = check(CLEAN[name])
    assert not report.anomalies, report.text()
    assert report.unread == 0


def test_one_that_is_unknown_takes_part_once_it_is_seen() -> None:
    report = check(together("?1+1 2+1", "1=1 2=", "2=1"))
    assert set(report.kinds()) == {"G-single"}


def test_what_is_told() -> None:
    lost = check(ANOMALIES["lost"])
    assert "2 in 1, acknowledged to T1 of process 1 5.00 s before T4" in lost.text()
    stale = check(ANOMALIES["stale"])
    assert stale.stalest_s() == 1.0
    assert check(ANOMALIES["G-single"]).text() == "G-single: T1 -rw 1-> T0 -wr 2-> T1"
    many = check(together(*(f"1+{n} 1=" for n in range(7))))
    assert many.text().splitlines()[-1] == "internal: 7 in all"


def test_an_acknowledged_append_that_nobody_could_see_is_counted() -> None:
    assert check(in_turn("1+1", "1=1", "1+2", "2+1")).unread == 2


def test_a_value_appended_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        check(together("1+1", "1+1"))


def test_long_cycles_and_long_histories() -> None:
    """A ring of three thousand transactions, each of which must come before the next."""
    count = 3_000
    ring = [f"{n}+1 {(n + 1) % count}=1" for n in range(count)]
    assert set(check(together(*ring)).kinds()) == {"G1c"}
    ring[0] = "0+1"
    assert not check(together(*ring)).anomalies


# --------------------------------------------------------------------------- laws

KEYS = (1, 2, 3)


@st.composite
def serial_runs(draw: st.DrawFn) -> list[Event]:
    """What processes see that run side by side while a server does one transaction after the other."""
    lists: dict[int, tuple[int, ...]] = {}
    waiting: dict[int, tuple[int, tuple[Step, ...]]] = {}  # slot: process and what it asked
    answers: dict[int, tuple[Step, ...]] = {}
    events: list[Event] = []
    values, fresh = itertools.count(1), itertools.count(3)
    process = dict.fromkeys(range(3), 0) | {n: n for n in range(3)}

    def say(kind: Literal["invoke", "ok", "fail", "info"], slot: int, said: tuple[Step, ...]) -> None:
        events.append(Event(kind, process[slot], len(events), said))

    for slot in draw(st.lists(st.integers(0, 2), max_size=60)):
        if slot not in waiting:
            shape = draw(st.lists(st.tuples(st.booleans(), st.sampled_from(KEYS)), min_size=1, max_size=4))
            asked = tuple(Append(k, next(values)) if append else Read(k) for append, k in shape)
            waiting[slot] = (process[slot], asked)
            say("invoke", slot, asked)
        elif slot not in answers and draw(st.integers(0, 5)) > 0:
            answers[slot] = apply(waiting[slot][1], lists)
        else:
            asked = waiting.pop(slot)[1]
            done = answers.pop(slot, None)
            if draw(st.integers(0, 5)) == 0:
                say("info", slot, asked)
                process[slot] = next(fresh)
            else:
                say("ok" if done else "fail", slot, done or asked)
    last = tuple(Read(key, lists.get(key, ())) for key in KEYS)
    events.append(Event("invoke", 1000, len(events), tuple(Read(key) for key in KEYS)))
    events.append(Event("ok", 1000, len(events), last))
    return events


def apply(asked: Iterable[Step], lists: dict[int, tuple[int, ...]]) -> tuple[Step, ...]:
    """Do a transaction; what it answers."""
    done: list[Step] = []
    for step in asked:
        if isinstance(step, Append):
            lists[step.key] = (*lists.get(step.key, ()), step.value)
            done.append(step)
        else:
            done.append(Read(step.key, lists.get(step.key, ())))
    return tuple(done)


@given(serial_runs())
def test_a_serial_server_shows_no_anomaly(events: list[Event]) -> None:
    report = check(transactions(events))
    assert not report.anomalies, report.text()
    assert report.unread == 0


@given(serial_runs(), st.data())
def test_a_change_of_what_was_seen_is_found(events: list[Event], data: st.DataObject) -> None:
    history = transactions(events)
    final = history[-1]
    seen = [(r.key, v) for r in final.steps if isinstance(r, Read) for v in r.values or ()]
    writers = {(s.key, s.value): t for t in history for s in t.steps if isinstance(s, Append)}
    acknowledged = [(key, value) for key, value in seen if writers[key, value].outcome == "ok"]
    if not acknowledged:
        return
    key, value = data.draw(st.sampled_from(acknowledged))
    kind = data.draw(st.sampled_from(("lost", "duplicate", "garbage", "G1a")))
    changed = list(history)
    if kind == "G1a":
        number = writers[key, value].number
        changed[number] = replace(history[number], outcome="fail")
    else:
        changed[-1] = replace(final, steps=tuple(tamper(s, kind, key, value) for s in final.steps))
    assert kind in check(changed).kinds()


def tamper(step: Step, kind: str, key: int, value: int) -> Step:
    """The final read of a key, with one value gone, twice, or one of nobody's."""
    if not isinstance(step, Read) or step.key != key:
        return step
    values = step.values or ()
    if kind == "lost":
        return Read(key, tuple(v for v in values if v != value))
    return Read(key, (*values, value if kind == "duplicate" else 10**6))


@st.composite
def small_histories(draw: st.DrawFn) -> list[Transaction]:
    """A few transactions side by side, any of whose reads may have seen anything in a common order."""
    count = draw(st.integers(1, 4))
    shapes = [
        draw(st.lists(st.tuples(st.booleans(), st.sampled_from(KEYS[:2])), min_size=1, max_size=3))
        for _ in range(count)
    ]
    values = itertools.count(1)
    asked = [[Append(k, next(values)) if append else Read(k) for append, k in shape] for shape in shapes]
    appends = [step for t in asked for step in t if isinstance(step, Append)]
    orders = {
        key: tuple(draw(st.permutations([step.value for step in appends if step.key == key])))
        for key in KEYS[:2]
    }

    def answer(step: Step) -> Step:
        if isinstance(step, Append):
            return step
        return Read(step.key, orders[step.key][: draw(st.integers(0, len(orders[step.key])))])

    done = [tuple(answer(step) for step in t) for t in asked]
    done.append(tuple(Read(key, orders[key]) for key in KEYS[:2]))
    return [Transaction(n, n, "ok", t, n, SECOND + n) for n, t in enumerate(done)]


def explained(history: list[Transaction]) -> bool:
    """Whether some order, one after the other, would have answered just so: by trying them all."""
    for order in itertools.permutations(history):
        lists: dict[int, tuple[int, ...]] = {}
        if all(apply(t.steps, lists) == t.steps for t in order):
            return True
    return False


@given(small_histories())
def test_an_anomaly_is_found_exactly_where_no_serial_order_explains_it(history: list[Transaction]) -> None:
    report: Report = check(history)
    assert bool(report.anomalies) != explained(history), report.text()
