"""MachinesService: machines as they are; what is inside one is asked of its host.

Changes and leases have files of their own (machine_changes.py, machine_leases.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from flyd.api import machine_lists as lists
from flyd.api import machine_views as views
from flyd.api.context import ApiContext
from flyd.api.logs import forward, machine_logs
from flyd.api.machine_cache import ShownMachines
from flyd.api.machine_changes import MachineChanges
from flyd.api.machine_hosts import ask_host
from flyd.api.machine_leases import MachineLeases
from flyd.errors import FlydError, InvalidInput, Refused
from flyd.machines import commands
from flyd.machines.listening import unheard_services
from flyd.model import Machine, MachineState, MachineStatus
from flyd.store import keys
from flyd.v1 import machines_pb2 as pb

WAIT_MAX_S = 60.0
EXEC_DEFAULT_S = 60.0
TAIL_DEFAULT = 100
WATCH_COALESCE_S = 0.01  # a watcher is told of changes within this time as one


class MachinesServicer(MachineChanges, MachineLeases):
    """Machines over gRPC."""

    def __init__(self, context: ApiContext) -> None:
        super().__init__(context)
        self._shown = ShownMachines(context.alive)

    # ------------------------------------------------------------------ as they are

    async def GetMachine(self, request: pb.GetMachineRequest, context: Any) -> pb.GetMachineResponse:
        """From the mirror."""
        machine = self._context.machine(request.app_name, request.machine_id)
        return pb.GetMachineResponse(machine=self._view(machine))

    def _entries(self, app_name: str) -> list[lists.Entry]:
        """Claims and statuses as of one revision, in key order."""
        mirror = self._context.mirror
        below = f"{self._context.app(app_name).name}/" if app_name else ""
        statuses = {
            found.key.removeprefix(keys.STATUS): found
            for found in mirror.list(keys.STATUS + below, MachineStatus)
        }
        return [
            (claim, statuses.get(claim.key.removeprefix(keys.MACHINES)))
            for claim in mirror.list(keys.MACHINES + below, Machine)
        ]

    async def ListMachines(self, request: pb.ListMachinesRequest, context: Any) -> pb.ListMachinesResponse:
        """From the mirror, filtered, then cut into pages."""
        wanted = lists.Filter(
            region=request.region,
            state=lists.checked_state(request.state),
            metadata=dict(request.metadata),
        )
        entries = [
            (claim, status)
            for claim, status in self._entries(request.app_name)
            if wanted.shows(claim.value, status.value if status else None)
        ]
        shown, token = lists.page(entries, request.page_size, request.page_token)
        return pb.ListMachinesResponse(
            machines=[self._shown.show(entry) for entry in shown], next_page_token=token
        )

    async def WatchMachines(
        self, request: pb.WatchMachinesRequest, context: Any
    ) -> AsyncIterator[pb.WatchMachinesResponse]:
        """All as they are, then each change of a claim or status; woken by the mirror.

        That a machine's host was lost changes neither: HostsService tells of that.
        """
        mirror = self._context.mirror
        seen: lists.Seen = {}
        first = True
        while True:
            version = mirror.version
            entries = self._entries(request.app_name)
            changed, gone = lists.news(entries, seen)
            if changed or gone or first:
                seen, first = lists.revisions(entries), False
                yield pb.WatchMachinesResponse(
                    machines=[self._shown.show(entry) for entry in changed], destroyed_ids=gone
                )
            await mirror.wait_change(version)
            await asyncio.sleep(WATCH_COALESCE_S)

    async def WaitMachine(self, request: pb.WaitMachineRequest, context: Any) -> pb.WaitMachineResponse:
        """Wait on the mirror, without polling."""
        ctx = self._context
        state = MachineState(lists.checked_state(request.state) or "started")
        machine = ctx.machine(request.app_name, request.machine_id)
        if request.timeout < 0:
            raise InvalidInput("a wait can not be shorter than nothing")
        timeout_s = min(request.timeout or WAIT_MAX_S, WAIT_MAX_S)
        if state is MachineState.DESTROYED:
            await commands.wait_gone(ctx.mirror, machine, timeout_s)
        else:
            version = request.instance_id
            await commands.wait_state(ctx.mirror, machine, state, timeout_s, instance_id=version)
        newest = ctx.mirror.get(keys.machine(machine.app, machine.id), Machine)
        return pb.WaitMachineResponse(machine=self._view(newest.value if newest else machine))

    # ------------------------------------------------------------------ inside one

    async def ListMachineProcesses(
        self, request: pb.ListMachineProcessesRequest, context: Any
    ) -> pb.ListMachineProcessesResponse:
        """From the machine's host's kernel."""
        ctx = self._context
        machine = ctx.machine(request.app_name, request.machine_id)
        if machine.host != ctx.host.name:
            return await ask_host(ctx, machine, "ListMachineProcesses", request)
        found = await ctx.driver.processes(machine.id)
        if not found:
            raise Refused(
                f"machine {machine.id} is not running", hint=f"`fly machine start {machine.id}` starts it."
            )
        return pb.ListMachineProcessesResponse(
            processes=[views.process(p) for p in found],
            warnings=unheard_services(machine.config, machine.private_ip, found),
        )

    async def ExecMachine(
        self, request: pb.ExecMachineRequest, context: Any
    ) -> AsyncIterator[pb.ExecMachineResponse]:
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
            yield pb.ExecMachineResponse(stdout=out.stdout, stderr=out.stderr, exit_code=out.exit_code)

    async def StreamLogs(
        self, request: pb.StreamLogsRequest, context: Any
    ) -> AsyncIterator[pb.StreamLogsResponse]:
        """All machines of the app at once; each from its own host."""
        ctx = self._context
        if request.machine_id:
            machines = [ctx.machine(request.app_name, request.machine_id)]
        else:
            app = ctx.app(request.app_name)
            machines = [i.value for i in ctx.mirror.list(f"{keys.MACHINES}{app.name}/", Machine)]
        lines: asyncio.Queue[pb.StreamLogsResponse | None] = asyncio.Queue(maxsize=1000)
        async with asyncio.TaskGroup() as group:
            readers = [group.create_task(self._read_logs(m, request, lines)) for m in machines]
            group.create_task(_close_when_done(readers, lines))
            while (line := await lines.get()) is not None:
                yield line

    async def _read_logs(
        self,
        machine: Machine,
        request: pb.StreamLogsRequest,
        lines: asyncio.Queue[pb.StreamLogsResponse | None],
    ) -> None:
        """One machine's lines into the queue; a host that is away costs its lines, not the call."""
        try:
            tail = request.tail or TAIL_DEFAULT
            async for line in machine_logs(self._context, machine, tail, request.follow):
                await lines.put(line)
        except FlydError as error:
            await lines.put(
                pb.StreamLogsResponse(
                    machine_id=machine.id,
                    region=machine.region,
                    timestamp=self._context.clock.wall_s(),
                    message=f"[flyd] no logs from host {machine.host}: {error.message}",
                )
            )


async def _close_when_done(
    readers: list[asyncio.Task[None]], lines: asyncio.Queue[pb.StreamLogsResponse | None]
) -> None:
    if readers:
        await asyncio.wait(readers)
    await lines.put(None)
