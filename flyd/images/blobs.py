"""Blobs on a host's disk, named by their sha256: half-received, or complete to be loaded and passed on.

    <root>/<digest>        complete, verified, durable
    <root>/<digest>.part   the first bytes of it; goes on where it was cut, also after a restart

Invariants: a name without `.part` is complete and true; a part of a blob that turns out wrong is
forgotten whole. Writing the same bytes at the same offset twice changes nothing, so two senders of
one blob do not disturb each other. Blocking; called from threads by store.py. It never learns what
a blob is for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from flyd.drivers.durable import sync_directory
from flyd.errors import Conflict, InvalidInput, NotFound, Refused, Unavailable
from flyd.images.layers import checked
from flyd.model import BlobNeed, BlobPart

PART_BYTES = 1024 * 1024
BLOB_MAX_BYTES = 32 * 1024**3
KEPT_BYTES = 1024**3  # of complete blobs: recent layers are passed on without asking the engine
PART_AGE_S = 24 * 3600.0


class Blobs:
    """The blobs of one host."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._root = root

    def path(self, digest: str) -> Path:
        """Where a complete blob is, or would be."""
        return self._root / checked(digest)

    def received_bytes(self, digests: Sequence[str]) -> dict[str, int | None]:
        """How much of each blob is here; None: all of it."""
        found: dict[str, int | None] = {}
        for digest in digests:
            part = self._part(digest)
            if self.path(digest).exists():
                found[digest] = None
            elif part.exists():
                found[digest] = part.stat().st_size
        return found

    def append(self, part: BlobPart) -> int:
        """Add a piece; how many bytes of it were new. The last piece completes the blob, or is `Refused`."""
        path = self._part(part.digest)
        end = part.offset_bytes + len(part.data)
        if not 0 <= part.offset_bytes <= end <= part.size_bytes <= BLOB_MAX_BYTES:
            raise InvalidInput(
                f"blob {part.digest[:12]}: a piece from {part.offset_bytes} to {end} is not in it"
            )
        if self.path(part.digest).exists():
            return 0
        try:
            new_bytes = self._write(path, part, end)
            if path.stat().st_size >= part.size_bytes:
                self._complete(path, part.digest)
        except FileNotFoundError:
            if self.path(part.digest).exists():  # another sender completed it meanwhile
                return 0
            raise Conflict(
                f"blob {part.digest[:12]} was forgotten meanwhile", hint="Send it again."
            ) from None
        except OSError as error:
            raise Unavailable(
                f"cannot store blob {part.digest[:12]}: {error}", hint="Is the host's disk full?"
            ) from error
        return new_bytes

    def _write(self, path: Path, part: BlobPart, end: int) -> int:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd).st_size
            if part.offset_bytes > size:
                raise Conflict(
                    f"blob {part.digest[:12]} is here up to byte {size}, but {part.offset_bytes} came next",
                    hint="Ask what is lacking, and go on from there.",
                )
            view = memoryview(part.data)
            while view:
                written = os.pwrite(fd, view, end - len(view))
                view = view[written:]
            return max(0, end - size)
        finally:
            os.close(fd)

    def _complete(self, path: Path, digest: str) -> None:
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
            if actual == digest:
                os.fsync(file.fileno())
        if actual != digest:
            path.unlink(missing_ok=True)
            raise Refused(
                f"blob {digest[:12]} came with other bytes, of sha256 {actual[:12]}; nothing was kept of it",
                hint="The transfer was changed on its way, or the sender's image is damaged. Deploy again.",
            )
        os.replace(path, self.path(digest))
        sync_directory(self._root)

    def read(self, need: BlobNeed) -> Iterator[BlobPart]:
        """A complete blob from an offset on, in pieces of PART_BYTES."""
        try:
            file = self.path(need.digest).open("rb")
        except FileNotFoundError:
            raise NotFound(f"blob {need.digest[:12]} is not on this host") from None
        with file:
            size_bytes = os.fstat(file.fileno()).st_size
            offset_bytes = file.seek(min(need.offset_bytes, size_bytes))
            content = iter(lambda: file.read(PART_BYTES), b"")
            yield from parts(need, size_bytes, content, offset_bytes)

    def tidy(self, now_s: float) -> None:
        """Forget parts that nobody goes on with, and the oldest complete blobs beyond KEPT_BYTES."""
        seen = sorted(((path.stat(), path) for path in self._root.iterdir()), key=lambda s: -s[0].st_mtime)
        kept_bytes = 0
        for stat, path in seen:
            if path.suffix == ".part":
                expired = now_s - stat.st_mtime > PART_AGE_S
            else:
                kept_bytes += stat.st_size
                expired = kept_bytes > KEPT_BYTES
            if expired:
                path.unlink(missing_ok=True)

    def _part(self, digest: str) -> Path:
        return self._root / f"{checked(digest)}.part"


def parts(need: BlobNeed, size_bytes: int, content: Iterator[bytes], position: int = 0) -> Iterator[BlobPart]:
    """What is needed of a blob whose bytes from `position` on are `content`; at least one part, if empty.

    The empty one ends a blob of which all came before a cut, but whose end was not noticed.
    """
    sent = False
    for data in content:
        fresh = data[max(0, need.offset_bytes - position) :]
        position += len(data)
        if fresh:
            sent = True
            yield BlobPart(
                digest=need.digest,
                offset_bytes=position - len(fresh),
                size_bytes=size_bytes,
                data=fresh,
            )
    if not sent:
        yield BlobPart(digest=need.digest, offset_bytes=size_bytes, size_bytes=size_bytes, data=b"")
