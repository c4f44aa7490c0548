"""One question to one machine, answered by the flyd of its host (streams: logs.py)."""

from __future__ import annotations

from typing import Any

import grpc.aio

from flyd.api.context import ApiContext
from flyd.api.status import from_rpc
from flyd.errors import Unavailable
from flyd.model import Machine
from flyd.v1 import machines_pb2_grpc

TIMEOUT_S = 10.0


async def ask_host(context: ApiContext, machine: Machine, method: str, request: Any) -> Any:
    """The answer of a unary call of MachinesService, from the machine's own host."""
    host = context.peers.host(machine.host)
    if not context.alive(host.name):
        raise Unavailable(
            f"host {host.name} ({host.region}) of machine {machine.id} is lost",
            hint="`fly hosts list` shows the hosts; the call works once it is back.",
        )
    stub = machines_pb2_grpc.MachinesServiceStub(context.peers.channel(host))
    try:
        return await getattr(stub, method)(request, timeout=TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error, f"{host.name} ({host.api_address})") from error
