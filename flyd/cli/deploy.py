"""fly deploy, fly releases. The deploy runs on the servers; this command uploads, asks and watches."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import click

from flyd.cli import hosts as hosts_verbs
from flyd.cli import images
from flyd.cli.connection import app_name, call, channel, stream
from flyd.cli.options import app_option, json_option, split
from flyd.cli.output import ago, done, emit, note, plain, say, state, table, waiting, warn
from flyd.deploy import appconfig
from flyd.drivers.process.sources import pack
from flyd.errors import FlydError, InvalidInput, Unavailable, Unplaceable
from flyd.v1 import hosts_pb2, images_pb2, releases_pb2, releases_pb2_grpc

CHUNK_BYTES = 256 * 1024
UPLOAD_TIMEOUT_S = 300.0
WATCH_RETRY_S = 15.0  # without a word from any flyd
WATCH_PAUSE_S = 0.5
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


def prepare(
    app: str, config: str, directory: Path, regions: list[str]
) -> tuple[str, list[images_pb2.ImageMove]]:
    """What the cluster's hosts run, made and brought there: a container image or the source tree itself."""
    hosts = call(hosts_verbs.stub().ListHosts, hosts_pb2.ListHostsRequest()).hosts
    build = appconfig.parse(config, "fly.toml").build
    if images.runs_containers(hosts):
        return images.bring_image(app, config, build, directory, regions)
    if build:
        note("note: [build] is ignored by the process driver, which runs the source tree itself")
    return upload(directory), []


def watch(app: str, run_id: str, json_output: bool, moves: Sequence[images_pb2.ImageMove] = ()) -> None:
    """Show a deploy until it has ended. Ctrl-C stops the watching, not the deploy."""
    try:
        with waiting("deploying") as update:
            ended = _follow(app, run_id, update)
    except KeyboardInterrupt:
        warn(f"the deploy goes on without you; watch it: fly deploy --watch {run_id} -a {app}")
        sys.exit(INTERRUPTED)
    if ended.status != "complete":
        raise _failure(app, ended)
    if json_output:
        emit({**plain(ended), "image_moves": images.figures(moves)})
    else:
        done(f"v{ended.version} of {app} is deployed")


def _failure(app: str, ended: releases_pb2.WatchDeployResponse) -> FlydError:
    """Why the deploy failed, as the error that it is."""
    message = f"v{ended.version} of {app} was not deployed: {ended.error}"
    if ended.reasons:
        hint = "What ran before runs on. `fly hosts list` shows what each host has."
        return Unplaceable(message, ended.reasons, hint=hint)
    return FlydError(message, hint="What ran before runs on. `fly logs` shows what the new machines printed.")


def _follow(app: str, run_id: str, update: Callable[[str], None]) -> releases_pb2.WatchDeployResponse:
    """Say each line of the run once, until it has ended; any flyd can tell, so one may go away."""
    request = releases_pb2.WatchDeployRequest(app_name=app, run_id=run_id)
    said = 0
    heard_at = time.monotonic()
    while True:
        lines = 0  # of this stream, which begins with those of the streams before it
        try:
            for told in stream(stub().WatchDeploy, request):
                heard_at = time.monotonic()
                for line in told.lines:
                    lines += 1
                    if lines > said:
                        say(f"  {line}")
                said = max(said, lines)
                update(told.phase)
                if told.status != "running":
                    return told
        except Unavailable as error:
            if time.monotonic() - heard_at > WATCH_RETRY_S:
                hint = f"The deploy goes on. Watch it: fly deploy --watch {run_id} -a {app}"
                raise Unavailable(error.message, hint=hint) from None
        update("looking for a flyd that answers")
        time.sleep(WATCH_PAUSE_S)


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
    """Bring what is to run to the cluster, begin the deploy and (unless detached) watch it."""
    image, moves = prepare(app, config, directory, regions)
    request = releases_pb2.DeployRequest(
        app_name=app, config=config, image_ref=image, regions=regions, description=message
    )
    try:
        begun = call(stub().Deploy, request)
    except KeyboardInterrupt:
        warn(f"the deploy may have begun already; see: fly releases -a {app}")
        sys.exit(INTERRUPTED)
    if not detach:
        watch(app, begun.run_id, json_output, moves)
    elif json_output:
        emit({**plain(begun), "image_moves": images.figures(moves)})
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
