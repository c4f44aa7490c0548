"""fly volumes: what each verb asks for, what it shows, and what it refuses by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flyd.cli import volumes as verbs
from flyd.cli.main import fly
from flyd.v1 import volumes_pb2 as pb

VOLUME = pb.Volume(id="vol_1", name="data", app_name="web", region="ams", host="ams-1", size_gb=3)
SNAPSHOT = pb.VolumeSnapshot(id="snap-1", volume_id="vol_1", size_gb=3, used_bytes=1 << 30)


class Service:
    """Keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def __getattr__(self, method: str) -> Callable[[Any], Any]:
        def called(request: Any) -> Any:
            self.asked.append(request)
            answer = getattr(pb, f"{method}Response")
            if method == "ListVolumes":
                return answer(volumes=[VOLUME])
            if method == "ListVolumeSnapshots":
                return answer(snapshots=[SNAPSHOT])
            if method == "CreateVolumeSnapshot":
                return answer(snapshot=SNAPSHOT)
            return answer(volume=VOLUME) if "volume" in answer.DESCRIPTOR.fields_by_name else answer()

        return called


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    service = Service()
    monkeypatch.setattr(verbs, "stub", lambda: service)
    monkeypatch.setattr(verbs, "call", lambda method, request, timeout_s=0.0: method(request))  # type: ignore
    return service


def run(*arguments: str) -> Result:
    return CliRunner().invoke(fly, ["volumes", *arguments, "-a", "web"])


ASKED = {
    "create data -r ams": pb.CreateVolumeRequest(app_name="web", name="data", region="ams", size_gb=1),
    "create data -r ams -s 0": pb.CreateVolumeRequest(app_name="web", name="data", region="ams", size_gb=0),
    "create old --from-snapshot vol_1/snap-1": pb.ForkVolumeRequest(
        app_name="web", volume_id="vol_1", snapshot_id="snap-1", name="old"
    ),
    "fork vol_1 -n copy -s 5": pb.ForkVolumeRequest(
        app_name="web", volume_id="vol_1", name="copy", size_gb=5
    ),
    "extend vol_1 -s 5": pb.ExtendVolumeRequest(app_name="web", volume_id="vol_1", size_gb=5),
    "destroy vol_1 -y": pb.DestroyVolumeRequest(app_name="web", volume_id="vol_1"),
    "update vol_1 --replicas 1 --every 5m --recover-within 30m": pb.UpdateVolumeRequest(
        app_name="web", volume_id="vol_1", replicas=1, copy_every_s=300.0, recover_max_age_s=1800.0
    ),
    "update vol_1 --verify-every 168h": pb.UpdateVolumeRequest(
        app_name="web", volume_id="vol_1", verify_every_s=604800.0
    ),
    "update vol_1 --recover-within 0s": pb.UpdateVolumeRequest(
        app_name="web", volume_id="vol_1", recover_max_age_s=0.0
    ),
    "undestroy vol_1": pb.UndestroyVolumeRequest(app_name="web", volume_id="vol_1"),
    "list --destroyed": pb.ListVolumesRequest(app_name="web", destroyed=True),
    "snapshots list vol_1": pb.ListVolumeSnapshotsRequest(app_name="web", volume_id="vol_1"),
    "snapshots create vol_1": pb.CreateVolumeSnapshotRequest(app_name="web", volume_id="vol_1"),
    "snapshots destroy vol_1 snap-1": pb.DestroyVolumeSnapshotRequest(
        app_name="web", volume_id="vol_1", snapshot_id="snap-1"
    ),
}


@pytest.mark.parametrize("line", ASKED)
def test_what_is_asked(service: Service, line: str) -> None:
    result = run(*line.split())
    assert result.exit_code == 0, result.output
    assert service.asked == [ASKED[line]]


@pytest.mark.parametrize(
    "line",
    [
        "create data",
        "create data --from-snapshot snap-1",
        "create data --from-snapshot vol_1/",
        "create data --from-snapshot vol_1/snap-1 -r ams",
        "fork vol_1 -s 0",
        "fork vol_1 -s -3",
        "update vol_1 --recover-within soon",
    ],
)
def test_what_is_refused_at_once(service: Service, line: str) -> None:
    assert run(*line.split()).exit_code != 0
    assert service.asked == []


@pytest.mark.parametrize("line", ["list", "snapshots list vol_1"])
def test_lists_as_json(service: Service, line: str) -> None:
    found = json.loads(CliRunner().invoke(fly, ["volumes", *line.split(), "-a", "web", "--json"]).stdout)
    assert [item["id"] for item in found] == ["vol_1" if line == "list" else "snap-1"]


def test_a_snapshot_that_is_of_no_one_instant_says_so(service: Service) -> None:
    assert "copied while a machine wrote" in run("snapshots", "create", "vol_1").output
    assert "no" in run("snapshots", "list", "vol_1").output.splitlines()[-1].split()


def test_destroying_asks_first_and_says_what_brings_it_back(service: Service) -> None:
    refused = CliRunner().invoke(fly, ["volumes", "destroy", "vol_1", "-a", "web"], input="n\n")
    assert refused.exit_code != 0
    assert service.asked == []
    assert "fly volumes undestroy vol_1" in run("destroy", "vol_1", "-y").output
