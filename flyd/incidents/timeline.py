"""Incidents, as they are told: events in, an ordered account with offsets and a summary out.

Owns what counts as the first sign of an incident, which events belong to it, and the plain
words for each kind. Pure. Offsets are counted from the fault where its moment is known, else
from the first sign. Times are the writers' own wall clocks: on hosts whose clocks differ the
order of two close lines of different hosts says little (README's guarantees do not rest on it).

Called by `fly incidents report` and by the demo; report.py prints it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from flyd.model import Event, Value

LEASE_LOST = "postgres.lease_lost_seen"
SWITCHOVER = "postgres.switchover"
HOST_LOST = "host.lost"
HOST_BACK = "host.back"
SIGNS = frozenset({LEASE_LOST, SWITCHOVER, HOST_LOST})

JOIN_S = 30.0
"""A host's loss is noticed later than its primary's: so long after the first sign it is the same incident."""

QUIET_S = 60.0
"""A new sign so long after the last one is a new incident, even if the old one never ended well."""

WORDS = {
    LEASE_LOST: "noticed that the primary is gone",
    SWITCHOVER: "hands the primary over as planned",
    "postgres.switchover_refused": "refused the planned hand-over",
    "postgres.fenced": "closed itself to the old primary",
    "postgres.voted": "said how much it has",
    "postgres.elected": "was elected, it had the most",
    "postgres.promoted": "left recovery and is primary",
    "postgres.serving": "serves: the endpoint moved here",
    "postgres.following": "follows the new primary",
    "postgres.demoted": "ended its term as primary",
    "postgres.rewound": "undid what only it had",
    "postgres.rewind_failed": "could not undo what only it had",
    "postgres.copied": "made a fresh copy of the primary",
    "postgres.initialised": "made the first data directory",
    "postgres.stopped": "stopped for good",
    HOST_LOST: "is lost",
    HOST_BACK: "is back",
    "host.moves_held": "keeps its machines for now: too many hosts are lost",
    "machine.moved": "was placed on another host",
    "machine.stays": "keeps what it can not give away",
    "machine.unplaceable": "finds no host that can take it",
}

SAID_BY_WORDS = frozenset({"postgres.fenced", "postgres.elected", "postgres.promoted", "postgres.serving"})
"""Kinds whose own message adds nothing to the words above."""


class Line(Value, frozen=True, kw_only=True):
    """One thing that happened."""

    at_s: float
    offset_ms: int
    who: str  # a member, or a host
    region: str
    kind: str
    what: str  # in plain words
    detail: str
    epoch: int = 0
    lsn: int = 0


class Summary(Value, frozen=True, kw_only=True):
    """What a tired person asks first. Offsets in ms; None: it did not happen (yet)."""

    detected_ms: int | None = None
    fenced_ms: int | None = None  # the last voter that the election needed
    elected_ms: int | None = None
    promoted_ms: int | None = None
    endpoint_moved_ms: int | None = None  # also: how long there was no primary
    rejoined_ms: int | None = None  # a member that had to rewind or copy follows again
    primary: str = ""
    primary_region: str = ""
    epoch: int = 0
    planned: bool = False


class Timeline(Value, frozen=True, kw_only=True):
    """One incident."""

    app: str
    began_at_s: float
    from_fault: bool  # offsets count from the fault itself, not from its first sign
    lines: tuple[Line, ...]
    summary: Summary


def incidents(events: Iterable[Event]) -> list[list[Event]]:
    """The incidents among some history, oldest first: each from its first sign to the next one's."""
    found: list[list[Event]] = []
    lost_epoch, began_s, sign_s, served = 0, 0.0, 0.0, True
    for event in sorted(events, key=lambda e: (e.at_s, e.source, e.kind)):
        if event.kind in SIGNS:
            over = served or event.at_s - sign_s > QUIET_S
            if event.kind == HOST_LOST:
                begins = not found or event.at_s - began_s > JOIN_S
            else:
                begins = not found or (over and epoch_of(event) > lost_epoch)
                lost_epoch = max(lost_epoch, epoch_of(event))
            if begins:
                found.append([])
                began_s, served = event.at_s, False
            sign_s = event.at_s
        if found:
            found[-1].append(event)
            served = served or event.kind == "postgres.serving"
    return found


