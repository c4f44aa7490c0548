"""fly deploy, fly releases. The deploy runs on the servers; this command uploads, asks and watches."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import click

from flyd.cli.connection import app_name, call, channel, stream
from flyd.cli.options import app_option, json_option, split
from flyd.cli.output import ago, done, emit, note, say, state, table, waiting, warn
from flyd.deploy import appconfig
from flyd.errors import FlydError, InvalidInput
from flyd.machines.sources import pack
from flyd.v1 import releases_pb2, releases_pb2_grpc

CHUNK_BYTES = 256 * 1024
UPLOAD_TIMEOUT_S = 300.0
INTERRUPTED = 130  # as the shell has it: 128 + SIGINT


def stub() -> releases_pb2_grpc.ReleasesServiceStub:
    """The releases service of the cluster."""
    return releases_pb2_grpc.ReleasesServiceStub(channel())


def read_config(path: Path) -> str:
    """fly.toml's text, once it has been found right; its warnings are shown."""
    try:
        text = path.read_text()
    except OSError as error:
        raise InvalidInput(
            f"{path}: {error.strerror}", hint="`fly launch` writes a fly.toml for this folder."
        ) from None
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not text: {error}", hint="fly.toml is written in UTF-8.") from None
    config = appconfig.parse(text, str(path))
    for remark in config.warnings:
        warn(appconfig.remark_text(str(path), remark))
    if config.build:
        note("note: [build] is ignored by the process driver, which runs the source tree itself")
    return text


def upload(directory: Path) -> str:
    """Pack the folder and store it in the cluster; the image to deploy."""
    with tempfile.TemporaryFile() as packed:
        digest = pack(directory, packed)
        size = packed.tell()
        packed.seek(0)
        note(f"source {digest[:12]}, {size / 1024:.0f} KB")
        return call(stub().UploadSource, _chunks(digest, packed), UPLOAD_TIMEOUT_S).image_ref


def _chunks(digest: str, packed: IO[bytes]) -> Iterator[releases_pb2.UploadSourceRequest]:
    yield releases_pb2.UploadSourceRequest(digest=digest, data=packed.read(CHUNK_BYTES))
    while data := packed.read(CHUNK_BYTES):
        yield releases_pb2.UploadSourceRequest(data=data)


def watch(app: str, run_id: str, json_output: bool) -> None:
    """Show a deploy until it has ended. Ctrl-C stops the watching, not the deploy."""
    last: releases_pb2.WatchDeployResponse | None = None
    request = releases_pb2.WatchDeployRequest(app_name=app, run_id=run_id)
    try:
        with waiting("deploying") as update:
            for told in stream(stub().WatchDeploy, request):
                last = told
                for line in told.lines:
                    say(f"  {line}")
                update(told.phase)
    except KeyboardInterrupt:
        warn(f"the deploy goes on without you; watch it: fly deploy --watch {run_id} -a {app}")
        sys.exit(INTERRUPTED)
    if last is None:
        raise FlydError(f"the deploy {run_id} said nothing", hint="`fly releases` shows how it ended.")
    if last.status != "complete":
        raise FlydError(
            f"v{last.version} of {app} was not deployed: {last.error}",
            hint="What ran before runs on. `fly logs` shows what the new machines printed.",
        )
    if json_output:
        emit(last)
    else:
        done(f"v{last.version} of {app} is deployed")


@click.command(
    epilog="""\b
Examples:
  fly deploy                        the app of ./fly.toml, from this folder
  fly deploy --regions ams,iad      only there, from now on
  fly deploy --detach               begin it and leave"""
)
@app_option
@click.option("-c", "--config", "config_path", default="fly.toml", show_default=True, help="The fly.toml.")
@click.option("--regions", help="Where machines go, by commas; the first is the primary region.")
@click.option("--message", default="", help="A description for `fly releases`.")
@click.option("--detach", is_flag=True, help="Do not watch.")
@click.option("--watch", "watch_run", default="", help="Only watch this run.")
@json_option
def deploy(
    app: str | None,
    config_path: str,
    regions: str | None,
    message: str,
    detach: bool,
    watch_run: str,
    json_output: bool,
) -> None:
    """Deploy this folder: finishes on the servers, or undoes itself there."""
    if watch_run:
        watch(app_name(app), watch_run, json_output)
        return
    path = Path(config_path)
    text = read_config(path)
    name = app or appconfig.parse(text, str(path)).app or app_name(None)
    begin(name, text, path.resolve().parent, split(regions), message, detach, json_output)


def begin(
    app: str,
    config: str,
    directory: Path,
    regions: list[str],
    message: str,
    detach: bool,
    json_output: bool,
) -> None:
    """Upload the folder, begin the deploy and (unless detached) watch it."""
    image = upload(directory)
    request = releases_pb2.DeployRequest(
        app_name=app, config=config, image_ref=image, regions=regions, description=message
    )
    try:
        begun = call(stub().Deploy, request)
    except KeyboardInterrupt:
        warn(f"the deploy may have begun already; see: fly releases -a {app}")
        sys.exit(INTERRUPTED)
    if not detach:
        watch(app, begun.run_id, json_output)
    elif json_output:
        emit(begun)
    else:
        done(f"v{begun.release.version} is being deployed: fly deploy --watch {begun.run_id} -a {app}")


@click.command()
@app_option
@json_option
def releases(app: str | None, json_output: bool) -> None:
    """The releases of an app, newest first."""
    found = call(stub().ListReleases, releases_pb2.ListReleasesRequest(app_name=app_name(app))).releases
    if json_output:
        emit(found)
        return
    table(
        ["VERSION", "STATUS", "IMAGE", "DESCRIPTION", "CREATED"],
        [
            (f"v{r.version}", state(r.status), r.image_ref[:26], r.description, ago(r.created_at))
            for r in found
        ],
        empty="No releases yet: `fly deploy`.",
    )
