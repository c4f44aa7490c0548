"""fly hosts cordon, drain, remove, grace: what each asks for, shows, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flyd.cli import hosts, upkeep
from flyd.cli.main import fly
from flyd.errors import FlydError, InvalidInput, Refused, Unavailable
from flyd.v1 import hosts_pb2 as pb


def told(state: str, *lines: str, left: dict[str, str] | None = None, force: bool = False) -> Any:
    drain = pb.Drain(host="ams-1", state=state, left=left or {}, force=force, doing=["web: placing m2"])
    return pb.WatchDrainResponse(drain=drain, lines=lines)


class Calls:
    """A service that keeps what it was asked, and answers as it was told to."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.watches: list[list[Any]] = []
        self.hosts: list[pb.Host] = []

    def watch(self, request: Any) -> Iterator[Any]:
        for answer in self.watches.pop(0):
            if isinstance(answer, BaseException):
                raise answer
            yield answer

    def __getattr__(self, method: str) -> Callable[[Any], Any]:
        if method == "WatchDrain":
            return self.watch

        def called(request: Any) -> Any:
            self.asked.append(request)
            if method == "ListHosts":
                return pb.ListHostsResponse(hosts=self.hosts)
            if method in ("GetLossRule", "SetLossRule"):
                return getattr(pb, f"{method}Response")(grace=getattr(request, "grace", 60.0))
            return getattr(pb, f"{method}Response")()

        return called


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    for module in (hosts, upkeep):
        monkeypatch.setattr(module, "stub", lambda: calls)
        monkeypatch.setattr(module, "call", lambda method, request: method(request))  # pyright: ignore
    monkeypatch.setattr(upkeep, "stream", lambda method, request: method(request))  # pyright: ignore
    monkeypatch.setattr(upkeep, "WATCH_PAUSE_S", 0.0)
    return calls


def run(*words: str) -> Result:
    return CliRunner().invoke(fly, ["hosts", *words])


def failed(kind: type[FlydError], *words: str) -> FlydError:
    result = run(*words)
    assert isinstance(result.exception, kind), result.output
    return result.exception


def test_a_drain_is_followed_line_by_line_also_when_the_flyd_that_told_goes_away(calls: Calls):
    calls.watches = [
        [told("draining", "one"), Unavailable("gone")],
        [told("draining", "one", "two"), told("drained", "three")],
    ]
    result = run("drain", "ams-1")
    assert result.exit_code == 0, result.output
    assert calls.asked == [pb.DrainHostRequest(name="ams-1")]
    assert [line.strip() for line in result.stderr.splitlines()] == [
        "one",
        "two",
        "three",
        "✓ ams-1 is drained",
    ]


def test_a_drain_that_leaves_something_says_what_and_why(calls: Calls):
    left = {"m1": "web: its volume is there (vol_1)"}
    calls.watches = [[told("drained", left=left)]]
    error = failed(Refused, "drain", "ams-1")
    assert "m1: web: its volume is there" in error.message
    assert "--force" in error.hint
    calls.watches = [[told("drained", left=left, force=True)]]
    forced = run("drain", "ams-1", "--force")
    assert forced.exit_code == 0
    assert "1 machines stay, stopped" in forced.stderr
    assert calls.asked[-1].force


def test_a_cancelled_drain_is_no_success(calls: Calls):
    calls.watches = [[told("cancelled")]]
    failed(Refused, "drain", "ams-1")


def test_leaving_a_drain_does_not_end_it(calls: Calls):
    calls.watches = [[told("draining", "one"), KeyboardInterrupt()]]
    result = run("drain", "ams-1")
    assert result.exit_code == upkeep.INTERRUPTED
    assert "fly hosts drain ams-1" in result.stderr
    assert run("drain", "ams-1", "--detach").exit_code == 0


def test_json_is_the_drain_as_it_ended(calls: Calls):
    calls.watches = [[told("draining", "one"), told("drained", "two")]]
    assert json.loads(run("drain", "ams-1", "--json").stdout)["state"] == "drained"


@pytest.mark.parametrize(
    ("verb", "request_type"),
    [
        ("cordon", pb.CordonHostRequest),
        ("uncordon", pb.UncordonHostRequest),
        ("remove", pb.RemoveHostRequest),
    ],
)
def test_the_other_verbs_ask_once(calls: Calls, verb: str, request_type: Callable[..., Any]):
    assert json.loads(run(verb, "ams-1", "--json").stdout)["host"] == "ams-1"
    assert calls.asked == [request_type(name="ams-1")]


def test_the_grace_period_is_shown_and_set(calls: Calls):
    assert run("grace", "2m").stdout == "120 s\n"
    assert calls.asked == [pb.SetLossRuleRequest(grace=120.0)]
    assert run("grace").exit_code == 0
    failed(InvalidInput, "grace", "soon")


def test_a_list_of_hosts_shows_their_labels(calls: Calls) -> None:
    calls.hosts = [pb.Host(name="ams-1", labels={"gpu": "a100", "disk": "nvme"}), pb.Host(name="ams-2")]
    result = run("list")
    assert "LABELS" in result.stdout
    assert "disk=nvme gpu=a100" in result.stdout


@pytest.mark.parametrize(
    ("host", "note"),
    [
        (pb.Host(), ""),
        (pb.Host(cordoned=True), "cordoned"),
        (pb.Host(cordoned=True, drain_state="draining"), "draining"),
        (pb.Host(loss=pb.HostLoss(silent_for=23, moves_in=37)), "silent for 23 s, its machines move in 37 s"),
        (pb.Host(loss=pb.HostLoss(silent_for=61, held="most")), "silent for 61 s, nothing is moved"),
        (pb.Host(loss=pb.HostLoss(silent_for=61, left={"m1": "its volume"})), "silent for 61 s, 1 stay"),
    ],
)
def test_a_list_of_hosts_says_what_becomes_of_a_lost_one(calls: Calls, host: pb.Host, note: str):
    host.name = "ams-1"
    calls.hosts = [host]
    result = run("list")
    assert note in result.stdout
    for machine_id, reason in host.loss.left.items():
        assert f"machine {machine_id} stays: {reason}" in result.stderr
