"""Source trees by their content: what an image is to the process driver.

`pack` turns a directory into a tar that is the same for the same content on every machine and
answers its digest (sha256, hex): `fly deploy` sends it to any flyd. `DirectorySources` keeps tars
and unpacked trees on a host:

    <root>/tars/<digest>.tar     as received, verified
    <root>/trees/<digest>/       unpacked; never changed afterwards, machines get copies
    <root>/tmp/                  half-made things, emptied when the daemon starts

Invariants: a name that is a digest is complete, verified and durable; nothing in a tree leads out
of it; a tar is refused unless its bytes have its digest, whoever sent it. It does not choose whom to
ask for a tree that is missing (`fetch` does), and never deletes one.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import stat
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from flyd.drivers.durable import sync_directory, sync_filesystem
from flyd.drivers.locks import Locks
from flyd.drivers.process.ignorefile import IgnoreRules
from flyd.errors import InvalidInput, NotFound, Refused, Unavailable

SOURCE_MAX_BYTES = 256 * 1024 * 1024  # of all files together
TAR_MAX_BYTES = 2 * SOURCE_MAX_BYTES  # the headers of many small files can be as large as they are
CHUNK_BYTES = 256 * 1024

_DIGEST = re.compile(r"[0-9a-f]{64}")


# --------------------------------------------------------------------------- packing


class _HashingWriter:
    """Passes bytes on, counts and hashes them."""

    def __init__(self, into: BinaryIO) -> None:
        self._into = into
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._into.write(data)


def pack(directory: Path, into: BinaryIO) -> str:
    """Write the tree as a tar, without what .dockerignore names; answers the tar's digest."""
    if not directory.is_dir():
        raise InvalidInput(f"{directory} is no directory", hint="run this where the application's source is")
    rules = IgnoreRules.of(directory)
    out = _HashingWriter(into)
    sizes: defaultdict[str, int] = defaultdict(int)
    with tarfile.open(fileobj=cast(BinaryIO, out), mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for path, info in _entries(directory, directory, rules):
            sizes[PurePosixPath(info.name).parts[0]] += info.size
            if sum(sizes.values()) > SOURCE_MAX_BYTES:
                raise _too_large(directory, sizes)
            if not info.isreg():
                tar.addfile(info)
                continue
            try:
                with open(path, "rb") as file:
                    tar.addfile(info, file)
            except OSError as error:
                raise InvalidInput(f"cannot read {path}: {error}") from error
    return out.sha256.hexdigest()


def _entries(top: Path, directory: Path, rules: IgnoreRules) -> Iterator[tuple[Path, tarfile.TarInfo]]:
    """Every kept entry below `directory`, in name order; a directory before what is in it."""
    for path in sorted(directory.iterdir(), key=lambda entry: os.fsencode(entry.name)):
        name = path.relative_to(top).as_posix()
        ignored = rules.ignored(name)
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            if not ignored:
                yield path, _info(name, tarfile.DIRTYPE, 0o755)
            if not ignored or rules.may_keep_inside(name):
                yield from _entries(top, path, rules)
        elif not ignored:
            yield path, _leaf(top, path, name, mode)


def _leaf(top: Path, path: Path, name: str, mode: int) -> tarfile.TarInfo:
    if stat.S_ISREG(mode):
        info = _info(name, tarfile.REGTYPE, 0o755 if mode & 0o111 else 0o644)
        info.size = path.lstat().st_size
        return info
    if not stat.S_ISLNK(mode):
        raise InvalidInput(
            f"{path} is a socket, pipe or device", hint="remove it or name it in .dockerignore"
        )
    target = os.readlink(path)
    if os.path.isabs(target) or not _inside(top, path):
        raise InvalidInput(
            f"the link {path} -> {target} leads out of {top}", hint="remove it or name it in .dockerignore"
        )
    info = _info(name, tarfile.SYMTYPE, 0o777)
    info.linkname = target
    return info


def _info(name: str, kind: bytes, mode: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)  # owner, group and time are zero
    info.type = kind
    info.mode = mode
    return info


def _inside(top: Path, link: Path) -> bool:
    return Path(os.path.realpath(link)).is_relative_to(os.path.realpath(top))


def _too_large(directory: Path, sizes: dict[str, int]) -> InvalidInput:
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:3]
    shown = ", ".join(f"{name} ({size / 1024**2:.0f} MiB)" for name, size in largest)
    return InvalidInput(
        f"the source in {directory} is larger than {SOURCE_MAX_BYTES // 1024**2} MiB",
        hint=f"name what a machine does not need in .dockerignore; largest so far: {shown}",
    )


# --------------------------------------------------------------------------- a host's store