def newest(app: str, events: Iterable[Event]) -> list[Event]:
    """The newest incident that the app had a part in; else the newest of the hosts; empty if none.

    A flyd that was stopped for an upgrade is a lost host for a moment: that shall not hide
    what happened to the app.
    """
    found = incidents(events)
    own = [incident for incident in found if any(event.app == app for event in incident)]
    return (own or found or [[]])[-1]


def build(
    app: str, events: Sequence[Event], regions: Mapping[str, str], *, fault_at_s: float | None = None
) -> Timeline:
    """The account of one incident. `regions` says where a member is; `events` must not be empty."""
    ordered = sorted(events, key=lambda e: (e.at_s, e.source, e.kind))
    began_s = ordered[0].at_s if fault_at_s is None else fault_at_s
    lines = tuple(_line(event, began_s, regions) for event in ordered)
    return Timeline(
        app=app,
        began_at_s=began_s,
        from_fault=fault_at_s is not None,
        lines=lines,
        summary=summarise(lines),
    )


def summarise(lines: Sequence[Line]) -> Summary:
    """The moments that count, of lines in order."""
    signs = [line for line in lines if line.kind in SIGNS]
    served = _first(lines, "postgres.serving")
    elected = _last_before(lines, "postgres.elected", served)
    return Summary(
        detected_ms=_offset(signs[0] if signs else None),
        fenced_ms=_offset(_last_before(lines, "postgres.fenced", elected)),
        elected_ms=_offset(elected),
        promoted_ms=_offset(_last_before(lines, "postgres.promoted", served)),
        endpoint_moved_ms=_offset(served),
        rejoined_ms=_offset(_rejoined(lines)),
        primary=served.who if served else "",
        primary_region=served.region if served else "",
        epoch=served.epoch if served else 0,
        planned=any(line.kind == SWITCHOVER for line in lines),
    )


def epoch_of(event: Event) -> int:
    """The epoch that an event is about; 0 if it names none."""
    text = event.fields.get("epoch", "")
    return int(text) if text.isdigit() else 0


def _line(event: Event, began_s: float, regions: Mapping[str, str]) -> Line:
    lsn = event.fields.get("lsn", "")
    return Line(
        at_s=event.at_s,
        offset_ms=round((event.at_s - began_s) * 1000),
        who=event.source,
        region=event.fields.get("region") or regions.get(event.source, ""),
        kind=event.kind,
        what=WORDS.get(event.kind, event.kind),
        detail="" if event.kind in SAID_BY_WORDS else event.message,
        epoch=epoch_of(event),
        lsn=int(lsn) if lsn.isdigit() else 0,
    )


def _first(lines: Sequence[Line], kind: str) -> Line | None:
    return next((line for line in lines if line.kind == kind), None)


def _last_before(lines: Sequence[Line], kind: str, end: Line | None) -> Line | None:
    """The last line of a kind, not later than `end` (None: no end)."""
    fitting = [ln for ln in lines if ln.kind == kind and (end is None or ln.at_s <= end.at_s)]
    return fitting[-1] if fitting else None


def _rejoined(lines: Sequence[Line]) -> Line | None:
    """The first member that follows again after it had to rewind or copy."""
    repaired: set[str] = set()
    for line in lines:
        if line.kind in ("postgres.rewound", "postgres.copied"):
            repaired.add(line.who)
        elif line.kind == "postgres.following" and line.who in repaired:
            return line
    return None


def _offset(line: Line | None) -> int | None:
    return None if line is None else line.offset_ms
