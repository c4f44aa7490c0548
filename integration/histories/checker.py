"""What a list-append history shows that it should not: Adya's anomalies by Elle's inference, and losses.

Pure; linear in the history as long as it is sound (a component with a cycle costs one search an edge).
Appended values are unique, so the longest read of a key is the order of its versions and every other read
must be a beginning of it. From that order come the edges between transactions: ww (appended next), wr (read
what it appended), rw (read the version that it replaced).

Transactions that are `info` may or may not have happened, as in Elle: one whose value was read did, and takes
part; one that no read shows takes no part, and is no loss. One that failed must never be read.

    garbage            a value that nobody appended
    duplicate          a value twice in one list
    incompatible-order two reads of a key, neither the beginning of the other
    internal           a transaction that does not see its own appends, or sees a key change under it
    G1a                a value of a transaction that failed
    G1b                a list as it was in the middle of another transaction
    G0                 a cycle of ww
    G1c                a cycle of ww and wr
    G-single           a cycle with one rw
    G2-item            a cycle with more
    lost               acknowledged, or seen, before the last read of its key began, and not in it
    stale              acknowledged to somebody before the reader began, and not in what it read

`stale` is the real-time part of strict serializability, as far as one key shows it; no cycle is sought there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from integration.histories.graph import Edge, components, cycle
from integration.histories.model import Append, Read, Transaction

DESCRIBED = 5  # of a kind; the rest is counted
SEARCHES = 2000  # edges of one component that a cycle is sought through, before a lesser kind is


class Anomaly(NamedTuple):
    """One finding, for a person."""

    kind: str
    what: str
    numbers: tuple[int, ...]  # of the transactions in it
    late_s: float = 0.0  # of a stale read: how long the newer value had been acknowledged
    at_ns: int = 0  # of a stale read: when it began


class Observation(NamedTuple):
    """What a committed transaction read of a key."""

    reader: Transaction
    key: int
    values: tuple[int, ...]


@dataclass
class Report:
    """All that was found."""

    outcomes: Counter[str]
    anomalies: list[Anomaly] = field(default_factory=list[Anomaly])
    unread: int = 0  # appends that happened, to keys that nobody read afterwards: nothing is known of them

    def kinds(self) -> Counter[str]:
        """How often each anomaly was found."""
        return Counter(anomaly.kind for anomaly in self.anomalies)

    def stalest_s(self) -> float:
        """Of the stale reads, the stalest."""
        return max((anomaly.late_s for anomaly in self.anomalies), default=0.0)

    def text(self) -> str:
        """The first few of each kind."""
        shown: Counter[str] = Counter()
        lines: list[str] = []
        for anomaly in self.anomalies:
            shown[anomaly.kind] += 1
            if shown[anomaly.kind] <= DESCRIBED:
                lines.append(f"{anomaly.kind}: {anomaly.what}")
        return "\n".join([*lines, *(f"{k}: {n} in all" for k, n in shown.items() if n > DESCRIBED)])


def check(history: list[Transaction]) -> Report:
    """Everything that is wrong with a history. Raises ValueError if a value is appended twice to a key."""
    return _Check(history).report


class _Check:
    """One history, its indices, and what was found."""

    def __init__(self, history: list[Transaction]) -> None:
        self.report = Report(Counter(t.outcome for t in history))
        self._writers: dict[tuple[int, int], Transaction] = {}
        self._last: dict[tuple[int, int], int] = {}  # by transaction and key: its last append
        for t in history:
            for step in t.steps:
                if isinstance(step, Append):
                    if (step.key, step.value) in self._writers:
                        raise ValueError(f"{step.value} is appended to {step.key} twice: nothing can be told")
                    self._writers[step.key, step.value] = t
                    self._last[t.number, step.key] = step.value
        self._all = history
        self._committed = [t for t in history if t.outcome == "ok"]
        self._reads = [
            Observation(t, s.key, s.values)
            for t in self._committed
            for s in t.steps
            if isinstance(s, Read) and s.values is not None
        ]
        self._orders: dict[int, tuple[int, ...]] = {}
        self._find_orders()
        self._find_garbage()
        self._find_internal()
        self._find_disorder()
        looks = [look for t in self._committed for look in _first_looks(t)]
        self._find_intermediate(looks)
        self._find_cycles(looks)
        self._find_lost()
        self._find_stale(looks)

    def _found(self, kind: str, what: str, *numbers: int) -> None:
        self.report.anomalies.append(Anomaly(kind, what, numbers))

    # ----------------------------------------------------------------- one key

    def _find_orders(self) -> None:
        longest: dict[int, tuple[Transaction, tuple[int, ...]]] = {}
        for reader, key, values in self._reads:
            if key not in longest or len(values) > len(longest[key][1]):
                longest[key] = (reader, values)
        for reader, key, values in self._reads:
            other, order = longest[key]
            if order[: len(values)] != values:
                what = f"of {key}, T{reader.number} read {_list(values)} and T{other.number} {_list(order)}"
                self._found("incompatible-order", what, reader.number, other.number)
                self._find_duplicates(reader, key, values)
        for key, (reader, values) in longest.items():
            self._find_duplicates(reader, key, values)
            self._orders[key] = values

    def _find_duplicates(self, reader: Transaction, key: int, values: tuple[int, ...]) -> None:
        if len(set(values)) < len(values):
            twice = sorted(value for value, count in Counter(values).items() if count > 1)
            self._found("duplicate", f"T{reader.number} read {twice} twice in {key}", reader.number)

    def _find_garbage(self) -> None:
        """Values of nobody, or of a transaction that failed; each told of its first reader."""
        told: set[tuple[int, int]] = set()
        known = {key: frozenset(order) for key, order in self._orders.items() if self._sound(key, order)}
        for reader, key, values in self._reads:
            if key in known and known[key].issuperset(values):
                continue
            for value in values:
                writer = self._writers.get((key, value))
                if (key, value) in told or (writer is not None and writer.outcome != "fail"):
                    continue
                told.add((key, value))
                if writer is None:
                    what = f"T{reader.number} read {value} in {key}, which nobody appended"
                    self._found("garbage", what, reader.number)
                else:
                    what = f"T{reader.number} read {value} in {key}, of T{writer.number}, which failed"
                    self._found("G1a", what, reader.number, writer.number)

    def _sound(self, key: int, order: tuple[int, ...]) -> bool:
        writers = (self._writers.get((key, value)) for value in order)
        return all(writer is not None and writer.outcome != "fail" for writer in writers)

    def _find_internal(self) -> None:
        for t in self._committed:
            own: dict[int, tuple[int, ...]] = {}
            full: dict[int, tuple[int, ...]] = {}  # what it has to read, once it has read
            for step in t.steps:
                if isinstance(step, Append):
                    own[step.key] = (*own.get(step.key, ()), step.value)
                    if step.key in full:
                        full[step.key] = (*full[step.key], step.value)
                    continue
                values, mine = step.values or (), own.get(step.key, ())
                if step.key in full:
                    good, wanted = values == full[step.key], _list(full[step.key])
                else:
                    good, wanted = values[len(values) - len(mine) :] == mine, f"[... {_list(mine)[1:]}"
                if not good:
                    what = f"T{t.number} read {_list(values)} in {step.key}, not {wanted}"
                    self._found("internal", what, t.number)
                full[step.key] = values

    def _find_disorder(self) -> None:
        """A transaction's appends to a key, in another order than its own."""
        places = {(key, v): n for key, order in self._orders.items() for n, v in enumerate(order)}
        for t in self._all:
            latest: dict[int, int] = {}
            for step in t.steps:
                place = places.get((step.key, step.value)) if isinstance(step, Append) else None
                if place is None:
                    continue
                if place < latest.get(step.key, place):
                    self._found("internal", f"T{t.number}'s appends to {step.key} changed places", t.number)
                latest[step.key] = place

    def _find_intermediate(self, looks: list[Observation]) -> None:
        for reader, key, values in looks:
            writer = self._writers.get((key, values[-1])) if values else None
            if writer is reader:
                what = f"T{reader.number} read {values[-1]} in {key}, which it appends later"
                self._found("internal", what, reader.number)
            elif writer is not None and (last := self._last[writer.number, key]) != values[-1]:
                what = f"T{reader.number} read {key} up to {values[-1]}, T{writer.number} went on to {last}"
                self._found("G1b", what, reader.number, writer.number)

    # ----------------------------------------------------------------- between transactions

    def _edges(self, looks: list[Observation]) -> Iterator[Edge]:
        for key, order in self._orders.items():
            writers = [self._writers.get((key, value)) for value in order]
            for before, after in pairwise(writers):
                yield from _edge("ww", key, before, after)
        for reader, key, values in looks:
            order = self._orders[key]
            if order[: len(values)] != values:
                continue  # already told; of such a read nothing can be inferred
            if values:
                yield from _edge("wr", key, self._writers.get((key, values[-1])), reader)
            if len(values) < len(order):
                yield from _edge("rw", key, reader, self._writers.get((key, order[len(values)])))

    def _find_cycles(self, looks: list[Observation]) -> None:
        graph: dict[int, list[Edge]] = {}
        for edge in self._edges(looks):
            graph.setdefault(edge.source, []).append(edge)
        seen: set[int] = set()  # in a worse cycle already
        for kind, first, rest in (
            ("G0", "ww", ("ww",)),
            ("G1c", "wr", ("ww", "wr")),
            ("G-single", "rw", ("ww", "wr")),
            ("G2-item", "rw", ("ww", "wr", "rw")),
        ):
            allowed = {first, *rest}
            for component in components(graph, lambda edge, allowed=allowed: edge.kind in allowed):
                starts = [
                    edge
                    for number in sorted(component - seen)
                    for edge in graph[number]
                    if edge.kind == first and edge.target in component
                ]
                for start in starts[:SEARCHES]:
                    found = cycle(graph, start, component, lambda edge, rest=rest: edge.kind in rest)
                    if found:
                        seen |= {edge.source for edge in found}
                        self._found(kind, _told(found), *(edge.source for edge in found))
                        break

    # ----------------------------------------------------------------- real time

    def _find_lost(self) -> None:
        """Against the last read of each key to begin."""
        final: dict[int, tuple[Transaction, frozenset[int]]] = {}
        for reader, key, values in self._reads:
            if key not in final or reader.number >= final[key][0].number:
                final[key] = (reader, frozenset(values))
        known_ns = self._known_since()
        for (key, value), writer in self._writers.items():
            since_ns = known_ns.get(writer.number)
            reader, values = final.get(key, (None, frozenset[int]()))
            if since_ns is None or value in values:
                continue
            if reader is None or reader.began_ns < since_ns:
                self.report.unread += 1
                continue
            how = "acknowledged to" if writer.outcome == "ok" else "appended by (its other values were read)"
            late_s = (reader.began_ns - since_ns) / 1e9
            what = f"{value} in {key}, {how} T{writer.number} of process {writer.process} "
            what += f"{late_s:.2f} s before T{reader.number} read the key for the last time"
            self._found("lost", what, writer.number, reader.number)

    def _known_since(self) -> dict[int, int]:
        """When each transaction that happened was known to have: acknowledged, or seen by another."""
        known = {t.number: t.ended_ns for t in self._committed if t.ended_ns is not None}
        for reader, key, values in self._reads:
            writer = self._writers.get((key, values[-1])) if values else None
            if writer is not None and writer.outcome == "info" and reader.ended_ns is not None:
                known[writer.number] = min(known.get(writer.number, reader.ended_ns), reader.ended_ns)
        return known

    def _find_stale(self, looks: list[Observation]) -> None:
        earliest: dict[int, list[float]] = {}  # by key and length: when anything behind it was acknowledged
        for key, order in self._orders.items():
            known = [math.inf] * (len(order) + 1)
            for place in range(len(order) - 1, -1, -1):
                writer = self._writers.get((key, order[place]))
                acknowledged = writer.ended_ns if writer is not None and writer.outcome == "ok" else None
                known[place] = min(known[place + 1], math.inf if acknowledged is None else acknowledged)
            earliest[key] = known
        for reader, key, values in looks:
            if self._orders[key][: len(values)] != values:
                continue
            late_s = (reader.began_ns - earliest[key][len(values)]) / 1e9
            if late_s > 0:
                what = f"T{reader.number} of process {reader.process} read {len(values)} values of {key}, "
                what += f"the next had been acknowledged {late_s:.3f} s before it began"
                found = Anomaly("stale", what, (reader.number,), late_s, reader.began_ns)
                self.report.anomalies.append(found)


def _first_looks(t: Transaction) -> Iterator[Observation]:
    """Its reads of keys that it has not touched before: what others had written until then."""
    touched: set[int] = set()
    for step in t.steps:
        if step.key in touched:
            continue
        touched.add(step.key)
        if isinstance(step, Read) and step.values is not None:
            yield Observation(t, step.key, step.values)


def _edge(kind: str, key: int, source: Transaction | None, target: Transaction | None) -> Iterator[Edge]:
    if source is not None and target is not None and source is not target:
        yield Edge(source.number, target.number, kind, key)


def _list(values: Iterable[int]) -> str:
    return f"[{' '.join(map(str, values))}]"


def _told(edges: list[Edge]) -> str:
    path = " ".join(f"T{edge.source} -{edge.kind} {edge.key}->" for edge in edges)
    return f"{path} T{edges[0].source}"
