"""AppsService: translate, check the name, write one key; destroying is handed to the machines' hosts."""

from __future__ import annotations

import re
from typing import Any

from flyd.api import views
from flyd.api.context import ApiContext
from flyd.errors import Conflict, InvalidInput, OutcomeUnknown, Refused
from flyd.machines import commands
from flyd.model import App, Desired, Host, Machine, MachineStatus, Volume, decode, encode
from flyd.ports import Delete, Put, Unchanged
from flyd.storage import records
from flyd.store import keys
from flyd.v1 import apps_pb2, apps_pb2_grpc

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")  # a DNS label, as in <app>.internal
DELETE_TIMEOUT_S = 60.0


def check_name(name: str, what: str = "an app's name") -> None:
    """Refuse a name that could not be part of a host name."""
    if not NAME.fullmatch(name):
        raise InvalidInput(
            f"{name!r} can not be {what}",
            hint="Use 1-63 lower-case letters, digits and dashes, not beginning or ending with a dash.",
        )


def check_regions(context: ApiContext, regions: list[str]) -> None:
    """Refuse a region in which no host ever joined, and list those that there are."""
    known = sorted({item.value.region for item in context.mirror.list(keys.HOSTS, Host)})
    for region in regions:
        if region not in known:
            raise InvalidInput(
                f"no host is in region {region!r}", hint=f"Regions with hosts: {', '.join(known) or 'none'}."
            )


class AppsServicer(apps_pb2_grpc.AppsServiceServicer):
    """Applications over gRPC."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    def _view(self, app: App) -> apps_pb2.App:
        prefix = f"{keys.STATUS}{app.name}/"
        statuses = [item.value for item in self._context.mirror.list(prefix, MachineStatus)]
        return views.app(app, statuses)

    async def CreateApp(self, request: apps_pb2.CreateAppRequest, context: Any) -> apps_pb2.CreateAppResponse:
        """Create by compare on absence, so that a name is given once."""
        check_name(request.app_name)
        check_regions(self._context, list(request.regions))
        if request.network:
            check_name(request.network, "a network's name")
        app = App(
            name=request.app_name,
            network=request.network,
            regions=tuple(request.regions),
            created_at_s=self._context.clock.wall_s(),
        )
        key = keys.app(app.name)
        try:
            created = (await self._context.kv.txn([Unchanged(key, 0)], [Put(key, encode(app))])).succeeded
        except OutcomeUnknown as error:
            raise OutcomeUnknown(
                f"whether app {app.name!r} was created is not known: {error.message}",
                hint="Once etcd answers, `fly apps list` shows; creating it again is safe.",
            ) from error
        if not created:
            raise Conflict(
                f"an app is already called {app.name!r}",
                hint="Choose another name, or `fly apps list` to see what it is.",
            )
        return apps_pb2.CreateAppResponse(app=self._view(app))

    async def GetApp(self, request: apps_pb2.GetAppRequest, context: Any) -> apps_pb2.GetAppResponse:
        """From the mirror."""
        return apps_pb2.GetAppResponse(app=self._view(self._context.app(request.app_name)))

    async def ListApps(self, request: apps_pb2.ListAppsRequest, context: Any) -> apps_pb2.ListAppsResponse:
        """From the mirror."""
        apps = self._context.mirror.list(keys.APPS, App)
        return apps_pb2.ListAppsResponse(apps=[self._view(item.value) for item in apps])

    async def DeleteApp(self, request: apps_pb2.DeleteAppRequest, context: Any) -> apps_pb2.DeleteAppResponse:
        """Destroy the machines, wait until their hosts freed them, then volumes, then the keys."""
        ctx = self._context
        app = ctx.app(request.app_name)
        volumes = [i.value for i in ctx.mirror.list(f"{keys.VOLUMES}{app.name}/", Volume)]
        if volumes and not request.with_volumes:
            raise Refused(
                f"app {app.name!r} has {len(volumes)} volume(s): deleting it would delete their data",
                hint="Say so with --with-volumes, or `fly volumes list` to see them.",
            )
        machines = [i.value for i in ctx.mirror.list(f"{keys.MACHINES}{app.name}/", Machine)]
        self._refuse_lost_hosts(app, machines)
        await self._end(app, machines, volumes)
        effects = [Delete(keys.app(app.name)), Delete(keys.secrets(app.name))]
        for prefix in (f"{keys.RELEASES}{app.name}/", f"{keys.RUNS}{app.name}/", f"{keys.PG}{app.name}/"):
            effects += [Delete(item.key) for item in (await ctx.kv.list(prefix)).items]
        for port in (await ctx.kv.list(keys.PORTS)).items:
            if decode(port.value, str) == app.name:
                effects.append(Delete(port.key))
        for start in range(0, len(effects), 100):  # etcd takes at most 128 operations in a txn
            await ctx.kv.txn([], effects[start : start + 100])
        # What was placed while we waited. Nothing can be from here on: placing compares the app's record.
        late = (await ctx.kv.list(f"{keys.MACHINES}{app.name}/")).items
        listed = await ctx.kv.list(f"{keys.VOLUMES}{app.name}/")
        await ctx.mirror.wait_revision(listed.revision)  # `_end` waits by what the mirror shows
        await self._end(
            app, [decode(i.value, Machine) for i in late], [decode(i.value, Volume) for i in listed.items]
        )
        return apps_pb2.DeleteAppResponse()

    async def _end(self, app: App, machines: list[Machine], volumes: list[Volume]) -> None:
        """Destroy machines, wait until their hosts freed them, then give up the volumes."""
        ctx = self._context
        for machine in machines:
            await commands.set_desired(ctx.kv, app.name, machine.id, Desired.DESTROYED)
        for machine in machines:
            await commands.wait_gone(ctx.mirror, machine, DELETE_TIMEOUT_S)
        for volume in volumes:
            await records.destroy(ctx.kv, app.name, volume.id, ctx.clock.wall_s(), entropy=ctx.entropy)

    def _refuse_lost_hosts(self, app: App, machines: list[Machine]) -> None:
        """A lost host can not say that it stopped its machines: nothing may be freed behind its back."""
        lost = [m for m in machines if not self._context.alive(m.host)]
        if lost:
            where = ", ".join(f"{m.id} on {m.host} ({m.region})" for m in lost)
            raise Refused(
                f"app {app.name!r} can not be destroyed while hosts of its machines are lost: {where}",
                hint="Bring the host back first: only it can stop what it runs. Nothing was changed.",
            )

    async def SetSecrets(
        self, request: apps_pb2.SetSecretsRequest, context: Any
    ) -> apps_pb2.SetSecretsResponse:
        """Merge into what is set, by compare-and-set."""
        self._context.app(request.app_name)
        names = await commands.set_secrets(self._context.kv, request.app_name, dict(request.values))
        return apps_pb2.SetSecretsResponse(names=names)
