"""HostsService: what is known of the cluster's hosts, and taking them out of use."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from flyd.api import views
from flyd.api.context import ApiContext
from flyd.errors import NotFound
from flyd.model import Host, Machine, Reservations
from flyd.model.cluster import Drain, DrainLine, DrainState, Loss, LossRule
from flyd.placement import upkeep
from flyd.store import keys
from flyd.v1 import hosts_pb2, hosts_pb2_grpc


class HostsServicer(hosts_pb2_grpc.HostsServiceServicer):
    """Hosts over gRPC."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def ListHosts(
        self, request: hosts_pb2.ListHostsRequest, context: Any
    ) -> hosts_pb2.ListHostsResponse:
        """From the mirror; a host without its lease is lost."""
        hosts = self._context.mirror.list(keys.HOSTS, Host)
        return hosts_pb2.ListHostsResponse(hosts=[self._seen(item.value) for item in hosts])

    def _seen(self, host: Host) -> hosts_pb2.Host:
        mirror = self._context.mirror
        reserved = mirror.get(keys.reservations(host.name), Reservations)
        promised = reserved.value if reserved else Reservations(host=host.name)
        alive = self._context.alive(host.name)
        seen = views.host(host, promised, alive)
        seen.cordoned = host.cordoned
        seen.labels.update(host.labels)
        drain = mirror.get(keys.drain(host.name), Drain)
        if drain is not None:
            seen.drain_state = drain.value.state
        loss = mirror.get(keys.loss(host.name), Loss)
        if loss is not None and not alive:
            now_s, lost = self._context.clock.wall_s(), loss.value
            seen.loss.silent_for = max(0.0, now_s - lost.since_s)
            seen.loss.moves_in = max(0.0, lost.moves_at_s - now_s)
            seen.loss.held = lost.held
            seen.loss.left.update(lost.left)
        return seen

    async def CordonHost(
        self, request: hosts_pb2.CordonHostRequest, context: Any
    ) -> hosts_pb2.CordonHostResponse:
        """Keep new machines off."""
        await upkeep.cordon(self._context.kv, request.name)
        return hosts_pb2.CordonHostResponse()

    async def UncordonHost(
        self, request: hosts_pb2.UncordonHostRequest, context: Any
    ) -> hosts_pb2.UncordonHostResponse:
        """Let it take machines again."""
        await upkeep.uncordon(self._context.kv, request.name)
        return hosts_pb2.UncordonHostResponse()

    async def DrainHost(
        self, request: hosts_pb2.DrainHostRequest, context: Any
    ) -> hosts_pb2.DrainHostResponse:
        """Begin to move everything off; the elected repairer does it."""
        ctx = self._context
        drain = await upkeep.drain(
            ctx.kv, request.name, force=request.force, clock=ctx.clock, entropy=ctx.entropy
        )
        return hosts_pb2.DrainHostResponse(drain=self._drain(drain))

    async def WatchDrain(
        self, request: hosts_pb2.WatchDrainRequest, context: Any
    ) -> AsyncIterator[hosts_pb2.WatchDrainResponse]:
        """What the drain has said so far, then what it says, until nothing is left to move."""
        ctx = self._context
        key = keys.drain(request.name)
        record = await ctx.kv.get(key)
        if record is None:
            raise NotFound(
                f"host {request.name!r} is not being drained",
                hint=f"`fly hosts drain {request.name}` begins.",
            )
        while ctx.mirror.revision < record.mod_revision:  # else an earlier drain's end would be told
            await ctx.mirror.wait_change(ctx.mirror.version)
        told: Drain | None = None
        last: DrainLine | None = None
        while True:
            version = ctx.mirror.version
            found = ctx.mirror.get(key, Drain)
            if found is not None and found.value != told:
                told = found.value
                lines = told.lines[told.lines.index(last) + 1 :] if last in told.lines else told.lines
                last = told.lines[-1] if told.lines else None
                yield hosts_pb2.WatchDrainResponse(
                    drain=self._drain(told), lines=[line.text for line in lines]
                )
            if told is not None and (found is None or told.state is not DrainState.DRAINING):
                return
            await ctx.mirror.wait_change(version)

    def _drain(self, drain: Drain) -> hosts_pb2.Drain:
        machines = self._context.mirror.list(keys.MACHINES, Machine)
        return hosts_pb2.Drain(
            id=drain.id,
            host=drain.host,
            state=drain.state,
            force=drain.force,
            begun_at=drain.begun_at_s,
            doing=drain.doing,
            left=drain.left,
            machine_count=sum(1 for item in machines if item.value.host == drain.host),
        )

    async def RemoveHost(
        self, request: hosts_pb2.RemoveHostRequest, context: Any
    ) -> hosts_pb2.RemoveHostResponse:
        """Delete its records, if nothing is left on it."""
        await upkeep.remove(self._context.kv, request.name)
        return hosts_pb2.RemoveHostResponse()

    async def GetLossRule(
        self, request: hosts_pb2.GetLossRuleRequest, context: Any
    ) -> hosts_pb2.GetLossRuleResponse:
        """As set, or the default."""
        found = self._context.mirror.get(keys.HOST_LOSS, LossRule)
        rule = found.value if found is not None else LossRule()
        return hosts_pb2.GetLossRuleResponse(grace=rule.grace_s)

    async def SetLossRule(
        self, request: hosts_pb2.SetLossRuleRequest, context: Any
    ) -> hosts_pb2.SetLossRuleResponse:
        """Set the grace period."""
        rule = await upkeep.set_grace(self._context.kv, request.grace)
        return hosts_pb2.SetLossRuleResponse(grace=rule.grace_s)

    async def GetVersion(
        self, request: hosts_pb2.GetVersionRequest, context: Any
    ) -> hosts_pb2.GetVersionResponse:
        """Of this flyd."""
        host = self._context.host
        return hosts_pb2.GetVersionResponse(version=host.version, host=host.name, region=host.region)
