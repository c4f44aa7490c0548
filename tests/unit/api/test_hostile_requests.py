"""What is refused before a servicer sees it, and which status a caller gets whatever goes wrong."""

from __future__ import annotations

import asyncio
import gc
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import grpc
import grpc.aio
import pytest
import structlog
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from flyd import errors
from flyd.api import limits
from flyd.api.interceptor import ErrorInterceptor
from flyd.api.status import ERROR_KEY, from_rpc
from flyd.errors import InvalidInput
from flyd.v1 import (
    apps_pb2,
    apps_pb2_grpc,
    events_pb2,
    exec_pb2,
    identity_pb2,
    images_pb2,
    machines_pb2,
    placement_pb2,
    postgres_pb2,
    releases_pb2,
    releases_pb2_grpc,
    volumes_pb2,
)

Create, Config = machines_pb2.CreateMachineRequest, machines_pb2.MachineConfig

REFUSED: list[tuple[Message, str]] = [
    (apps_pb2.GetAppRequest(app_name="../secrets/chat"), "app_name"),
    (apps_pb2.GetAppRequest(app_name=".."), "app_name"),
    (apps_pb2.GetAppRequest(app_name="a\0b"), "NUL"),
    (apps_pb2.GetAppRequest(app_name="a\u202eb"), "app_name"),
    (apps_pb2.GetAppRequest(app_name="x" * 513), "513 characters, at most 512"),
    (apps_pb2.CreateAppRequest(app_name="a", regions=["ams"] * 51), "regions has 51 entries: at most 50"),
    (apps_pb2.SetSecretsRequest(app_name="a", values={"A=B": "x"}), "'A=B' is no name in values"),
    (apps_pb2.SetSecretsRequest(app_name="a", values={"": "x"}), "'' is no name"),
    (apps_pb2.SetSecretsRequest(app_name="a", values={"A": "x\0"}), r"values\[A\] holds a NUL byte"),
    (apps_pb2.SetSecretsRequest(app_name="a", values={"A": "x" * 65537}), "too long"),
    (events_pb2.ListEventsRequest(app_name="a", since=math.nan), "since can not be nan"),
    (machines_pb2.WaitMachineRequest(timeout=math.inf), "timeout can not be inf"),
    (machines_pb2.ExecMachineRequest(timeout=-1), "timeout can not be -1"),
    (machines_pb2.ExecMachineRequest(command=["a"] * 1001), "command has 1001 entries: at most 1000"),
    (machines_pb2.StreamLogsRequest(tail=-5), "tail can not be -5"),
    (machines_pb2.GetMachineRequest(machine_id="m/../n"), "machine_id"),
    (Create(config=Config(env={"A": "x" * 60_000, "B": "x" * 60_000, "C": "x" * 20_000})), "config is too"),
    (
        Create(config=Config(checks={"c": machines_pb2.MachineHealthCheck(interval=math.nan)})),
        r"\[c\].interval",
    ),
    (Create(config=Config(mounts=[machines_pb2.MachineMount(size_gb=-1)])), r"mounts\[0\].size_gb .* -1 GB"),
    (placement_pb2.ScaleAppRequest(count=2**31 - 1), "count can not be"),
    (postgres_pb2.CreateClusterRequest(memory_mb=-256), "memory_mb can not be -256 MB: 1 to"),
    (volumes_pb2.CreateVolumeRequest(size_gb=10**9), "1000000000 GB: 1 to 500 is possible"),
    (
        images_pb2.DownloadImageRequest(needs=[images_pb2.BlobNeed(offset_bytes=-1)]),
        r"needs\[0\].offset_bytes",
    ),
    (identity_pb2.JoinRequest(subnet="10.x"), "subnet"),
    (identity_pb2.JoinRequest(subnet="10.999"), "subnet"),
    (identity_pb2.JoinRequest(addresses=["localhost"]), "IP address|addresses"),
    (releases_pb2.DeployRequest(config="x" * 1_100_000), "the request is too large"),
]

