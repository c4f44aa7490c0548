"""Children that become another user while gRPC is busy: its handlers for a fork crashed every second one."""

from __future__ import annotations

import asyncio
import os
from asyncio.subprocess import PIPE
from typing import Any, cast

import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

CHILDREN = 100
CLIENTS = 4
NOBODY = 65534

pytestmark = pytest.mark.timeout(60)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
async def test_a_child_of_another_user_survives_its_fork() -> None:
    server: grpc.aio.Server = cast(Any, grpc.aio).server()
    health_pb2_grpc.add_HealthServicer_to_server(cast(Any, health).aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def ask() -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while True:
                await stub.Check(health_pb2.HealthCheckRequest())

    async with asyncio.TaskGroup() as group:
        asking = [group.create_task(ask()) for _ in range(CLIENTS)]
        ended: list[tuple[int | None, bytes]] = []
        for _ in range(CHILDREN):
            child = await asyncio.create_subprocess_exec("true", user=NOBODY, stderr=PIPE)
            _, said = await child.communicate()
            ended.append((child.returncode, said))
        for task in asking:
            task.cancel()
    await server.stop(None)
    assert set(ended) == {(0, b"")}
