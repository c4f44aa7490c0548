"""Making this machine a host: its identity folder, its flyd.toml, its systemd units.

Each step can be done again: a join that was interrupted goes on with the key it had made, and
the certificate, which makes the host a member, is the last file of its identity to be written.
The command (flyd/cli/joining.py) calls this; flyd reads the results.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flyd.errors import Refused
from flyd.hosts.config import METRICS_PORT, HostConfig, config_text
from flyd.hosts.units import BOOTED, UNIT_FOLDER, flyd_unit
from flyd.identity.folder import CERTIFICATE, KEY, REFUSAL, Identity, describe, replace_file, write_identity
from flyd.v1 import identity_pb2


def identity_folder(data_dir: Path) -> Path:
    """Where a host's certificate is."""
    return data_dir / "identity"


def host_key(folder: Path, new_key: Callable[[], str]) -> str:
    """This host's key: the one of an interrupted join, else a new one. Refused if it is a member."""
    expelled = (folder / REFUSAL).exists()
    if (folder / CERTIFICATE).exists() and not expelled:
        raise Refused(
            f"this machine is a host of a cluster already: {folder}",
            hint="One host, one cluster. To start over: stop flyd and remove its data directory.",
        )
    if expelled:
        shutil.rmtree(folder)
    if (path := folder / KEY).exists():
        return path.read_text()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = new_key()
    replace_file(path, key.encode())
    return key


def write_joined(folder: Path, name: str, key: str, joined: identity_pb2.JoinResponse) -> None:
    """Keep what joining gave: from here on this machine is a member."""
    write_identity(
        folder,
        Identity(
            description=describe(
                joined.cluster_id,
                f"host:{name}:{joined.membership}",
                expires_at_s=joined.expires_at,
                lifetime_s=joined.lifetime_s,
            ),
            key=key,
            certificate=joined.certificate,
            hosts=joined.hosts_certificate,
            clients=joined.clients_certificate,
        ),
    )


def host_config(
    *, name: str, region: str, address: str, subnet: str, etcd: tuple[str, ...], data_dir: Path, driver: str
) -> HostConfig:
    """The configuration of a host that answers at `address` and has `subnet` for its machines."""
    network: dict[str, Any] = {}
    if driver == "docker":
        network = {"mesh": "wireguard", "dns_port": 53, "metrics_port": METRICS_PORT}
    return HostConfig(
        name=name,
        region=region,
        address=f"{subnet}.0.1",
        public_address=address,
        subnet=subnet,
        etcd=etcd,
        data_dir=str(data_dir),
        driver="docker" if driver == "docker" else "process",
        **network,
    )


def write_config(path: Path, config: HostConfig) -> None:
    """Write flyd.toml; one that is there is kept aside."""
    if path.exists():
        os.replace(path, path.with_name(path.name + ".old"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config_text(config))


def write_unit(config: Path) -> bool:
    """Write flyd's systemd unit; False without systemd."""
    if not BOOTED.is_dir():
        return False
    (UNIT_FOLDER / "flyd.service").write_text(flyd_unit(flyd_program(), config))
    return True


def flyd_program() -> str:
    """This installation's flyd; every host has it at the same path."""
    return str(Path(sys.executable).parent / "flyd")
