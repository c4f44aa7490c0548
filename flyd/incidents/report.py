"""An incident for people (text) and for programs (a dict for JSON). Pure.

Called by `fly incidents report` and by the demo. Colours are the caller's.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

from flyd.incidents.timeline import Timeline


def as_text(timeline: Timeline) -> str:
    """The account by the clock, then what counts."""
    origin = "the fault" if timeline.from_fault else "the first sign"
    rows = [
        (
            clock_time(line.at_s),
            f"{line.offset_ms:+d} ms",
            f"{line.who} ({line.region})" if line.region else line.who,
            line.what,
            "; ".join(part for part in (line.detail, position(line.epoch, line.lsn)) if part),
        )
        for line in timeline.lines
    ]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(4)]
    told = [
        f"{time}  {offset:>{widths[1]}}  {who:<{widths[2]}}  {what:<{widths[3]}}  {detail}".rstrip()
        for time, offset, who, what, detail in rows
    ]
    day = datetime.fromtimestamp(timeline.began_at_s).strftime("%Y-%m-%d")
    head = f"{timeline.app}, {day}, counted from {origin}"
    return "\n".join([head, "", *told, "", *summary_lines(timeline)])


def summary_lines(timeline: Timeline) -> list[str]:
    """One line for each moment that was reached."""
    summary = timeline.summary
    moments = (
        ("detected", summary.detected_ms if timeline.from_fault else None),  # else 0 by definition
        ("fenced", summary.fenced_ms),
        ("elected", summary.elected_ms),
        ("promoted", summary.promoted_ms),
        ("endpoint moved", summary.endpoint_moved_ms),
        ("rejoined", summary.rejoined_ms),
    )
    lines = [f"{name:<15} {offset:>8} ms" for name, offset in moments if offset is not None]
    if summary.endpoint_moved_ms is not None:
        where = f"{summary.primary} ({summary.primary_region})" if summary.primary_region else summary.primary
        kind = "planned, " if summary.planned else ""
        lines.append(f"{kind}now primary: {where}, epoch {summary.epoch}")
    elif any(line.kind.startswith("postgres.") for line in timeline.lines):
        lines.append("no primary serves yet")
    return lines


def as_dict(timeline: Timeline) -> dict[str, Any]:
    """The same for a program; every field is there."""
    plain: dict[str, Any] = {name: getattr(timeline, name) for name in ("app", "began_at_s", "from_fault")}
    plain["lines"] = [msgspec.structs.asdict(line) for line in timeline.lines]
    plain["summary"] = msgspec.structs.asdict(timeline.summary)
    return plain


def clock_time(at_s: float) -> str:
    """Local time of day with milliseconds."""
    return datetime.fromtimestamp(at_s).strftime("%H:%M:%S.%f")[:-3]


def position(epoch: int, lsn: int) -> str:
    """Epoch and LSN as Postgres writes them."""
    parts = [f"epoch {epoch}"] if epoch else []
    if lsn:
        parts.append(f"at {lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}")
    return " ".join(parts)
