"""The build step of `fly deploy` where hosts run containers: make or find the image, and bring it there.

Only what the first host lacks is sent to it, and goes on where it was if the line is cut; the other
hosts of the deploy's regions then fetch it from there, all at once, before any machine is touched.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from flyd.cli.connection import call, channel, stream
from flyd.cli.output import done, err, note, waiting, warn
from flyd.errors import Conflict, FlydError, Refused, Unavailable
from flyd.images.archive import Archive, open_archive
from flyd.images.local import LocalImage, save, take
from flyd.model import BlobNeed
from flyd.model.image import IMAGE_PREFIX
from flyd.v1 import hosts_pb2, images_pb2, images_pb2_grpc

DRIVER = "docker"
PLAN_TIMEOUT_S = 60.0
SEND_TIMEOUT_S = 600.0  # a line that has died unnoticed; a slow one goes on where it was
ATTEMPTS = 5  # in which not one byte got through
PAUSE_S = 1.0
STEP = re.compile(r"Step \d|#\d+ \[")  # the classic builder's, BuildKit's


def stub() -> images_pb2_grpc.ImagesServiceStub:
    """The images service of the cluster."""
    return images_pb2_grpc.ImagesServiceStub(channel())


def runs_containers(hosts: Sequence[hosts_pb2.Host]) -> bool:
    """Whether this cluster's living hosts want container images, not source trees."""
    drivers = sorted({host.driver for host in hosts if host.state == "up"})
    if len(drivers) > 1:
        raise Refused(
            f"the hosts run different drivers ({', '.join(drivers)}): no one release suits all of them",
            hint="`fly hosts list` shows them; give every host the same driver in /etc/flyd.toml.",
        )
    return drivers == [DRIVER]


def bring_image(
    app: str, config: str, build: Mapping[str, Any], directory: Path, regions: Sequence[str]
) -> tuple[str, list[images_pb2.ImageMove]]:
    """Build or find the image and have it on the deploy's hosts: its reference, and what that took."""
    with tempfile.TemporaryDirectory(prefix="fly-image-") as tmp:
        with waiting("building the image") as update:

            def show(line: str) -> None:
                update(line)
                if STEP.match(line):
                    note(f"  {line}")

            image = take(directory, app, build, Path(tmp), show)
        first = send(image, Path(tmp))
    moves = [first]
    _tell(first)
    request = images_pb2.SpreadImageRequest(
        app_name=app, image_id=image.image_id, config=config, regions=regions
    )
    with waiting("bringing the image to the other hosts"):
        for response in stream(stub().SpreadImage, request):
            if response.move.host != first.host:
                moves.append(response.move)
                _tell(response.move)
    return IMAGE_PREFIX + image.image_id, moves


def send(image: LocalImage, tmp: Path) -> images_pb2.ImageMove:
    """Bring the image to the flyd that answers; tries again while anything gets through."""
    sent = _Sent()
    idle = 0
    while True:
        before = sent.size_bytes
        try:
            move = _send_once(image, tmp, sent)
        except (Unavailable, Conflict) as error:
            idle = 0 if sent.size_bytes > before else idle + 1
            if idle >= ATTEMPTS:
                raise
            warn(f"{error.message}; going on")
            time.sleep(PAUSE_S)
        else:
            move.moved_bytes = sent.size_bytes
            return move


class _Sent:
    """What went over the line, and why reading the image stopped, if it did."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self.error: FlydError | None = None


def _send_once(image: LocalImage, tmp: Path, sent: _Sent) -> images_pb2.ImageMove:
    request = images_pb2.PlanImageRequest(image_id=image.image_id, layers=image.layers)
    plan = call(stub().PlanImage, request, PLAN_TIMEOUT_S)
    needs = [BlobNeed(digest=n.digest, offset_bytes=n.offset_bytes) for n in plan.needs]
    if not needs:
        begin = iter((images_pb2.UploadImageRequest(image_id=image.image_id),))
        return call(stub().UploadImage, begin, SEND_TIMEOUT_S).move
    with waiting("saving the image"):
        path = Path(image.archive) if image.archive else _saved(image, tmp)
    with open_archive(path) as archive, _bar() as bar:
        try:
            parts = _parts(archive, image.image_id, needs, sent, bar)
            return call(stub().UploadImage, parts, SEND_TIMEOUT_S).move
        except FlydError:
            if sent.error is not None:
                raise sent.error from None
            raise


def _saved(image: LocalImage, tmp: Path) -> Path:
    path = tmp / "image.tar"
    return path if path.exists() else save(image.name, tmp)


def _parts(
    archive: Archive, image_id: str, needs: Sequence[BlobNeed], sent: _Sent, bar: Progress
) -> Iterator[images_pb2.UploadImageRequest]:
    """The upload's messages. Runs in gRPC's thread, which swallows errors: they are kept in `sent`."""
    try:
        for need in needs:
            task = bar.add_task(need.digest[:12], total=None, completed=need.offset_bytes)
            for part in archive.blob(need):
                yield images_pb2.UploadImageRequest(
                    image_id=image_id,
                    part=images_pb2.BlobPart(
                        digest=part.digest,
                        offset_bytes=part.offset_bytes,
                        size_bytes=part.size_bytes,
                        data=part.data,
                    ),
                )
                sent.size_bytes += len(part.data)
                bar.update(task, total=part.size_bytes, completed=part.offset_bytes + len(part.data))
    except FlydError as error:
        sent.error = error
        raise


@contextmanager
def _bar() -> Generator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        yield bar


def figures(moves: Sequence[images_pb2.ImageMove]) -> list[dict[str, Any]]:
    """For --json: what each host took. (JSON made from messages would have sizes as text.)"""
    return [
        {"host": m.host, "image_bytes": m.image_bytes, "moved_bytes": m.moved_bytes, "error": m.error}
        for m in moves
    ]


def _tell(move: images_pb2.ImageMove) -> None:
    if move.error:
        warn(f"{move.host} has no image yet ({move.error}); it fetches it when it makes a machine")
    elif move.moved_bytes == 0:
        done(f"{move.host}: has the image already ({megabytes(move.image_bytes)})")
    else:
        done(f"{move.host}: moved {megabytes(move.moved_bytes)} of {megabytes(move.image_bytes)}")


def megabytes(size_bytes: int) -> str:
    """A size for a person."""
    size = size_bytes / 1e6
    return (
        f"{size:.0f} MB" if size >= 10 else f"{size:.1f} MB" if size >= 0.1 else f"{size_bytes / 1e3:.1f} KB"
    )
