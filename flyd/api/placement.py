"""PlacementService: what the scheduler thinks of each host; how many machines an app has."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec

from flyd.api.apps import check_regions
from flyd.api.context import ApiContext
from flyd.deploy.appconfig import machine_config
from flyd.deploy.health import Readiness
from flyd.deploy.readiness import watch_readiness
from flyd.deploy.scale import Scale, Wish, current_group, plan_scale, scale
from flyd.errors import InvalidInput
from flyd.model import Guest, MachineConfig
from flyd.placement.placer import Placer
from flyd.placement.scheduler import Order
from flyd.placement.verdicts import Verdict
from flyd.v1 import placement_pb2 as pb
from flyd.v1 import placement_pb2_grpc

MAX_CPUS = 1024
MAX_MEMORY_MB = 16 * 1024 * 1024
MAX_WAIT_S = 3600.0


class PlacementServicer(placement_pb2_grpc.PlacementServiceServicer):
    """Placement and scaling over gRPC."""

    def __init__(self, context: ApiContext, placer: Placer) -> None:
        self._context = context
        self._placer = placer

    async def PreviewPlacement(
        self, request: pb.PreviewPlacementRequest, context: Any
    ) -> pb.PreviewPlacementResponse:
        """Of one machine, as the group has it or with another size."""
        ctx = self._context
        ctx.app(request.app_name)
        if request.region:
            check_regions(ctx, [request.region])
        config = MachineConfig(image="")
        if request.process_group:
            release, group = await current_group(ctx.kv, request.app_name, request.process_group)
            config = machine_config(release.config, group, release.image)
        config = msgspec.structs.replace(
            config,
            guest=_guest(request, config.guest),
            host_labels={**config.host_labels, **dict(request.host_labels)},
        )
        order = Order(
            app=request.app_name, config=config, region=request.region or None, machine_id="preview"
        )
        return pb.PreviewPlacementResponse(verdicts=[_verdict(v) for v in await self._placer.verdicts(order)])

    async def ScaleApp(self, request: pb.ScaleAppRequest, context: Any) -> pb.ScaleAppResponse:
        """Plan it, and unless that is all that was asked for, do it."""
        ctx = self._context
        check_regions(ctx, list(request.regions))
        wish = Wish(
            app=request.app_name,
            count=request.count,
            group=request.process_group,
            regions=tuple(dict.fromkeys(request.regions)),
        )
        before = await plan_scale(ctx.kv, wish)
        changes = await self._changes(before)
        wait_s = before.release.config.deploy.wait_timeout_s
        if request.dry_run:
            return pb.ScaleAppResponse(changes=changes, wait_timeout=wait_s)
        after = await scale(ctx.kv, self._placer, wish, list(request.destroy_ids))
        had = {m.id for change in before.changes for m in (*change.keep, *change.remove)}
        created = [m.id for change in after.changes for m in change.keep if m.id not in had]
        gone = [m.id for change in before.changes for m in reversed(change.remove)]
        return pb.ScaleAppResponse(
            changes=changes, created_ids=created, destroyed_ids=gone, wait_timeout=wait_s
        )

    async def WatchReadiness(
        self, request: pb.WatchReadinessRequest, context: Any
    ) -> AsyncIterator[pb.WatchReadinessResponse]:
        """As the mirror shows it; woken by each change."""
        ctx = self._context
        ctx.app(request.app_name)
        timeout_s = min(request.timeout, MAX_WAIT_S)
        watched = list(dict.fromkeys(request.machine_ids))
        async for seen in watch_readiness(ctx.mirror, request.app_name, watched, timeout_s, ctx.clock):
            yield pb.WatchReadinessResponse(machines=[_readiness(one) for one in seen])

    async def _changes(self, now: Scale) -> list[pb.ScaleChange]:
        """The plan, with where the new machines would go; Unplaceable if not all of them can."""
        placer = self._placer
        orders = [order for change in now.changes for order in now.orders(change)]
        hosts = iter([machine.host for machine in await placer.preview(orders)])
        changes: list[pb.ScaleChange] = []
        for change in now.changes:
            found = await placer.verdicts(now.orders(change)[0]) if change.add else ()
            changes.append(
                pb.ScaleChange(
                    process_group=change.group,
                    region=change.region,
                    have=len(change.keep) + len(change.remove),
                    want=change.want,
                    create_hosts=[next(hosts) for _ in range(change.add)],
                    destroy_ids=[machine.id for machine in reversed(change.remove)],
                    verdicts=[_verdict(verdict) for verdict in found],
                )
            )
        return changes


def _guest(request: pb.PreviewPlacementRequest, usual: Guest) -> Guest:
    if not (0 <= request.cpus <= MAX_CPUS and 0 <= request.memory_mb <= MAX_MEMORY_MB):
        raise InvalidInput(f"no machine has {request.cpus} CPUs and {request.memory_mb} MB of memory")
    if request.cpu_kind not in ("", "shared", "performance"):
        raise InvalidInput(f"no kind of CPU is called {request.cpu_kind!r}", hint="shared or performance")
    return Guest(
        cpus=request.cpus or usual.cpus,
        memory_mb=request.memory_mb or usual.memory_mb,
        cpu_kind=request.cpu_kind or usual.cpu_kind,
    )


def _readiness(value: Readiness) -> pb.MachineReadiness:
    return pb.MachineReadiness(
        machine_id=value.machine_id,
        region=value.region,
        host=value.host,
        verdict=value.verdict.value,
        detail=value.said,
    )


def _verdict(value: Verdict) -> pb.HostVerdict:
    return pb.HostVerdict(
        host=value.host,
        region=value.region,
        accepted=value.rank > 0,
        rank=value.rank,
        reason=value.reason,
    )
