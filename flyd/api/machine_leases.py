"""The part of MachinesService that is about leases; the rules are flyd/machines/leases.py's."""

from __future__ import annotations

from typing import Any

from flyd.api import machine_views as views
from flyd.api.context import ApiContext
from flyd.errors import InvalidInput
from flyd.machines import leases
from flyd.v1 import machines_pb2 as pb
from flyd.v1 import machines_pb2_grpc

DEFAULT_TTL_S = 60
MAX_TEXT = 200


class MachineLeases(machines_pb2_grpc.MachinesServiceServicer):
    """Leases over gRPC."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def GetMachineLease(
        self, request: pb.GetMachineLeaseRequest, context: Any
    ) -> pb.GetMachineLeaseResponse:
        """From etcd: a lease that has run out is not shown."""
        machine = self._context.machine(request.app_name, request.machine_id)
        held = await leases.find(self._context.kv, machine.app, machine.id)
        return pb.GetMachineLeaseResponse(lease=views.lease(held, with_nonce=False))

    async def AcquireMachineLease(
        self, request: pb.AcquireMachineLeaseRequest, context: Any
    ) -> pb.AcquireMachineLeaseResponse:
        """Take the machine; the answer has the nonce."""
        ctx = self._context
        machine = ctx.machine(request.app_name, request.machine_id)
        for what, text in (("owner", request.owner), ("description", request.description)):
            if len(text) > MAX_TEXT:
                raise InvalidInput(f"the {what} of a lease has at most {MAX_TEXT} characters")
        taken = await leases.acquire(
            ctx.kv,
            machine.app,
            machine.id,
            owner=request.owner,
            description=request.description,
            ttl_s=request.ttl or DEFAULT_TTL_S,
            clock=ctx.clock,
            entropy=ctx.entropy,
        )
        return pb.AcquireMachineLeaseResponse(lease=views.lease(taken, with_nonce=True))

    async def RenewMachineLease(
        self, request: pb.RenewMachineLeaseRequest, context: Any
    ) -> pb.RenewMachineLeaseResponse:
        """Its whole time again."""
        ctx = self._context
        machine = ctx.machine(request.app_name, request.machine_id)
        held = await leases.renew(ctx.kv, machine.app, machine.id, request.nonce, clock=ctx.clock)
        return pb.RenewMachineLeaseResponse(lease=views.lease(held, with_nonce=True))

    async def ReleaseMachineLease(
        self, request: pb.ReleaseMachineLeaseRequest, context: Any
    ) -> pb.ReleaseMachineLeaseResponse:
        """Give the machine back."""
        ctx = self._context
        machine = ctx.machine(request.app_name, request.machine_id)
        await leases.release(ctx.kv, machine.app, machine.id, request.nonce, force=request.force)
        return pb.ReleaseMachineLeaseResponse()
