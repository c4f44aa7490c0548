"""fly machine: what each verb asks for, and what it shows."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from flyd.cli import machine as verbs
from flyd.cli import machine_config, machine_lease, machine_show
from flyd.cli.machine import MORE, seconds
from flyd.cli.main import fly
from flyd.errors import InvalidInput
from flyd.v1 import machines_pb2 as pb

STARTED = pb.Machine(
    id="m1",
    name="web-1",
    app_name="web",
    state="started",
    desired_state="started",
    region="ams",
    host="ams-1",
    host_status="ok",
    instance_id="01A",
    config=pb.MachineConfig(
        image="host:",
        guest=pb.MachineGuest(cpus=1, memory_mb=256),
        restart_policy="on-failure",
        max_retries=10,
        stop=pb.MachineStop(signal="SIGINT", timeout=5),
    ),
)


class Calls:
    """A service that keeps what it was asked, and answers as it was told to."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.answers: dict[str, Any] = {
            "GetMachine": pb.GetMachineResponse(machine=STARTED),
            "CreateMachine": pb.CreateMachineResponse(machine=STARTED),
            "CloneMachine": pb.CloneMachineResponse(machine=STARTED),
            "UpdateMachine": pb.UpdateMachineResponse(machine=STARTED),
        }

    def __getattr__(self, method: str) -> Callable[[Any], Any]:
        def called(request: Any) -> Any:
            self.asked.append(copy.deepcopy(request))
            answer = self.answers.get(method) or getattr(pb, f"{method}Response")()
            return answer(request) if callable(answer) else answer

        return called

    def of(self, kind: type[Any]) -> Any:
        return next(request for request in self.asked if isinstance(request, kind))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    made = Calls()

    def call(method: Callable[[Any], Any], request: Any, timeout_s: float = 0) -> Any:
        return method(request)

    for module in (verbs, machine_config, machine_lease, machine_show):
        monkeypatch.setattr(module, "call", call)
        monkeypatch.setattr(module, "stub", lambda: made)
    return made