class DirectorySources:
    """ports.SourceStore in a directory. `fetch(digest)` asks the other hosts for a tar."""

    def __init__(self, root: Path, fetch: Callable[[str], AsyncIterator[bytes]]) -> None:
        self._tars, self._trees, self._tmp = root / "tars", root / "trees", root / "tmp"
        self._fetch = fetch
        self._locks = Locks()
        if self._tmp.exists():
            shutil.rmtree(self._tmp)
        for directory in (self._tars, self._trees, self._tmp):
            directory.mkdir(parents=True, exist_ok=True)

    def has(self, digest: str) -> bool:
        """Whether the tar is here."""
        return self._tar(digest).exists()

    async def ensure(self, digest: str) -> str:
        """The path of the unpacked tree; fetches and unpacks what is missing."""
        tar, tree = self._tar(digest), self._trees / digest
        async with self._locks.of(digest):
            if not tree.exists():
                if not tar.exists():
                    await self.receive(digest, self._fetch(digest))
                await asyncio.to_thread(self._unpack, tar, tree)
        return str(tree)

    async def receive(self, digest: str, chunks: AsyncIterator[bytes]) -> None:
        """Store a tar that has this digest; refuses any other and leaves nothing of it."""
        tar = self._tar(digest)
        fd, name = tempfile.mkstemp(dir=self._tmp)
        try:
            with os.fdopen(fd, "wb") as file:
                sha256 = hashlib.sha256()
                size_bytes = 0
                async for chunk in chunks:
                    size_bytes += len(chunk)
                    if size_bytes > TAR_MAX_BYTES:
                        raise Refused(f"source {digest[:12]} is larger than a source may be")
                    sha256.update(chunk)
                    file.write(chunk)
                if sha256.hexdigest() != digest:
                    raise Refused(
                        f"{size_bytes} bytes came for source {digest[:12]}, but their digest is "
                        f"{sha256.hexdigest()[:12]}",
                        hint="the transfer was cut short or changed; deploy again",
                    )
                file.flush()
                await asyncio.to_thread(os.fsync, file.fileno())
            os.replace(name, tar)
            await asyncio.to_thread(sync_directory, self._tars)
        finally:
            Path(name).unlink(missing_ok=True)

    async def open(self, digest: str) -> AsyncIterator[bytes]:
        """The stored tar, in pieces of CHUNK_BYTES."""
        try:
            file = self._tar(digest).open("rb")
        except FileNotFoundError:
            raise NotFound(f"source {digest[:12]} is not on this host") from None
        with file:
            while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                yield chunk

    def _tar(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise InvalidInput(f"{digest!r} is no digest", hint="a digest is 64 hex digits (sha256)")
        return self._tars / f"{digest}.tar"

    def _unpack(self, tar: Path, tree: Path) -> None:
        fresh = Path(tempfile.mkdtemp(dir=self._tmp))
        try:
            fresh.chmod(0o755)
            try:
                with tarfile.open(tar) as opened:
                    unpack(opened, fresh)
            except (tarfile.TarError, FileExistsError, FileNotFoundError, NotADirectoryError) as error:
                raise Refused(f"source {tree.name[:12]} is no tree that `pack` made: {error}") from error
            sync_filesystem(fresh)
            os.replace(fresh, tree)
            sync_directory(self._trees)
        except OSError as error:
            raise Unavailable(
                f"cannot unpack source {tree.name[:12]} on this host: {error}", hint="is its disk full?"
            ) from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def unpack(tar: tarfile.TarFile, into: Path) -> None:
    """Unpack what `pack` makes and refuse all else.

    Links are made last, so nothing is ever written through one; then each must lead to a place inside.
    """
    links: list[tuple[Path, str]] = []
    for member in tar:
        path = into.joinpath(*_parts(member))
        if member.isdir():
            path.mkdir(mode=0o755)
        elif member.issym():
            links.append((path, member.linkname))
        elif member.isreg() and not member.issparse() and (content := tar.extractfile(member)):
            with open(path, "xb") as file:
                shutil.copyfileobj(content, file)
            path.chmod(0o755 if member.mode & 0o111 else 0o644)
        else:
            raise Refused(f"{member.name!r} is neither file, directory nor symbolic link")
    for path, target in links:
        path.symlink_to(target)
    for path, target in links:
        if os.path.isabs(target) or not _inside(into, path):
            raise Refused(f"the link {path.relative_to(into)} -> {target} leads out of the tree")


def _parts(member: tarfile.TarInfo) -> tuple[str, ...]:
    parts = PurePosixPath(member.name).parts
    if not parts or member.name.startswith("/") or ".." in parts:
        raise Refused(f"{member.name!r} is no path inside the tree")
    return parts
