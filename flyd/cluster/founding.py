"""The first hosts of a cluster on machines of one's own: for each an archive to unpack at `/`.

The same shape as a cluster on one machine (layout.py): one, three or five hosts, each with a
member of etcd. Hosts that come later join with a token (flyd/cli/joining.py) and have none.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Mapping, Sequence
from ipaddress import AddressValueError, IPv4Address
from pathlib import Path

from flyd.cluster.layout import Layout, LocalHost, check, etcd_command
from flyd.errors import InvalidInput
from flyd.hosts.config import config_text
from flyd.hosts.newcomer import flyd_program, host_config, identity_folder
from flyd.hosts.units import UNIT_FOLDER, etcd_unit, flyd_unit
from flyd.identity.subjects import check_host_name
from flyd.model import Resources

CONFIG = Path("/etc/flyd.toml")
DATA_DIR = Path("/var/lib/flyd")
FIRST_SUBNET = 211
HOST = re.compile(r"(?P<name>[^=@]+)=(?P<region>[^=@]+)@(?P<address>[^=@]+)")
PRIVATE, READABLE = 0o600, 0o644


def founding_layout(name: str, hosts: Sequence[str], driver: str) -> Layout:
    """The layout that words like `ams-1=ams@192.0.2.1` say."""
    found: list[LocalHost] = []
    for number, word in enumerate(hosts):
        match = HOST.fullmatch(word)
        if match is None or not _is_address(match["address"]):
            raise InvalidInput(f"{word!r} is no host", hint="Say NAME=REGION@IPV4, like ams-1=ams@192.0.2.1")
        check_host_name(match["name"])
        found.append(
            LocalHost(
                name=match["name"],
                region=match["region"],
                subnet=f"10.{FIRST_SUBNET + number}",
                capacity=Resources(),
                public_address=match["address"],
            )
        )
    check(name, tuple(host.region for host in found), FIRST_SUBNET - 1)
    names = {host.name for host in found}
    if len(names) != len(found) or len({host.address for host in found}) != len(found):
        raise InvalidInput("two of the hosts have the same name or address")
    return Layout(
        name=name,
        base=FIRST_SUBNET - 1,
        hosts=tuple(found),
        provider="docker" if driver == "docker" else "process",
    )


def host_archive(plan: Layout, host: LocalHost, identity: Mapping[str, bytes]) -> bytes:
    """Everything that makes a machine this host: identity, flyd.toml, the units of etcd and flyd."""
    config = host_config(
        name=host.name,
        region=host.region,
        address=host.address,
        subnet=host.subnet,
        etcd=plan.etcd,
        data_dir=DATA_DIR,
        driver=plan.provider,
    )
    etcd = etcd_command("etcd", plan, host, DATA_DIR / "etcd", identity_folder(DATA_DIR))
    folder = identity_folder(DATA_DIR)
    contents = {
        CONFIG: (config_text(config).encode(), READABLE),
        UNIT_FOLDER / "etcd.service": (etcd_unit(etcd).encode(), READABLE),
        UNIT_FOLDER / "flyd.service": (flyd_unit(flyd_program(), CONFIG).encode(), READABLE),
        **{folder / name: (data, PRIVATE) for name, data in identity.items()},
    }
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        entry = tarfile.TarInfo(str(folder.relative_to("/")))
        entry.type, entry.mode = tarfile.DIRTYPE, 0o700
        archive.addfile(entry)
        for path, (data, mode) in contents.items():
            entry = tarfile.TarInfo(str(path.relative_to("/")))
            entry.size, entry.mode = len(data), mode
            archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def _is_address(text: str) -> bool:
    try:
        IPv4Address(text)
    except AddressValueError:
        return False
    return True