def ran(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(fly, ["machine", *words])
    assert result.exit_code == code, result.output or repr(result.exception)
    return result


def test_every_verb_has_help_with_an_example() -> None:
    names = verbs.machine.list_commands(click.Context(verbs.machine))
    for name in names:
        assert "xample" in ran(name, "--help").output, name
    assert set(MORE) <= set(names)


@pytest.mark.parametrize(
    ("text", "expected_s"),
    [("", None), ("0", 0.0), ("30", 30.0), ("45s", 45.0), ("10m", 600.0), ("2h", 7200.0)],
)
def test_times_as_people_write_them(text: str, expected_s: float | None) -> None:
    assert seconds(text) == expected_s


def test_what_is_no_time_is_said() -> None:
    with pytest.raises(InvalidInput, match="'soon' is no time"):
        seconds("soon")


def test_stop_with_a_signal_and_hours(calls: Calls) -> None:
    ran("stop", "m1", "--signal", "SIGTERM", "--timeout", "2h", "--nonce", "n")
    asked = calls.of(pb.StopMachineRequest)
    assert (asked.signal, asked.timeout, asked.lease_nonce) == ("SIGTERM", 7200.0, "n")
    assert calls.of(pb.WaitMachineRequest).state == "stopped"
    calls.asked.clear()
    ran("stop", "m1", "--detach")
    assert not calls.of(pb.StopMachineRequest).HasField("timeout")
    assert not any(isinstance(request, pb.WaitMachineRequest) for request in calls.asked)


def test_update_sends_the_whole_configuration_of_the_version_it_read(calls: Calls) -> None:
    ran("update", "m1", "--memory", "512", "--env", "MODE=fast", "--command", "serve --port 80")
    asked = calls.of(pb.UpdateMachineRequest)
    assert asked.current_version == "01A"
    assert (asked.config.guest.memory_mb, asked.config.guest.cpus) == (512, 1)
    assert (dict(asked.config.env), list(asked.config.cmd)) == ({"MODE": "fast"}, ["serve", "--port", "80"])
    assert (asked.config.image, asked.config.stop.timeout) == ("host:", 5)
    assert calls.of(pb.WaitMachineRequest).instance_id == "01A"


def test_a_schedule_is_given_taken_away_and_shown(calls: Calls) -> None:
    ran("run", "host:", "-a", "web", "--schedule", "daily")
    assert calls.of(pb.CreateMachineRequest).config.schedule == "daily"
    assert not any(isinstance(request, pb.WaitMachineRequest) for request in calls.asked)
    daily = pb.Machine()
    daily.CopyFrom(STARTED)
    daily.config.schedule, daily.desired_state, daily.next_start_at = "daily", "started", 4e9
    calls.answers["GetMachine"] = pb.GetMachineResponse(machine=daily)
    assert "schedule daily: next start 2096-10-0" in ran("status", "m1").output
    ran("update", "m1", "--memory", "512")
    assert calls.of(pb.UpdateMachineRequest).config.schedule == "daily"
    calls.asked.clear()
    ran("update", "m1", "--schedule", "none")
    assert calls.of(pb.UpdateMachineRequest).config.schedule == ""


def test_run_and_clone(calls: Calls) -> None:
    ran("run", "host:", "-a", "web", "--rm", "--metadata", "role=job", "--idempotency-key", "k")
    made = calls.of(pb.CreateMachineRequest)
    assert (made.config.auto_destroy, dict(made.config.metadata), made.idempotency_key) == (
        True, {"role": "job"}, "k",
    )  # fmt: skip
    ran("clone", "m1", "--region", "iad")
    assert calls.of(pb.CloneMachineRequest).region == "iad"


def test_lists_go_through_all_pages(calls: Calls) -> None:
    pages = iter(
        [
            pb.ListMachinesResponse(machines=[STARTED], next_page_token="t"),
            pb.ListMachinesResponse(machines=[STARTED]),
        ]
    )
    tokens: list[str] = []

    def page(request: pb.ListMachinesRequest) -> pb.ListMachinesResponse:
        tokens.append(request.page_token)
        assert dict(request.metadata) == {"role": "db"}
        return next(pages)

    calls.answers["ListMachines"] = page
    shown = json.loads(ran("list", "--all", "--metadata", "role=db", "--json").output)
    assert (len(shown), tokens) == (2, ["", "t"])


def test_status_shows_how_it_ended_and_when_it_starts_again(calls: Calls) -> None:
    ended = pb.MachineEvent(
        type="exit", status="restarting", source="flyd", detail="killed: out of memory",
        exit_event=pb.MachineExit(signal=9, oom_killed=True),
    )  # fmt: skip
    waiting = pb.Machine()
    waiting.CopyFrom(STARTED)
    waiting.events.append(ended)
    waiting.state, waiting.retry_at, waiting.recent_exits = "restarting", 4e9, 3
    calls.answers["GetMachine"] = pb.GetMachineResponse(machine=waiting)
    shown = ran("status", "m1").output
    assert "signal 9, out of memory" in shown
    assert "failure 3 of 10 within 5 minutes" in shown
    assert "version 01A" in shown


def test_how_an_end_reads() -> None:
    def words(**ended: Any) -> str:
        return machine_show.exit_words(pb.MachineEvent(type="exit", exit_event=pb.MachineExit(**ended)))

    assert words(exit_code=0, requested_stop=True) == "code 0, asked for"
    assert words() == "not seen"
    assert machine_show.exit_words(pb.MachineEvent(type="start")) == ""


def test_ps_shows_sockets_and_warnings(calls: Calls) -> None:
    calls.answers["ListMachineProcesses"] = pb.ListMachineProcessesResponse(
        processes=[
            pb.MachineProcess(
                pid=7, command="serve", memory_kb=2048,
                listen_sockets=[pb.MachineSocket(proto="tcp6", address="::", port=80)],
            )
        ],
        warnings=["nothing listens on port 81"],
    )  # fmt: skip
    result = ran("ps", "m1")
    assert "tcp/[::]:80" in result.output
    assert "nothing listens on port 81" in result.stderr


def test_leases(calls: Calls) -> None:
    calls.answers["AcquireMachineLease"] = pb.AcquireMachineLeaseResponse(
        lease=pb.MachineLease(machine_id="m1", nonce="secret", owner="ada", expires_at=1e9)
    )
    result = ran("lease", "acquire", "m1", "--ttl", "10m", "--owner", "ada")
    assert calls.of(pb.AcquireMachineLeaseRequest).ttl == 600
    assert "export FLY_LEASE_NONCE=secret" in result.stderr
    ran("leases", "clear", "m1")
    assert calls.of(pb.ReleaseMachineLeaseRequest).force


def test_metadata(calls: Calls) -> None:
    ran("metadata", "set", "m1", "role=db", "team=a=b")
    sets = [r for r in calls.asked if isinstance(r, pb.SetMachineMetadataRequest)]
    assert [(s.key, s.value) for s in sets] == [("role", "db"), ("team", "a=b")]
    ran("metadata", "delete", "m1", "role")
    assert calls.of(pb.DeleteMachineMetadataRequest).key == "role"
