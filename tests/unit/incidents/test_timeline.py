"""Incidents from events: which belong together, in which order, and what is said of them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyd.incidents.report import as_dict, as_text
from flyd.incidents.timeline import SIGNS, WORDS, build, epoch_of, incidents, newest
from flyd.model import Event

REGIONS = {"chat-db-1": "ams", "chat-db-2": "iad", "chat-db-3": "sin"}


def said(at_s: float, source: str, kind: str, message: str = "", **fields: object) -> Event:
    named = {name: str(value) for name, value in fields.items()}
    return Event(at_s=at_s, app="chat-db", source=source, kind=kind, message=message, fields=named)


BOOTSTRAP = [
    said(10.0, "chat-db-1", "postgres.initialised", epoch=1),
    said(10.5, "chat-db-1", "postgres.elected", epoch=2),
    said(11.0, "chat-db-1", "postgres.serving", epoch=2),
]
# What three real agents wrote when the primary's region was killed at 100.0, and brought back.
LOSS = [
    said(102.0, "chat-db-2", "postgres.lease_lost_seen", "chat-db-1 did not renew for 2.0 s", epoch=2),
    said(102.0, "chat-db-3", "postgres.lease_lost_seen", "chat-db-1 did not renew for 2.0 s", epoch=2),
    said(102.017, "chat-db-2", "postgres.fenced", "closed", epoch=2, lsn=0x54E0B78),
    said(102.020, "chat-db-2", "postgres.voted", "in the round", epoch=2, lsn=0x54E0B78),
    said(102.039, "chat-db-3", "postgres.fenced", "closed", epoch=2, lsn=0x54E0B78),
    said(102.059, "chat-db-2", "postgres.elected", "took over", epoch=3, lsn=0x54E0B78),
    said(102.180, "chat-db-2", "postgres.promoted", "out of recovery", epoch=3, lsn=0x54E0B78),
    said(102.196, "chat-db-3", "postgres.following", "streaming from it", epoch=3),
    said(102.333, "chat-db-2", "postgres.serving", "open", epoch=3, lsn=0x54E0BB0),
    said(105.0, "ams-1", "host.lost", "no sign of life", region="ams"),
    said(116.0, "ams-1", "host.back", "is back", region="ams"),
    said(118.0, "chat-db-1", "postgres.rewound", "rewound", epoch=3),
    said(118.2, "chat-db-1", "postgres.following", "streaming", epoch=3),
]
SECOND_LOSS = [
    said(130.0, "chat-db-1", "postgres.lease_lost_seen", "chat-db-2 did not renew", epoch=3),
    said(130.1, "chat-db-1", "postgres.elected", epoch=4),
    said(130.2, "chat-db-1", "postgres.serving", epoch=4),
]


def test_a_bootstrap_is_no_incident() -> None:
    assert incidents(BOOTSTRAP) == []


def test_one_loss_is_one_incident_with_its_aftermath() -> None:
    assert incidents([*reversed(LOSS), *BOOTSTRAP]) == [LOSS]


def test_the_loss_of_the_next_primary_is_the_next_incident() -> None:
    assert incidents([*BOOTSTRAP, *LOSS, *SECOND_LOSS]) == [LOSS, SECOND_LOSS]


def test_a_winner_that_dies_before_it_serves_prolongs_the_same_incident() -> None:
    round_one = LOSS[:7]  # elected and promoted, never served
    assert incidents([*round_one, *SECOND_LOSS]) == [[*round_one, *SECOND_LOSS]]


def test_a_host_lost_much_later_is_an_incident_of_its_own() -> None:
    later = said(500.0, "sin-1", "host.lost", region="sin")
    assert incidents([*LOSS, later]) == [LOSS, [later]]


def test_a_host_s_pause_does_not_hide_the_app_s_incident() -> None:
    upgrade = Event(at_s=500.0, app="_cluster", source="sin-1", kind="host.lost", message="")
    assert newest("chat-db", [*BOOTSTRAP, *LOSS, upgrade]) == LOSS
    assert newest("chat", [upgrade]) == [upgrade]
    assert newest("chat-db", BOOTSTRAP) == []


def test_a_new_sign_long_after_an_incident_that_never_ended() -> None:
    stuck = LOSS[:6]
    again = said(900.0, "chat-db-3", "postgres.lease_lost_seen", epoch=3)
    assert incidents([*stuck, again]) == [stuck, [again]]


def test_moments_counted_from_the_fault() -> None:
    summary = build("chat-db", LOSS, REGIONS, fault_at_s=100.0).summary
    assert (summary.detected_ms, summary.fenced_ms, summary.elected_ms) == (2000, 2039, 2059)
    assert (summary.promoted_ms, summary.endpoint_moved_ms, summary.rejoined_ms) == (2180, 2333, 18200)
    assert (summary.primary, summary.primary_region, summary.epoch) == ("chat-db-2", "iad", 3)
    assert not summary.planned


def test_without_the_fault_the_first_sign_is_the_origin() -> None:
    timeline = build("chat-db", LOSS, REGIONS)
    assert (timeline.began_at_s, timeline.from_fault) == (102.0, False)
    assert timeline.summary.endpoint_moved_ms == 333


def test_what_has_not_happened_is_not_claimed() -> None:
    summary = build("chat-db", LOSS[:3], REGIONS).summary
    assert (summary.elected_ms, summary.promoted_ms, summary.endpoint_moved_ms) == (None, None, None)
    assert "no primary serves yet" in as_text(build("chat-db", LOSS[:3], REGIONS))


def test_a_planned_move_is_called_planned() -> None:
    moved = [
        said(1.0, "chat-db-1", "postgres.switchover", "handing over to chat-db-2", epoch=2),
        said(1.3, "chat-db-2", "postgres.serving", "open", epoch=3),
    ]
    assert "planned, now primary: chat-db-2 (iad), epoch 3" in as_text(build("chat-db", moved, REGIONS))


@pytest.mark.parametrize(
    "expected",
    [
        "chat-db, ",
        "counted from the fault",
        "+2059 ms  chat-db-2 (iad)  was elected, it had the most",
        "epoch 3 at 0/54E0BB0",
        "ams-1 (ams)      is lost",
        "endpoint moved      2333 ms",
        "now primary: chat-db-2 (iad), epoch 3",
    ],
)
def test_the_text_says(expected: str) -> None:
    assert expected in as_text(build("chat-db", LOSS, REGIONS, fault_at_s=100.0))


def test_the_json_holds_every_line_and_moment() -> None:
    told = json.loads(json.dumps(as_dict(build("chat-db", LOSS, REGIONS))))
    assert len(told["lines"]) == len(LOSS)
    assert told["summary"]["endpoint_moved_ms"] == 333
    assert told["summary"]["planned"] is False


EVENTS = st.lists(
    st.builds(
        said,
        st.floats(0, 2000),
        st.sampled_from(sorted(REGIONS)),
        st.sampled_from([*sorted(WORDS), "machine.exit"]),
        epoch=st.integers(0, 5),
    ),
    max_size=30,
)


@settings(max_examples=100)
@given(EVENTS)
def test_every_event_from_the_first_sign_on_is_in_exactly_one_incident(events: list[Event]) -> None:
    ordered = sorted(events, key=lambda e: (e.at_s, e.source, e.kind))
    first = next((i for i, e in enumerate(ordered) if e.kind in SIGNS), len(ordered))
    found = incidents(events)
    assert [e for incident in found for e in incident] == ordered[first:]
    for incident in found:
        assert incident[0].kind in SIGNS
        offsets = [line.offset_ms for line in build("chat-db", incident, REGIONS).lines]
        assert offsets == sorted(offsets)
        assert offsets[0] == 0


@pytest.mark.parametrize(("text", "expected"), [("3", 3), ("", 0), ("x", 0)])
def test_epoch_of(text: str, expected: int) -> None:
    assert epoch_of(said(1.0, "a", "b", epoch=text)) == expected
