"""The part of MachinesService that changes machines: intent is written to etcd, by the commands.

Every call here respects the lease on the machine (flyd/machines/leases.py).
"""

from __future__ import annotations

from typing import Any

import msgspec

from flyd.api import machine_views as views
from flyd.api.apps import check_regions
from flyd.api.context import ApiContext
from flyd.api.machine_hosts import ask_host
from flyd.errors import Conflict, InvalidInput, Refused
from flyd.machines import commands, idempotency, leases, updates
from flyd.model import Desired, Machine, MachineState, Mount, StopConfig, decode
from flyd.placement import placer
from flyd.store import keys
from flyd.v1 import machines_pb2 as pb
from flyd.v1 import machines_pb2_grpc

NAME_MAX = 63
FORCED_STOP_S = 30.0  # the longest that a machine which is to be destroyed may take to end
AT_REST = (
    MachineState.CREATED,
    MachineState.STOPPED,
    MachineState.FAILED,
    MachineState.DESTROYING,
    MachineState.DESTROYED,
)


class MachineChanges(machines_pb2_grpc.MachinesServiceServicer):
    """Changes over gRPC."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    def _view(self, machine: Machine) -> pb.Machine:
        return views.machine(machine, self._context.status(machine), self._context.alive(machine.host))

    def _state(self, machine: Machine) -> str:
        status = self._context.status(machine)
        return status.state if status else MachineState.CREATED

    # ------------------------------------------------------------------ new machines

    async def CreateMachine(self, request: pb.CreateMachineRequest, context: Any) -> pb.CreateMachineResponse:
        """Place and claim in one transaction."""
        ctx = self._context
        ctx.app(request.app_name)
        if request.region:
            check_regions(ctx, [request.region])
        order = placer.Order(
            app=request.app_name,
            region=request.region or None,
            name=_name(request.name),
            config=views.machine_config(request.config),
        )
        machine = await self._place(order, request.idempotency_key, request)
        return pb.CreateMachineResponse(machine=self._view(machine))

    async def CloneMachine(self, request: pb.CloneMachineRequest, context: Any) -> pb.CloneMachineResponse:
        """The same configuration and release, in this region or another; its volumes begin empty."""
        ctx = self._context
        source = ctx.machine(request.app_name, request.machine_id)
        if request.region:
            check_regions(ctx, [request.region])
        mounts = tuple(Mount(path=m.path, name=m.name, size_gb=m.size_gb) for m in source.config.mounts)
        order = placer.Order(
            app=source.app,
            region=request.region or source.region,
            name=_name(request.name),
            config=msgspec.structs.replace(source.config, mounts=mounts),
            release=source.release,
        )
        machine = await self._place(order, request.idempotency_key, request)
        return pb.CloneMachineResponse(machine=self._view(machine))

    async def _place(
        self, order: placer.Order, key: str, request: pb.CreateMachineRequest | pb.CloneMachineRequest
    ) -> Machine:
        """Place it; with a key once, however often it is asked for."""
        ctx = self._context
        if not key:
            return await ctx.placer.place(order)
        asked = request.SerializeToString(deterministic=True)
        made = await idempotency.remember(ctx.kv, order.app, key, asked, entropy=ctx.entropy)
        if made.done:
            record = await ctx.kv.get(keys.machine(order.app, made.machine_id))
            if record is None:
                raise Conflict(
                    f"machine {made.machine_id}, which idempotency key {key!r} made, is destroyed",
                    hint="Take a new key to make another machine.",
                )
            return decode(record.value, Machine)
        order = msgspec.structs.replace(order, machine_id=made.machine_id)
        machine = await ctx.placer.place(order)
        await idempotency.mark_done(ctx.kv, order.app, key, made)
        return machine

    # ------------------------------------------------------------------ the lifecycle

    async def UpdateMachine(self, request: pb.UpdateMachineRequest, context: Any) -> pb.UpdateMachineResponse:
        """A new version, if the present one is the one that was read."""
        ctx = self._context
        machine = ctx.machine(request.app_name, request.machine_id)
        if not request.HasField("config"):
            raise InvalidInput("no config was given", hint="An update takes a whole configuration.")
        updated = await updates.update(
            ctx.kv,
            machine.app,
            machine.id,
            views.machine_config(request.config),
            current_version=request.current_version,
            nonce=request.lease_nonce,
            clock=ctx.clock,
            entropy=ctx.entropy,
        )
        return pb.UpdateMachineResponse(machine=self._view(updated))

    async def StartMachine(self, request: pb.StartMachineRequest, context: Any) -> pb.StartMachineResponse:
        """Want it started; one that rests although it is wanted started is asked once more."""
        ctx = self._context
        machine = ctx.machine(request.app_name, request.machine_id)
        previous = self._state(machine)
        nonce = request.lease_nonce
        waits = previous == MachineState.CREATED and machine.starts_at_s > 0
        rests = previous in (MachineState.STOPPED, MachineState.FAILED) or waits
        if machine.desired is Desired.STARTED and rests:
            await commands.restart(ctx.kv, machine.app, machine.id, nonce=nonce)
        else:
            await commands.set_desired(ctx.kv, machine.app, machine.id, Desired.STARTED, nonce=nonce)
        return pb.StartMachineResponse(previous_state=previous)

    async def StopMachine(self, request: pb.StopMachineRequest, context: Any) -> pb.StopMachineResponse:
        """Want it stopped, as asked for here or else as configured."""
        ctx = self._context
        machine = ctx.machine(request.app_name, request.machine_id)
        await commands.set_desired(
            ctx.kv,
            machine.app,
            machine.id,
            Desired.STOPPED,
            stop=views.stop_of(machine, request),
            nonce=request.lease_nonce,
        )
        return pb.StopMachineResponse(previous_state=self._state(machine))

    async def SuspendMachine(
        self, request: pb.SuspendMachineRequest, context: Any
    ) -> pb.SuspendMachineResponse:
        """Refused: what would be called suspended would be lost with its host's next restart."""
        machine = self._context.machine(request.app_name, request.machine_id)
        raise Refused(
            f"machine {machine.id} can not be suspended: the {self._context.host.driver} driver can not keep "
            "a machine's memory",
            hint=f"Stop it (`fly machine stop {machine.id}`) and start it when it is needed: what it has on "
            "its volume stays, what it has in memory does not.",
        )

    async def RestartMachine(
        self, request: pb.RestartMachineRequest, context: Any
    ) -> pb.RestartMachineResponse:
        """Want its process ended and started again."""
        ctx = self._context
        machine = ctx.machine(request.app_name, request.machine_id)
        stop = views.stop_of(machine, request)
        await commands.restart(ctx.kv, machine.app, machine.id, stop=stop, nonce=request.lease_nonce)
        return pb.RestartMachineResponse(previous_state=self._state(machine))

    async def SignalMachine(self, request: pb.SignalMachineRequest, context: Any) -> pb.SignalMachineResponse:
        """Here if the machine is on this host, else by the same call to its host's flyd."""
        ctx = self._context
        machine = ctx.machine(request.app_name, request.machine_id)
        name = views.signal_name(request.signal)
        if machine.host != ctx.host.name:
            return await ask_host(ctx, machine, "SignalMachine", request)
        await leases.guard(ctx.kv, machine.app, machine.id, request.lease_nonce)
        await ctx.driver.signal(machine.id, name)
        return pb.SignalMachineResponse()

    async def DestroyMachine(
        self, request: pb.DestroyMachineRequest, context: Any
    ) -> pb.DestroyMachineResponse:
        """Want it gone; one whose process may run only with force, and then soon."""
        ctx = self._context
        machine = ctx.machine(request.app_name, request.machine_id)
        state = self._state(machine)
        if state not in AT_REST and not request.force:
            raise Refused(
                f"machine {machine.id} is {state}", hint="Stop it first, or destroy it with --force."
            )
        usual = machine.config.stop
        stop = StopConfig(signal=usual.signal, timeout_s=min(usual.timeout_s, FORCED_STOP_S))
        nonce = request.lease_nonce
        await commands.set_desired(ctx.kv, machine.app, machine.id, Desired.DESTROYED, stop=stop, nonce=nonce)
        return pb.DestroyMachineResponse()

    # ------------------------------------------------------------------ routing and metadata

    async def CordonMachine(self, request: pb.CordonMachineRequest, context: Any) -> pb.CordonMachineResponse:
        """No traffic from any edge from now on."""
        await self._set_cordoned(request, True)
        return pb.CordonMachineResponse()

    async def UncordonMachine(
        self, request: pb.UncordonMachineRequest, context: Any
    ) -> pb.UncordonMachineResponse:
        """Traffic again."""
        await self._set_cordoned(request, False)
        return pb.UncordonMachineResponse()

    async def _set_cordoned(
        self, request: pb.CordonMachineRequest | pb.UncordonMachineRequest, cordoned: bool
    ) -> None:
        machine = self._context.machine(request.app_name, request.machine_id)
        nonce = request.lease_nonce
        await commands.set_cordoned(self._context.kv, machine.app, machine.id, cordoned, nonce=nonce)

    async def GetMachineMetadata(
        self, request: pb.GetMachineMetadataRequest, context: Any
    ) -> pb.GetMachineMetadataResponse:
        """From the mirror."""
        machine = self._context.machine(request.app_name, request.machine_id)
        return pb.GetMachineMetadataResponse(metadata=machine.config.metadata)

    async def SetMachineMetadata(
        self, request: pb.SetMachineMetadataRequest, context: Any
    ) -> pb.SetMachineMetadataResponse:
        """One key; no new version."""
        ((key, value),) = views.metadata({request.key: request.value}).items()
        await self._set_metadata(request, key, value)
        return pb.SetMachineMetadataResponse()

    async def DeleteMachineMetadata(
        self, request: pb.DeleteMachineMetadataRequest, context: Any
    ) -> pb.DeleteMachineMetadataResponse:
        """One key; absent is no error."""
        await self._set_metadata(request, request.key, None)
        return pb.DeleteMachineMetadataResponse()

    async def _set_metadata(
        self,
        request: pb.SetMachineMetadataRequest | pb.DeleteMachineMetadataRequest,
        key: str,
        value: str | None,
    ) -> None:
        machine = self._context.machine(request.app_name, request.machine_id)
        if value is not None and len(machine.config.metadata) >= views.MAX_ENTRIES:
            raise InvalidInput(
                f"machine {machine.id} has {views.MAX_ENTRIES} metadata keys, and may have no more"
            )
        nonce = request.lease_nonce
        await commands.set_metadata(self._context.kv, machine.app, machine.id, key, value, nonce=nonce)


def _name(name: str) -> str:
    fits = len(name) <= NAME_MAX and all(c.isalnum() or c in "-_" for c in name) and name.isascii()
    if not fits:
        raise InvalidInput(
            f"a machine can not be called {name[:80]!r}",
            hint=f"At most {NAME_MAX} letters, digits, - and _; or none: flyd makes one.",
        )
    return name
