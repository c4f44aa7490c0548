"""Whose an archive is: a token that etcd and the archive both hold, so that no clone writes into it (I12).

A clone made with the same configuration has the same system id, the same timelines and the same archive
folder: by nothing in it would Postgres notice that it writes into another cluster's history. What a clone has
not is the other cluster's etcd. So the first member makes a token in etcd, and the archive's `owner` file is
made with it, once, by a link. Each member checks that they are equal whenever its agent starts, and only then
leaves the copy that the archive command (archive.py) compares. A copy from an earlier run does not count.

Called by pgha/backups.py.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from flyd.errors import Refused
from flyd.model import Value, decode, encode
from flyd.ports import KV, Entropy, Put, Unchanged
from pgha import archive, keys, wal

TOKEN_BYTES = 16


class ArchiveOwner(Value, frozen=True, kw_only=True):
    """In etcd and, byte for byte, in the archive."""

    cluster: str
    token: str


def owned_file(directory: Path) -> Path:
    """The member's own copy, beside its data directory."""
    return directory / "archive.owner"


def forget(directory: Path) -> None:
    """What an earlier run knew does not count: the volume may have been copied to another cluster."""
    owned_file(directory).unlink(missing_ok=True)


async def token_of(kv: KV, cluster: str, entropy: Entropy) -> ArchiveOwner:
    """The cluster's own, made by whoever is first."""
    key = keys.archive_owner(cluster)
    made = ArchiveOwner(cluster=cluster, token=entropy.token(TOKEN_BYTES))
    if (await kv.txn([Unchanged(key, 0)], [Put(key, encode(made))])).succeeded:
        return made
    found = await kv.get(key)
    return made if found is None else decode(found.value, ArchiveOwner)


def claim(folder: Path, mine: ArchiveOwner, directory: Path) -> None:
    """Make the archive ours if it is nobody's, and let the archive command know. Idempotent.

    `Refused` if it is another's. OSError if the folder is not there or cannot be written.
    """
    owner = folder / archive.OWNER
    if not owner.exists():
        partial = folder / f".{archive.OWNER}.{mine.token}"
        wal.write_durably(partial, encode(mine).decode())
        try:
            os.link(partial, owner)
        except FileExistsError:
            pass  # another member, or another cluster: read below
        finally:
            wal.remove_durably(partial)
    if owner.read_bytes() != encode(mine):
        raise Refused(
            f"the archive {folder} belongs to another cluster ({_name(owner)}): nothing is archived there",
            hint="give this cluster an archive of its own, or delete the clone that it is",
        )
    if not owned_file(directory).exists():
        wal.write_durably(owned_file(directory), encode(mine).decode())
        owned_file(directory).chmod(0o644)


def require(folder: Path, directory: Path) -> None:
    """`Refused` unless that is there and known to be ours: an archive that is not mounted looks empty."""
    try:
        if (folder / archive.OWNER).read_bytes() == owned_file(directory).read_bytes():
            return
    except FileNotFoundError:
        pass
    raise Refused(f"{folder} is not this cluster's archive now", hint="is it mounted on this host?")


def _name(owner: Path) -> str:
    try:
        return msgspec.json.decode(owner.read_bytes(), type=ArchiveOwner).cluster
    except msgspec.DecodeError:
        return "unreadable"