ACCEPTED: list[Message] = [
    apps_pb2.GetAppRequest(app_name="Not-A-Name but harmless"),
    apps_pb2.SetSecretsRequest(app_name="a", values={"DATABASE_URL": "postgres://ü:p@h/d\n", "GONE": ""}),
    releases_pb2.DeployRequest(config="a = \0" + "x" * 900_000, description="über\nzwei Zeilen"),
    releases_pb2.UploadSourceRequest(digest="0" * 64, data=b"\0" * 3_000_000),
    exec_pb2.SessionRequest(stdin=b"\xff\0"),
    machines_pb2.SetMachineMetadataRequest(machine_id="m-1", key="team/name", value="x y"),
    machines_pb2.StopMachineRequest(machine_id="m-1", timeout=0.0),
    identity_pb2.JoinRequest(name="h", subnet="10.214", addresses=["fd00::1", "10.0.0.1"], public_key="-\n-"),
]


@pytest.mark.parametrize(("request_", "said"), REFUSED, ids=lambda value: type(value).__name__)
def test_what_no_call_can_mean(request_: Message, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        limits.check(request_)


@pytest.mark.parametrize("request_", ACCEPTED, ids=lambda value: type(value).__name__)
def test_what_a_servicer_may_judge(request_: Message) -> None:
    limits.check(request_)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_not(data: bytes) -> None:
    """Whatever protobuf takes, `check` decides; an error is short enough to be read."""
    try:
        request = Create.FromString(data)
    except Exception:  # noqa: BLE001 - protobuf's own; tested below, over a connection
        return
    try:
        limits.check(request)
    except InvalidInput as error:
        said = error.message
    else:
        said = ""
    assert len(said) < 2_000


# --------------------------------------------------------------------------- over a connection


class Apps(apps_pb2_grpc.AppsServiceServicer):
    """Fails as it is told."""

    error: Exception | None = None

    async def GetApp(  # noqa: N802 - gRPC's name
        self, request: apps_pb2.GetAppRequest, context: Any
    ) -> apps_pb2.GetAppResponse:
        """The error, or an answer."""
        if self.error is not None:
            raise self.error
        return apps_pb2.GetAppResponse()


class Releases(releases_pb2_grpc.ReleasesServiceServicer):
    """Reads a stream within a task group, as sessions do."""

    async def UploadSource(  # noqa: N802 - gRPC's name
        self, request_iterator: AsyncIterator[releases_pb2.UploadSourceRequest], context: Any
    ) -> releases_pb2.UploadSourceResponse:
        """How many came."""
        count = 0

        async def read() -> None:
            nonlocal count
            async for _ in request_iterator:
                count += 1

        async with asyncio.TaskGroup() as group:
            group.create_task(read())
        return releases_pb2.UploadSourceResponse(image_ref=str(count))

    async def DownloadSource(  # noqa: N802 - gRPC's name
        self, request: releases_pb2.DownloadSourceRequest, context: Any
    ) -> AsyncIterator[releases_pb2.DownloadSourceResponse]:
        """Without an end, from within a task group, as logs do."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(3600))
                while True:
                    yield releases_pb2.DownloadSourceResponse(data=b"x" * 1_000_000)
        finally:
            DOWNLOADS_ENDED.set()


DOWNLOADS_ENDED = asyncio.Event()


@asynccontextmanager
async def served(error: Exception | None = None) -> AsyncGenerator[Any]:
    """A channel to a server that has the interceptor."""
    server: grpc.aio.Server = cast(Any, grpc.aio).server(
        interceptors=(ErrorInterceptor(lambda: 0.0, lambda method, context: None),)
    )
    apps = cast(Any, Apps)()
    apps.error = error
    apps_pb2_grpc.add_AppsServiceServicer_to_server(apps, server)
    releases_pb2_grpc.add_ReleasesServiceServicer_to_server(cast(Any, Releases)(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(None)


async def status(call: Any) -> tuple[grpc.StatusCode, errors.FlydError]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await asyncio.wait_for(call, 10)
    return raised.value.code(), from_rpc(raised.value, "here")


async def test_malformed_bytes() -> None:
    with structlog.testing.capture_logs() as logged:
        async with served() as channel:
            for data in (b"\xff" * 12, b"\x0a\x7fx", b"\x0a\x02\xff\xfe", b"\x0b" * 1000):
                call = channel.unary_unary("/flyd.v1.AppsService/GetApp")(data)
                code, error = await status(call)
                assert code is grpc.StatusCode.INVALID_ARGUMENT
                assert "no such message" in error.message
                stream = channel.stream_unary("/flyd.v1.ReleasesService/UploadSource")
                code, error = await status(stream(iter([b"", data])))
                assert code is grpc.StatusCode.INVALID_ARGUMENT
                assert isinstance(error, InvalidInput)
    assert logged == []


RAISED: list[tuple[Exception, grpc.StatusCode, type[errors.FlydError]]] = [
    (errors.NotFound("x" * 100_000), grpc.StatusCode.NOT_FOUND, errors.NotFound),
    (InvalidInput("é%\n" * 10_000, hint="é" * 10_000), grpc.StatusCode.INVALID_ARGUMENT, InvalidInput),
    (InvalidInput("lone \udcff half"), grpc.StatusCode.INVALID_ARGUMENT, InvalidInput),
    (errors.FlydError("broke"), grpc.StatusCode.UNAVAILABLE, errors.FlydError),
    (errors.Compacted(7), grpc.StatusCode.UNAVAILABLE, errors.FlydError),
    (ExceptionGroup("g", [errors.Refused("no")]), grpc.StatusCode.FAILED_PRECONDITION, errors.Refused),
]


@pytest.mark.parametrize(("error", "code", "kind"), RAISED)
async def test_what_is_raised_arrives(
    error: Exception, code: grpc.StatusCode, kind: type[errors.FlydError]
) -> None:
    with structlog.testing.capture_logs() as logged:
        async with served(error) as channel:
            stub: Any = apps_pb2_grpc.AppsServiceStub(channel)
            got, told = await status(stub.GetApp(apps_pb2.GetAppRequest(app_name="a")))
    assert (got, type(told)) == (code, kind)
    assert logged == []


async def test_a_bug_stays_one() -> None:
    for bug in (KeyError("x"), ExceptionGroup("g", [errors.Refused("no"), KeyError("x")])):
        with structlog.testing.capture_logs() as logged:
            async with served(bug) as channel:
                stub: Any = apps_pb2_grpc.AppsServiceStub(channel)
                got, told = await status(stub.GetApp(apps_pb2.GetAppRequest(app_name="a")))
        assert (got, type(told)) == (grpc.StatusCode.INTERNAL, errors.InvariantBroken)
        assert [entry["event"] for entry in logged] == ["api.bug"]


async def test_reasons_of_many_hosts() -> None:
    reasons = {f"host-{number}": "needs 512 MB memory, 17 MB are free" for number in range(1000)}
    async with served(errors.Unplaceable("no host takes it", reasons, hint="add one")) as channel:
        stub: Any = apps_pb2_grpc.AppsServiceStub(channel)
        code, told = await status(stub.GetApp(apps_pb2.GetAppRequest(app_name="a")))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert isinstance(told, errors.Unplaceable)
    shown = len(told.reasons) - 1
    assert shown > 20
    assert told.reasons["..."] == f"and {1000 - shown} other hosts"
    assert json.dumps(told.reasons)
    assert ERROR_KEY.endswith("-bin")


async def test_a_client_that_goes_ends_what_yields_in_a_task_group() -> None:
    loop_errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, told: loop_errors.append(told))
    DOWNLOADS_ENDED.clear()
    async with served() as channel:
        stub: Any = releases_pb2_grpc.ReleasesServiceStub(channel)
        call = stub.DownloadSource(releases_pb2.DownloadSourceRequest(digest="a"))
        await call.read()
        await asyncio.sleep(0.1)  # until the server's windows are full: it then hangs in a write
        call.cancel()
        await asyncio.wait_for(DOWNLOADS_ENDED.wait(), 10)
    gc.collect()
    await asyncio.sleep(0)
    assert loop_errors == []
