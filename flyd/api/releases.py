"""ReleasesService: source trees in and out, deploys begun and watched.

A deploy is a run in etcd; the elected deployer walks it. Watching is reading the mirror,
so a watcher may come and go, and may ask any flyd.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from flyd.api.apps import check_regions
from flyd.api.context import ApiContext
from flyd.deploy import appconfig
from flyd.deploy.ports import tcp_ports
from flyd.deploy.releases import DeployRun, Release, RunLine, RunState
from flyd.deploy.requests import start_deploy
from flyd.errors import Conflict, InvalidInput, NotFound
from flyd.store import keys
from flyd.v1 import releases_pb2, releases_pb2_grpc

DIGEST_HEX = 64


class ReleasesServicer(releases_pb2_grpc.ReleasesServiceServicer):
    """Releases over gRPC."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def UploadSource(
        self, request_iterator: AsyncIterator[releases_pb2.UploadSourceRequest], context: Any
    ) -> releases_pb2.UploadSourceResponse:
        """Store the tree on this host, then have the others fetch it: this host may be the next to die."""
        first = await anext(aiter(request_iterator), None)
        if first is None or len(first.digest) != DIGEST_HEX:
            raise InvalidInput("an upload begins with the sha256 of the whole, in hex")

        async def chunks() -> AsyncIterator[bytes]:
            yield first.data
            async for part in request_iterator:
                yield part.data

        await self._context.sources.receive(first.digest, chunks())
        await self._context.peers.spread_source(first.digest)
        return releases_pb2.UploadSourceResponse(image_ref=f"source:sha256:{first.digest}")

    async def DownloadSource(
        self, request: releases_pb2.DownloadSourceRequest, context: Any
    ) -> AsyncIterator[releases_pb2.DownloadSourceResponse]:
        """Only what is on this host: a flyd never asks others on behalf of others."""
        async for data in self._context.sources.open(request.digest):
            yield releases_pb2.DownloadSourceResponse(data=data)

    async def EnsureSource(
        self, request: releases_pb2.EnsureSourceRequest, context: Any
    ) -> releases_pb2.EnsureSourceResponse:
        """Fetch and unpack it, as a machine that needs it would."""
        await self._context.sources.ensure(request.digest)
        return releases_pb2.EnsureSourceResponse()

    async def Deploy(self, request: releases_pb2.DeployRequest, context: Any) -> releases_pb2.DeployResponse:
        """Read fly.toml, check it against the cluster, begin the run."""
        ctx = self._context
        app = ctx.app(request.app_name)
        config = appconfig.parse(request.config, "fly.toml")
        asked = list(request.regions)
        check_regions(ctx, asked or list(app.regions or config.regions))
        _check_http_port(ctx, config)
        run = await start_deploy(
            ctx.kv,
            app.name,
            request.image_ref,
            config,
            clock=ctx.clock,
            entropy=ctx.entropy,
            regions=asked,
            description=request.description,
            requested_by=ctx.host.name,
        )
        release = releases_pb2.Release(
            app_name=app.name,
            version=run.version,
            image_ref=request.image_ref,
            status="running",
            created_at=run.created_at_s,
            run_id=run.id,
        )
        warnings = [appconfig.remark_text("fly.toml", remark) for remark in config.warnings]
        return releases_pb2.DeployResponse(release=release, run_id=run.id, warnings=warnings)

    def _run(self, app: str, run_id: str) -> DeployRun | None:
        if run_id:
            found = self._context.mirror.get(keys.run(app, run_id), DeployRun)
            return found.value if found else None
        runs = self._context.mirror.list(f"{keys.RUNS}{app}/", DeployRun)
        return runs[-1].value if runs else None

    async def WatchDeploy(
        self, request: releases_pb2.WatchDeployRequest, context: Any
    ) -> AsyncIterator[releases_pb2.WatchDeployResponse]:
        """What the run has said so far, then what it says, until it has ended."""
        ctx = self._context
        app = ctx.app(request.app_name)
        if not request.run_id and self._run(app.name, "") is None:
            raise NotFound(f"app {app.name!r} was never deployed", hint="`fly deploy` does.")
        if request.run_id and await ctx.kv.get(keys.run(app.name, request.run_id)) is None:
            raise NotFound(
                f"app {app.name!r} has no deploy {request.run_id!r}",
                hint=f"fly releases -a {app.name} shows how its deploys ended; old ones are forgotten.",
            )
        run_id, last, told = request.run_id, None, None
        while True:
            version = ctx.mirror.version
            run = self._run(app.name, run_id)
            if run is not None and run != told:
                run_id = run.id
                new = _after(run.lines, last)
                last = run.lines[-1] if run.lines else None
                told = run
                yield releases_pb2.WatchDeployResponse(
                    run_id=run.id,
                    version=run.version,
                    status=run.state,
                    phase=run.doing or run.phase,
                    lines=[line.text for line in new],
                    error=run.error,
                    reasons=run.reasons,
                )
                if run.state is not RunState.RUNNING:
                    return
            await ctx.mirror.wait_change(version)

    async def ListReleases(
        self, request: releases_pb2.ListReleasesRequest, context: Any
    ) -> releases_pb2.ListReleasesResponse:
        """Newest first."""
        app = self._context.app(request.app_name)
        releases = [i.value for i in self._context.mirror.list(f"{keys.RELEASES}{app.name}/", Release)]
        return releases_pb2.ListReleasesResponse(
            releases=[
                releases_pb2.Release(
                    app_name=r.app,
                    version=r.version,
                    image_ref=r.image,
                    status=r.status,
                    description=r.description,
                    created_at=r.created_at_s,
                    run_id=r.run_id,
                )
                for r in reversed(releases)
            ]
        )


def _after(lines: tuple[RunLine, ...], last: RunLine | None) -> tuple[RunLine, ...]:
    """The lines behind the last one told; all of them if that one has been dropped."""
    if last is None or last not in lines:
        return lines
    return lines[lines.index(last) + 1 :]


def _check_http_port(context: ApiContext, config: appconfig.AppConfig) -> None:
    """Refuse the port on which the edge itself listens."""
    if context.host.http_port in tcp_ports(config):
        raise Conflict(
            f"port {context.host.http_port} on the edge is taken by the edge itself (HTTP)",
            hint='Choose another in [[services.ports]], or handlers = ["http"]: HTTP is shared by name.',
        )
