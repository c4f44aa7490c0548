"""The log lines of machines, wherever they are: from this host's driver, or from their own host's flyd."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc.aio

from flyd.api.context import ApiContext
from flyd.api.status import from_rpc
from flyd.errors import Unavailable
from flyd.model import Machine
from flyd.v1 import machines_pb2, machines_pb2_grpc


async def forward(context: ApiContext, machine: Machine, method: str, request: Any) -> AsyncIterator[Any]:
    """A streaming call of MachinesService, answered by the machine's own host."""
    host = context.peers.host(machine.host)
    if not context.alive(host.name):
        raise Unavailable(
            f"host {host.name} ({host.region}) of machine {machine.id} is lost",
            hint="`fly hosts list` shows the hosts; the call works once it is back.",
        )
    stub = machines_pb2_grpc.MachinesServiceStub(context.peers.channel(host))
    try:
        async for part in getattr(stub, method)(request):
            yield part
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error, f"{host.name} ({host.api_address})") from error


async def machine_logs(
    context: ApiContext, machine: Machine, tail: int, follow: bool
) -> AsyncIterator[machines_pb2.StreamLogsResponse]:
    """One machine's last `tail` lines, then with `follow` every new one."""
    if machine.host == context.host.name:
        async for line in context.driver.logs(machine.id, tail=tail, follow=follow):
            yield machines_pb2.StreamLogsResponse(
                machine_id=machine.id, region=machine.region, timestamp=line.at_s, message=line.text
            )
        return
    request = machines_pb2.StreamLogsRequest(
        app_name=machine.app, machine_id=machine.id, tail=tail, follow=follow
    )
    async for line in forward(context, machine, "StreamLogs", request):
        yield line


async def last_lines(context: ApiContext, machine: Machine, count: int) -> Sequence[str]:
    """What a machine printed last; the deployer puts it into the error of a failed run."""
    return [line.message async for line in machine_logs(context, machine, count, follow=False)]
