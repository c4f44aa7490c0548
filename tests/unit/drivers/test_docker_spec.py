from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from docker.errors import APIError, ImageNotFound
from hypothesis import given
from hypothesis import strategies as st
from requests import ConnectionError, Response

from flyd.drivers.docker.errors import translated
from flyd.drivers.docker.spec import (
    HostNetwork,
    container_body,
    log_line,
    nanoseconds,
    observed,
    seen,
    spec_digest,
)
from flyd.errors import Conflict, FlydError, InvalidInput, NotFound, Refused, Unavailable
from flyd.model import ExitStatus, Guest, MachineSpec

NETWORK = HostNetwork(host_name="ams-1", subnet="10.211", gateway="10.211.0.1", mtu=1420)
SPEC = MachineSpec(
    machine_id="m1",
    app="web",
    instance_id="i1",
    command=("serve", "--fast"),
    env={"B": "2", "A": "1"},
    private_ip="10.211.0.7",
    image="image:sha256:ab",
    mounts=(("/vol/1", "/data"),),
    guest=Guest(cpus=2, memory_mb=512),
)


def body(**changes: object) -> dict[str, Any]:
    return container_body(msgspec.structs.replace(SPEC, **changes), NETWORK, {"A": "base", "C": "3"})


def test_the_whole_container() -> None:
    made = body()
    digest = made["Labels"].pop("flyd.spec")
    assert len(digest) == 16
    assert made == {
        "Image": "sha256:ab",
        "Hostname": "m1",
        "Cmd": ["serve", "--fast"],
        "Env": ["A=1", "B=2", "C=3"],
        "Labels": {"flyd.machine": "m1", "flyd.app": "web", "flyd.instance": "i1", "flyd.host": "ams-1"},
        "HostConfig": {
            "Init": True,
            "NetworkMode": "flyd-ams-1",
            "Dns": ["10.211.0.1"],
            "ExtraHosts": ["fly-local-6pn:10.211.0.7"],
            "RestartPolicy": {"Name": "no"},
            "LogConfig": {"Type": "json-file", "Config": {"max-size": "8m", "max-file": "2"}},
            "Mounts": [{"Type": "bind", "Source": "/vol/1", "Target": "/data"}],
            "Memory": 512 << 20,
            "MemorySwap": 512 << 20,
            "ShmSize": 256 << 20,
            "CpuShares": 128,
        },
        "NetworkingConfig": {
            "EndpointsConfig": {
                "flyd-ams-1": {
                    "IPAMConfig": {"IPv4Address": "10.211.0.7", "IPv6Address": "fdaa:0:0:ad3::7"},
                    "MacAddress": "02:42:0a:d3:00:07",
                }
            }
        },
    }


def test_what_is_left_to_the_image() -> None:
    made = body(command=(), user="")
    assert "Cmd" not in made
    assert "User" not in made
    assert body(user="postgres")["User"] == "postgres"


def test_a_performance_cpu_is_had_whole() -> None:
    config = body(guest=Guest(cpus=3, memory_mb=256, cpu_kind="performance"))["HostConfig"]
    assert (config["NanoCpus"], config["CpuShares"]) == (3_000_000_000, 3072)


@pytest.mark.parametrize(
    "changes",
    [{"image": "other:1"}, {"command": ()}, {"env": {}}, {"private_ip": "10.211.0.8"}, {"instance_id": "i2"}],
)
def test_another_spec_another_digest(changes: dict[str, object]) -> None:
    assert spec_digest(body(**changes)) != spec_digest(body())


def test_the_same_spec_the_same_digest() -> None:
    assert spec_digest(body(env={"A": "1", "B": "2"})) == spec_digest(body())


@pytest.mark.parametrize("image", ["", "image:", "host:", "source:sha256:ab"])
def test_no_image(image: str) -> None:
    with pytest.raises(InvalidInput, match="m1 of app web"):
        body(image=image)


