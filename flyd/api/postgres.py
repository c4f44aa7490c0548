"""PostgresService: clusters are made by flyd/postgres, decided by pgha, and shown here."""

from __future__ import annotations

import asyncio
from typing import Any

from flyd.api import postgres_backups, postgres_members, views
from flyd.api.apps import check_name, check_regions
from flyd.api.context import ApiContext
from flyd.errors import InvalidInput, Refused, Unavailable
from flyd.machines import commands
from flyd.model import App, AppKind, Machine, PostgresLeader, PostgresMember, Secrets, decode
from flyd.postgres import clusters, databases
from flyd.store import keys
from flyd.v1 import postgres_pb2, postgres_pb2_grpc
from pgha.backup_requests import storage
from pgha.requests import paused, request_pause, request_resume, request_switchover

DEFAULT_MEMORY_MB = 256
DEFAULT_VOLUME_GB = 1
SERVING_TIMEOUT_S = 60.0
FAILOVER_TIMEOUT_S = 30.0
RESTORE_TIMEOUT_S = 3600.0


class PostgresServicer(postgres_pb2_grpc.PostgresServiceServicer):
    """Postgres clusters over gRPC."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    def _cluster(self, name: str) -> App:
        app = self._context.app(name)
        if app.kind is not AppKind.POSTGRES:
            raise InvalidInput(f"app {name!r} is not a Postgres cluster", hint="`fly apps list` shows kinds.")
        return app

    def _leader(self, name: str) -> PostgresLeader | None:
        found = self._context.mirror.get(keys.postgres_leader(name), PostgresLeader)
        return found.value if found else None

    async def _wait_serving(self, name: str, after_epoch: int, timeout_s: float) -> PostgresLeader:
        """Wait until a primary newer than `after_epoch` takes connections."""
        mirror = self._context.mirror
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    version = mirror.version
                    leader = self._leader(name)
                    if leader and leader.serving and leader.epoch > after_epoch:
                        return leader
                    await mirror.wait_change(version)
        except TimeoutError:
            raise Unavailable(
                f"Postgres cluster {name!r} has no serving primary after {timeout_s:.0f} s",
                hint=f"`fly postgres status -a {name}` and `fly logs -a {name}` show why.",
            ) from None

    async def CreateCluster(
        self, request: postgres_pb2.CreateClusterRequest, context: Any
    ) -> postgres_pb2.CreateClusterResponse:
        """Place the members; they elect the primary by themselves."""
        ctx = self._context
        check_name(request.cluster_name)
        check_regions(ctx, list(request.regions))
        if request.network:
            check_name(request.network, "a network's name")
        app = await clusters.create(
            ctx.kv,
            ctx.placer,
            request.cluster_name,
            list(request.regions),
            memory_mb=request.memory_mb or DEFAULT_MEMORY_MB,
            volume_size_gb=request.volume_size_gb or DEFAULT_VOLUME_GB,
            network=request.network,
            archive=clusters.archive_options(request.archive_dir, request.cluster_name),
            clock=ctx.clock,
            entropy=ctx.entropy,
        )
        await self._wait_serving(app.name, 0, SERVING_TIMEOUT_S)
        return postgres_pb2.CreateClusterResponse(cluster_name=app.name, endpoint_port=app.endpoint_port)

    async def GetCluster(
        self, request: postgres_pb2.GetClusterRequest, context: Any
    ) -> postgres_pb2.GetClusterResponse:
        """Leader and members as they last said."""
        ctx = self._context
        app = self._cluster(request.cluster_name)
        leader = self._leader(app.name)
        machines = [i.value for i in ctx.mirror.list(f"{keys.MACHINES}{app.name}/", Machine)]
        hosts = {machine.id: machine.host for machine in machines}
        members = [i.value for i in ctx.mirror.list(keys.postgres_members(app.name), PostgresMember)]
        disks = {s.node: s for s in await storage(ctx.kv, app.name)}
        pause = await paused(ctx.kv, app.name)
        return postgres_pb2.GetClusterResponse(
            cluster_name=app.name,
            primary=leader.node if leader else "",
            epoch=leader.epoch if leader else 0,
            serving=bool(leader and leader.serving),
            endpoint_port=app.endpoint_port,
            paused=pause is not None,
            pause_reason=pause.reason if pause else "",
            paused_at=pause.since_s if pause else 0.0,
            members=[
                views.postgres_member(m, ctx.alive(hosts.get(m.machine_id, "")), disks.get(m.node))
                for m in members
            ],
        )

    async def _superuser_password(self, cluster: str) -> str:
        found = await self._context.kv.get(keys.secrets(cluster))
        return decode(found.value, Secrets).values[clusters.SUPERUSER_SECRET] if found else ""

    async def AttachApp(
        self, request: postgres_pb2.AttachAppRequest, context: Any
    ) -> postgres_pb2.AttachAppResponse:
        """Database and user on the primary, then the secret."""
        ctx = self._context
        cluster = self._cluster(request.cluster_name)
        app = ctx.app(request.app_name)
        if app.network != cluster.network:
            raise Refused(
                f"app {app.name!r} is on network {app.network or 'default'!r}, "
                f"Postgres {cluster.name!r} on {cluster.network or 'default'!r}: it could not reach it",
                hint="`fly postgres create --network NAME` makes one on the app's network.",
            )
        leader = await self._wait_serving(cluster.name, 0, SERVING_TIMEOUT_S)
        password = ctx.entropy.token(16)
        await databases.ensure_database(
            leader.address,
            await self._superuser_password(cluster.name),
            app.name,
            password,
            cluster.name,
        )
        url = databases.database_url(cluster.name, app.name, password)
        await commands.set_secrets(ctx.kv, app.name, {"DATABASE_URL": url})
        name = databases.database_name(app.name)
        return postgres_pb2.AttachAppResponse(database=name, user=name)

    async def Failover(
        self, request: postgres_pb2.FailoverRequest, context: Any
    ) -> postgres_pb2.FailoverResponse:
        """Ask the primary to hand over, and wait for the next one."""
        cluster = self._cluster(request.cluster_name)
        before = await self._wait_serving(cluster.name, 0, FAILOVER_TIMEOUT_S)
        await request_switchover(self._context.kv, cluster.name, request.target, self._context.clock.wall_s())
        leader = await self._wait_serving(cluster.name, before.epoch, FAILOVER_TIMEOUT_S)
        return postgres_pb2.FailoverResponse(primary=leader.node, epoch=leader.epoch)

    async def PauseCluster(
        self, request: postgres_pb2.PauseClusterRequest, context: Any
    ) -> postgres_pb2.PauseClusterResponse:
        """Nothing happens by itself any more."""
        cluster, clock = self._cluster(request.cluster_name), self._context.clock
        pause = await request_pause(self._context.kv, cluster.name, request.reason, clock.wall_s())
        return postgres_pb2.PauseClusterResponse(paused_at=pause.since_s, reason=pause.reason)

    async def ResumeCluster(
        self, request: postgres_pb2.ResumeClusterRequest, context: Any
    ) -> postgres_pb2.ResumeClusterResponse:
        """It does again."""
        await request_resume(self._context.kv, self._cluster(request.cluster_name).name)
        return postgres_pb2.ResumeClusterResponse()

    async def ListMembers(
        self, request: postgres_pb2.ListMembersRequest, context: Any
    ) -> postgres_pb2.ListMembersResponse:
        """Whose word counts, and how far a change is."""
        return await postgres_members.list_members(self._context, self._cluster(request.cluster_name))

    async def AddMember(
        self, request: postgres_pb2.AddMemberRequest, context: Any
    ) -> postgres_pb2.AddMemberResponse:
        """One more, in a region."""
        cluster = self._cluster(request.cluster_name)
        member = await postgres_members.add(self._context, cluster, request.region)
        return postgres_pb2.AddMemberResponse(member=member)

    async def RemoveMember(
        self, request: postgres_pb2.RemoveMemberRequest, context: Any
    ) -> postgres_pb2.RemoveMemberResponse:
        """One less."""
        cluster = self._cluster(request.cluster_name)
        return await postgres_members.remove(self._context, cluster, request.node)

    async def CreateBackup(
        self, request: postgres_pb2.CreateBackupRequest, context: Any
    ) -> postgres_pb2.CreateBackupResponse:
        """Into the cluster's archive, by its primary."""
        cluster = self._cluster(request.cluster_name)
        return postgres_pb2.CreateBackupResponse(
            backup=await postgres_backups.create_backup(self._context, cluster.name)
        )

    async def ListBackups(
        self, request: postgres_pb2.ListBackupsRequest, context: Any
    ) -> postgres_pb2.ListBackupsResponse:
        """Taken, tried, and under way."""
        cluster = self._cluster(request.cluster_name)
        return postgres_pb2.ListBackupsResponse(
            backups=await postgres_backups.list_backups(self._context, cluster.name),
            schedule=await postgres_backups.schedule(self._context, cluster.name),
        )

    async def SetBackupSchedule(
        self, request: postgres_pb2.SetBackupScheduleRequest, context: Any
    ) -> postgres_pb2.SetBackupScheduleResponse:
        """The primary keeps it."""
        self._cluster(request.cluster_name)
        await postgres_backups.set_schedule(self._context, request)
        return postgres_pb2.SetBackupScheduleResponse()

    async def VerifyBackup(
        self, request: postgres_pb2.VerifyBackupRequest, context: Any
    ) -> postgres_pb2.VerifyBackupResponse:
        """By a replica, on its own volume."""
        cluster = self._cluster(request.cluster_name)
        tried = await postgres_backups.verify(self._context, cluster.name, request.backup_name)
        return postgres_pb2.VerifyBackupResponse(backup=tried)

    async def RestoreCluster(
        self, request: postgres_pb2.RestoreClusterRequest, context: Any
    ) -> postgres_pb2.RestoreClusterResponse:
        """A new cluster from the archive of this one."""
        source = self._cluster(request.cluster_name)
        app = await postgres_backups.restore(self._context, source, request)
        await self._wait_serving(app.name, 0, RESTORE_TIMEOUT_S)
        return postgres_pb2.RestoreClusterResponse(cluster_name=app.name, endpoint_port=app.endpoint_port)

    async def GetConnection(
        self, request: postgres_pb2.GetConnectionRequest, context: Any
    ) -> postgres_pb2.GetConnectionResponse:
        """A superuser's connection through this host's endpoint."""
        cluster = self._cluster(request.cluster_name)
        password = await self._superuser_password(cluster.name)
        address = f"{self._context.host.address}:{cluster.endpoint_port}"
        return postgres_pb2.GetConnectionResponse(uri=f"postgres://postgres:{password}@{address}/postgres")
