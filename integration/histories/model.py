"""What a history is made of: list-append transactions of processes that do one after the other.

The model is Elle's (Kingsbury and Alvaro, "Elle: Inferring Isolation Anomalies from Experimental
Observations", VLDB 2020). A key holds a list; a transaction appends values, each unique for its key, and
reads whole lists. So a read tells the order in which everything in it was written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Type = Literal["invoke", "ok", "fail", "info"]
"""A transaction begins; committed; certainly did not commit; nobody knows, it may yet."""


@dataclass(frozen=True, slots=True)
class Append:
    """Put a value behind the list of a key."""

    key: int
    value: int


@dataclass(frozen=True, slots=True)
class Read:
    """See the whole list of a key; None until it has been seen."""

    key: int
    values: tuple[int, ...] | None = None


Step = Append | Read


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a history: a transaction begins, or ends. Times are of one clock for all processes."""

    type: Type
    process: int
    time_ns: int
    steps: tuple[Step, ...]
    error: str = ""


@dataclass(frozen=True, slots=True)
class Transaction:
    """A beginning with its end. One without an end is `info`."""

    number: int  # by beginning
    process: int
    outcome: Literal["ok", "fail", "info"]
    steps: tuple[Step, ...]  # as they ended; reads without an answer have None
    began_ns: int
    ended_ns: int | None  # None: not known that it did


def transactions(history: Iterable[Event]) -> list[Transaction]:
    """The transactions of a history, by beginning.

    Raises ValueError for what no run of processes can give: an end without a beginning, a second
    beginning before the end, an append that ends as another.
    """
    begun: list[Event] = []
    ended: dict[int, Event] = {}
    running: dict[int, int] = {}
    for event in sorted(history, key=lambda e: e.time_ns):
        if event.type == "invoke":
            if event.process in running:
                raise ValueError(f"process {event.process} begins twice at {event.time_ns}")
            running[event.process] = len(begun)
            begun.append(event)
        else:
            number = running.pop(event.process, None)
            if number is None:
                raise ValueError(f"process {event.process} ends what it never began at {event.time_ns}")
            if not _same(begun[number].steps, event.steps):
                raise ValueError(f"process {event.process} ends another transaction at {event.time_ns}")
            ended[number] = event
    return [_transaction(n, event, ended.get(n)) for n, event in enumerate(begun)]


def _transaction(number: int, begin: Event, end: Event | None) -> Transaction:
    if end is None or end.type == "info":
        return Transaction(number, begin.process, "info", begin.steps, begin.time_ns, None)
    outcome = "ok" if end.type == "ok" else "fail"
    return Transaction(number, begin.process, outcome, end.steps, begin.time_ns, end.time_ns)


def _same(begun: tuple[Step, ...], ended: tuple[Step, ...]) -> bool:
    return len(begun) == len(ended) and all(
        a == b if isinstance(a, Append) else isinstance(b, Read) and a.key == b.key
        for a, b in zip(begun, ended, strict=True)
    )
