"""The identities of a new local cluster: the first host founds it, this machine's user gets a certificate."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

from flyd.cluster.layout import Layout, LocalHost
from flyd.identity.folder import FOUNDING, PRIVATE, files, replace_file, write_identity
from flyd.model import encode
from flyd.store.system import SystemClock, SystemEntropy

USER = "admin"
DAY_S = 86400.0


def write_identities(
    plan: Layout, keep: Callable[[LocalHost, Mapping[str, bytes]], None], user_folder: Path
) -> None:
    """Found the cluster: hand each host's identity files to `keep`, write the user's to their folder."""
    from flyd.identity.founding import FirstHost, found  # loads `cryptography`, which only this needs

    first = [
        FirstHost(
            name=host.name,
            addresses=tuple(dict.fromkeys((host.address, host.private_address))),
            subnet=host.subnet,
        )
        for host in plan.hosts
    ]
    founded = found(first, USER, SystemClock(), SystemEntropy(), plan.certificate_days * DAY_S)
    for number, host in enumerate(plan.hosts):
        founder = {FOUNDING: encode(founded.founding)} if number == 0 else {}
        keep(host, {**founder, **files(founded.hosts[host.name])})
    write_identity(user_folder, founded.user)


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write identity files into a folder on this machine."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, data in contents.items():
        replace_file(folder / name, data)


def identity_archive(contents: Mapping[str, bytes]) -> bytes:
    """Identity files as a tar archive of the folder `identity`, for a host that is a container."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        folder = tarfile.TarInfo("identity")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o700
        archive.addfile(folder)
        for name, data in contents.items():
            entry = tarfile.TarInfo(f"identity/{name}")
            entry.size, entry.mode = len(data), PRIVATE
            archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()
