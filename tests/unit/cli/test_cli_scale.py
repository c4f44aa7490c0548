"""fly scale count: what it asks for, what it waits for, and what it says when that does not come."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flyd.cli import scale as verbs
from flyd.cli.main import fly
from flyd.errors import FlydError, Unavailable
from flyd.v1 import placement_pb2 as pb

CHANGE = pb.ScaleChange(process_group="app", region="ams", have=1, want=2, create_hosts=["ams-2"])


def told(*verdicts: tuple[str, str]) -> pb.WatchReadinessResponse:
    machines = [
        pb.MachineReadiness(machine_id=f"m{n}", region="ams", host="ams-1", verdict=verdict, detail=detail)
        for n, (verdict, detail) in enumerate(verdicts, start=1)
    ]
    return pb.WatchReadinessResponse(machines=machines)


class Service:
    """Scales to one new machine, and tells of it what it was told to; an error: that flyd goes away."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.readiness: list[list[pb.WatchReadinessResponse | FlydError]] = []
        self.wait_s = 60.0

    def ScaleApp(self, request: pb.ScaleAppRequest) -> pb.ScaleAppResponse:  # noqa: N802 - the API's name
        self.asked.append(copy.deepcopy(request))
        made = [] if request.dry_run else ["m1"]
        return pb.ScaleAppResponse(changes=[CHANGE], created_ids=made, wait_timeout=self.wait_s)

    def WatchReadiness(  # noqa: N802 - the API's name
        self, request: pb.WatchReadinessRequest
    ) -> Iterator[pb.WatchReadinessResponse]:
        self.asked.append(request)
        for answer in self.readiness.pop(0):
            if isinstance(answer, FlydError):
                raise answer
            yield answer


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    made = Service()

    def call(method: Any, request: Any, timeout_s: float = 0) -> Any:
        return method(request)

    monkeypatch.setattr(verbs, "call", call)
    monkeypatch.setattr(verbs, "stream", call)
    monkeypatch.setattr(verbs, "stub", lambda: made)
    monkeypatch.setattr(verbs, "WATCH_PAUSE_S", 0.0)
    return made


def ran(*words: str) -> Result:
    return CliRunner().invoke(fly, ["scale", "count", "2", "-a", "web", "--yes", *words])


def test_it_waits_until_the_checks_pass_whichever_flyd_tells(service: Service) -> None:
    service.readiness = [
        [told(("waiting", "state starting")), Unavailable("this flyd is being stopped")],
        [told(("waiting", "check http critical")), told(("healthy", ""))],
    ]
    result = ran()
    assert result.exit_code == 0, result.output
    assert "1 machines created" in result.output
    watched = [request for request in service.asked if isinstance(request, pb.WatchReadinessRequest)]
    assert [list(request.machine_ids) for request in watched] == [["m1"], ["m1"]]
    assert 0 < watched[0].timeout <= 60.0


def test_a_failing_check_is_named(service: Service) -> None:
    detail = "state started; check http critical: connection refused"
    service.readiness = [[told(("healthy", ""), ("waiting", detail))]]
    result = ran()
    assert isinstance(result.exception, FlydError)
    assert "1 of 2 new machines of app web are not healthy" in result.exception.message
    assert f"m2 in ams on ams-1: not in 60 s; last known: {detail}" in result.exception.message


def test_a_machine_that_ended_is_told_without_waiting(service: Service) -> None:
    service.readiness = [[told(("failed", "ended instead of serving: exited with code 1"))]]
    result = ran()
    assert isinstance(result.exception, FlydError)
    assert "m1 in ams on ams-1: ended instead of serving" in result.exception.message


def test_the_result_is_json_on_standard_output_alone(service: Service) -> None:
    service.readiness = [[told(("healthy", ""))]]
    result = ran("--json")
    assert json.loads(result.stdout)["created_ids"] == ["m1"]


def test_a_dry_run_waits_for_nothing(service: Service) -> None:
    assert ran("--dry-run").exit_code == 0
    assert [type(request) for request in service.asked] == [pb.ScaleAppRequest]
