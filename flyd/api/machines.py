"""MachinesService: intent is written to etcd; exec and logs are handed to the machine's host."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from flyd.api import views
from flyd.api.apps import check_regions
from flyd.api.context import ApiContext
from flyd.api.logs import forward, machine_logs
from flyd.errors import FlydError, InvalidInput, Refused
from flyd.machines import commands
from flyd.model import Desired, Machine, MachineState
from flyd.placement import placer
from flyd.store import keys
from flyd.v1 import machines_pb2, machines_pb2_grpc

WAIT_MAX_S = 60.0
EXEC_DEFAULT_S = 60.0
TAIL_DEFAULT = 100


class MachinesServicer(machines_pb2_grpc.MachinesServiceServicer):
    """Machines over gRPC."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    def _view(self, machine: Machine) -> machines_pb2.Machine:
        return views.machine(machine, self._context.status(machine), self._context.alive(machine.host))

    async def CreateMachine(
        self, request: machines_pb2.CreateMachineRequest, context: Any
    ) -> machines_pb2.CreateMachineResponse:
        """Place and claim in one transaction."""
        ctx = self._context
        ctx.app(request.app_name)
        if request.region:
            check_regions(ctx, [request.region])
        order = placer.Order(
            app=request.app_name,
            region=request.region or None,
            name=request.name,
            config=views.machine_config(request.config),
        )
        machine = await placer.place(ctx.kv, order, clock=ctx.clock, entropy=ctx.entropy)
        return machines_pb2.CreateMachineResponse(machine=self._view(machine))

    async def GetMachine(
        self, request: machines_pb2.GetMachineRequest, context: Any
    ) -> machines_pb2.GetMachineResponse:
        """From the mirror."""
        machine = self._context.machine(request.app_name, request.machine_id)
        return machines_pb2.GetMachineResponse(machine=self._view(machine))

    async def ListMachines(
        self, request: machines_pb2.ListMachinesRequest, context: Any
    ) -> machines_pb2.ListMachinesResponse:
        """From the mirror."""
        ctx = self._context
        prefix = keys.MACHINES
        if request.app_name:
            prefix += f"{ctx.app(request.app_name).name}/"
        machines = [item.value for item in ctx.mirror.list(prefix, Machine)]
        return machines_pb2.ListMachinesResponse(
            machines=[self._view(m) for m in machines if request.region in ("", m.region)]
        )

    async def _set(self, app: str, machine_id: str, desired: Desired) -> str:
        machine = self._context.machine(app, machine_id)
        status = self._context.status(machine)
        await commands.set_desired(self._context.kv, machine.app, machine.id, desired)
        return status.state if status else MachineState.CREATED

    async def StartMachine(
        self, request: machines_pb2.StartMachineRequest, context: Any
    ) -> machines_pb2.StartMachineResponse:
        """Want it started; one that rests although it is wanted started is asked once more."""
        ctx = self._context
        machine = ctx.machine(request.app_name, request.machine_id)
        status = ctx.status(machine)
        resting = status is not None and status.state in (MachineState.STOPPED, MachineState.FAILED)
        if resting and machine.desired is Desired.STARTED:
            await commands.restart(ctx.kv, machine.app, machine.id)
        else:
            await commands.set_desired(ctx.kv, machine.app, machine.id, Desired.STARTED)
        previous = status.state if status else MachineState.CREATED
        return machines_pb2.StartMachineResponse(previous_state=previous)

    async def StopMachine(
        self, request: machines_pb2.StopMachineRequest, context: Any
    ) -> machines_pb2.StopMachineResponse:
        """Want it stopped."""
        previous = await self._set(request.app_name, request.machine_id, Desired.STOPPED)
        return machines_pb2.StopMachineResponse(previous_state=previous)

    async def DestroyMachine(
        self, request: machines_pb2.DestroyMachineRequest, context: Any
    ) -> machines_pb2.DestroyMachineResponse:
        """Want it gone; a started one only with force."""
        machine = self._context.machine(request.app_name, request.machine_id)
        status = self._context.status(machine)
        if status and status.state == MachineState.STARTED and not request.force:
            raise Refused(
                f"machine {machine.id} is started", hint="Stop it first, or destroy it with --force."
            )
        await self._set(machine.app, machine.id, Desired.DESTROYED)
        return machines_pb2.DestroyMachineResponse()

    async def WaitMachine(
        self, request: machines_pb2.WaitMachineRequest, context: Any
    ) -> machines_pb2.WaitMachineResponse:
        """Wait on the mirror, without polling."""
        ctx = self._context
        try:
            state = MachineState(request.state or "started")
        except ValueError:
            states = ", ".join(MachineState)
            raise InvalidInput(f"no state is called {request.state!r}", hint=f"States: {states}.") from None
        machine = ctx.machine(request.app_name, request.machine_id)
        timeout_s = min(request.timeout or WAIT_MAX_S, WAIT_MAX_S)
        if state is MachineState.DESTROYED:
            await commands.wait_gone(ctx.mirror, machine, timeout_s)
        else:
            await commands.wait_state(ctx.mirror, machine, state, timeout_s)
        return machines_pb2.WaitMachineResponse(machine=self._view(machine))

    async def ExecMachine(
        self, request: machines_pb2.ExecMachineRequest, context: Any
    ) -> AsyncIterator[machines_pb2.ExecMachineResponse]:
        """Here if the machine is on this host, else by the same call to its host's flyd."""
        if not request.command:
            raise InvalidInput("no command to run was given")
        machine = self._context.machine(request.app_name, request.machine_id)
        if machine.host != self._context.host.name:
            async for part in forward(self._context, machine, "ExecMachine", request):
                yield part
            return
        timeout_s = request.timeout or EXEC_DEFAULT_S
        async for out in self._context.driver.exec(machine.id, list(request.command), timeout_s):
            yield machines_pb2.ExecMachineResponse(
                stdout=out.stdout, stderr=out.stderr, exit_code=out.exit_code
            )

    async def StreamLogs(
        self, request: machines_pb2.StreamLogsRequest, context: Any
    ) -> AsyncIterator[machines_pb2.StreamLogsResponse]:
        """All machines of the app at once; each from its own host."""
        ctx = self._context
        if request.machine_id:
            machines = [ctx.machine(request.app_name, request.machine_id)]
        else:
            app = ctx.app(request.app_name)
            machines = [i.value for i in ctx.mirror.list(f"{keys.MACHINES}{app.name}/", Machine)]
        lines: asyncio.Queue[machines_pb2.StreamLogsResponse | None] = asyncio.Queue(maxsize=1000)
        async with asyncio.TaskGroup() as group:
            readers = [group.create_task(self._read_logs(m, request, lines)) for m in machines]
            group.create_task(_close_when_done(readers, lines))
            while (line := await lines.get()) is not None:
                yield line

    async def _read_logs(
        self,
        machine: Machine,
        request: machines_pb2.StreamLogsRequest,
        lines: asyncio.Queue[machines_pb2.StreamLogsResponse | None],
    ) -> None:
        """One machine's lines into the queue; a host that is away costs its lines, not the call."""
        try:
            tail = request.tail or TAIL_DEFAULT
            async for line in machine_logs(self._context, machine, tail, request.follow):
                await lines.put(line)
        except FlydError as error:
            await lines.put(
                machines_pb2.StreamLogsResponse(
                    machine_id=machine.id,
                    region=machine.region,
                    timestamp=self._context.clock.wall_s(),
                    message=f"[flyd] no logs from host {machine.host}: {error.message}",
                )
            )


async def _close_when_done(
    readers: list[asyncio.Task[None]], lines: asyncio.Queue[machines_pb2.StreamLogsResponse | None]
) -> None:
    if readers:
        await asyncio.wait(readers)
    await lines.put(None)
