"""How fly postgres backup reads and says durations and instants."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from flyd.cli.postgres import troubles
from flyd.cli.postgres_backups import duration, instant, schedule, spoken, trial
from flyd.errors import InvalidInput
from flyd.v1 import postgres_pb2


def test_durations() -> None:
    for text, seconds in {"90m": 5400, "24h": 86400, "7d": 604800, "1.5d": 129600, "1h30m": 5400}.items():
        assert duration("--every", text) == seconds
    for text in ("", "d", "-1d", "soon", "0s", "infd", "nand"):
        with pytest.raises(InvalidInput, match="--every"):
            duration("--every", text)
    assert [spoken(s) for s in (604800, 86400, 5400, 45)] == ["7d", "1d", "90m", "45s"]


def test_a_trial_and_an_instant() -> None:
    assert trial(postgres_pb2.Backup()) == "never"
    assert trial(postgres_pb2.Backup(verified_at=1e9, verify_error="torn")).startswith("FAILED: torn ")
    assert trial(postgres_pb2.Backup(verified_at=1e9)).startswith("ok ")
    assert (instant(0), instant(1e9)) == ("-", "2001-09-09T01:46:40+00:00")


@pytest.mark.parametrize("words", [[], ["--every", "1d", "--off"]])
def test_a_schedule_is_one_or_none(words: list[str]) -> None:
    found = CliRunner().invoke(schedule, ["-a", "db", *words])
    assert isinstance(found.exception, InvalidInput)


def test_troubles_of_a_member() -> None:
    member = postgres_pb2.PostgresMember(node="db-1", disk_state="ok", disk_free_bytes=1 << 30)
    assert troubles(member) == []
    assert troubles(postgres_pb2.PostgresMember(node="db-1")) == []
    member = postgres_pb2.PostgresMember(
        node="db-1", disk_state="read-only", disk_free_bytes=40 << 20, disk_total_bytes=400 << 20,
        archive_failing_since=1e9, archive_failing_segment="S", archive_waiting=3,
    )  # fmt: skip
    full, failing = troubles(member)
    assert full == "db-1: disk read-only, 40 MB of 400 MB free, so nothing is written"
    assert failing.startswith("db-1: archiving fails since ")
    assert failing.endswith(" at S, 3 segments wait on its disk")