@pytest.mark.parametrize(
    "changes", [{"env": {"A": "\0"}}, {"command": ("a\0",)}, {"env": {"A=B": "1"}}, {"env": {"": "1"}}]
)
def test_what_no_process_can_be_given(changes: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        body(**changes)


def test_the_networks_addresses() -> None:
    assert (NETWORK.cidr, NETWORK.gateway) == ("10.211.0.0/16", "10.211.0.1")
    assert (NETWORK.cidr6, NETWORK.gateway6) == ("fdaa:0:0:ad3::/64", "fdaa:0:0:ad3::1")


@given(st.text(min_size=1, max_size=60))
def test_a_bridges_name_fits_the_kernel(host: str) -> None:
    assert len(msgspec.structs.replace(NETWORK, host_name=host).bridge) <= 15


# --------------------------------------------------------------------------- what the engine says


def container(**state: object) -> dict[str, Any]:
    defaults: dict[str, object] = {
        "Running": False,
        "Pid": 0,
        "StartedAt": "2026-11-23T14:31:54.966852962Z",
        "FinishedAt": "2026-11-23T14:31:56.5Z",
        "ExitCode": 0,
        "OOMKilled": False,
    }
    labels = {"flyd.machine": "m1", "flyd.app": "web", "flyd.instance": "i1", "flyd.host": "ams-1"}
    return {"Id": "c1", "Config": {"Labels": labels}, "State": {**defaults, **state}}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0, (0, None)),
        (1, (1, None)),
        (127, (127, None)),
        (128, (128, None)),
        (130, (None, 2)),
        (137, (None, 9)),
        (143, (None, 15)),
        (193, (193, None)),
        (255, (255, None)),
    ],
)
def test_how_it_ended(code: int, expected: tuple[int | None, int | None]) -> None:
    status = observed(seen(container(ExitCode=code)), requested=False).exit
    assert status is not None
    assert (status.code, status.signal) == expected


def test_ended_out_of_memory() -> None:
    status = observed(seen(container(ExitCode=137, OOMKilled=True)), requested=True).exit
    assert status == ExitStatus(signal=9, oom_killed=True, requested=True, at_s=1795444316.5)


def test_running_and_never_started() -> None:
    runs = observed(seen(container(Running=True, Pid=7)), requested=False)
    assert (runs.running, runs.pid, runs.exit) == (True, 7, None)
    assert runs.started_at_s == pytest.approx(1795444314.966852962)
    never = {"StartedAt": "0001-01-01T00:00:00Z", "FinishedAt": "0001-01-01T00:00:00Z"}
    made = observed(seen(container(**never, ExitCode=128)), requested=False)
    assert (made.running, made.started_at_s, made.exit) == (False, 0.0, None)


@given(st.integers(min_value=10**9, max_value=4 * 10**18))
def test_times_are_read_to_the_nanosecond(at_ns: int) -> None:
    whole, rest = divmod(at_ns, 10**9)
    stamp = datetime.fromtimestamp(whole, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    assert nanoseconds(f"{stamp}.{rest:09}Z") == at_ns
    assert nanoseconds(f"{stamp}Z") == whole * 10**9


def test_a_line_of_the_log() -> None:
    stamp, line = log_line("m1", b"2026-11-23T14:31:54.966852962Z a b\xff \r\n")
    assert stamp == "2026-11-23T14:31:54.966852962Z"
    assert (line.machine_id, line.text) == ("m1", "a b\ufffd ")
    assert line.at_s == pytest.approx(1795444314.966852962)


# --------------------------------------------------------------------------- refusals


def refusal(status: int, explanation: str, kind: type[APIError] = APIError) -> APIError:
    response = Response()
    response.status_code = status
    return kind("refused", response, explanation)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (refusal(404, "No such image: a:1", ImageNotFound), NotFound),
        (refusal(404, "network flyd-ams-1 not found"), NotFound),
        (refusal(500, "write /var/lib/docker: no space left on device"), Unavailable),
        (refusal(403, "Address already in use"), Conflict),
        (refusal(403, "Pool overlaps with other one on this address space"), Conflict),
        (refusal(500, "unable to find user x: no matching entries in passwd file"), InvalidInput),
        (refusal(400, "invalid mount config: bind source path does not exist: /x"), NotFound),
        (refusal(409, 'The container name "/flyd-m1" is already in use by container "c"'), Conflict),
        (refusal(400, "something else"), InvalidInput),
        (refusal(403, "something else"), Refused),
        (refusal(500, "something else"), Unavailable),
        (ConnectionError("Connection refused"), Unavailable),
        (FileNotFoundError(2, "No such file or directory"), Unavailable),
    ],
)
def test_refusals_say_what_where_and_why(error: Exception, kind: type[FlydError]) -> None:
    with pytest.raises(kind) as raised, translated("ams-1", "make machine m1"):
        raise error
    assert type(raised.value) is kind
    assert "make machine m1" in raised.value.message
    assert "host ams-1" in raised.value.message
    why = (error.explanation or "") if isinstance(error, APIError) else str(error)
    assert why in raised.value.message
