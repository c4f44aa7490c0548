"""A host's own configuration: /etc/flyd.toml, read once at start.

name = "ams-1"                  # unique in the cluster
region = "ams"
address = "127.11.0.1"          # this host's address on the private network
public_address = "192.0.2.7"    # where others reach its API and its edge; default: address
subnet = "127.11"               # its machines get 127.11.x.y
etcd = ["127.11.0.1:2379"]      # all members: one may be down
data_dir = "/var/lib/flyd"
api_port = 4280                 # gRPC, on `public_address`
http_port = 8080                # the edge, on `public_address`; 0 for no edge
driver = "process"              # or "docker": machines are containers
mesh = "off"                    # or "wireguard", or "routes" where the network between hosts is private
wireguard_port = 51820          # UDP, on `public_address`
volumes = "directory"           # or "btrfs": limited in size, with snapshots and forks that cost nothing
volume_disk = ""                # for btrfs: a free disk; none: a file of capacity.disk_gb in data_dir
dns_port = 0                    # answers .internal on `address` for machines; 53, or 0 for none
metrics_port = 0                # figures for Prometheus on 127.0.0.1; 9273, or 0 for none

[capacity]                      # for machines; default: all CPUs, most of memory and of the free disk
cpus = 4
memory_mb = 4096
disk_gb = 50

[labels]                        # what machines may demand of their host (fly.toml: [flyd.require])
disk = "nvme"
"""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from pathlib import Path
from typing import Literal

import msgspec

from flyd.errors import InvalidInput
from flyd.model import Resources, Value, labels

MEMORY_PART = 0.9  # of the machine's, that applications may have
DISK_PART = 0.8
METRICS_PORT = 9273  # where one is wanted


class HostConfig(Value, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What /etc/flyd.toml says."""

    name: str
    region: str
    address: str
    public_address: str = ""
    subnet: str
    etcd: tuple[str, ...]
    data_dir: str
    capacity: Resources | None = None
    api_port: int = 4280
    http_port: int = 8080
    driver: Literal["process", "docker"] = "process"
    mesh: Literal["off", "wireguard", "routes"] = "off"
    wireguard_port: int = 51820
    volumes: Literal["directory", "btrfs"] = "directory"
    volume_disk: str = ""
    dns_port: int = 0
    metrics_port: int = 0
    labels: dict[str, str] = {}

    @property
    def api_address(self) -> str:
        """Where this host's flyd answers."""
        return f"{self.public_address or self.address}:{self.api_port}"


def config_text(config: HostConfig) -> str:
    """The file that says this: what differs from the defaults."""
    fields = msgspec.structs.asdict(config)
    defaults = {f.name: f.default for f in msgspec.structs.fields(HostConfig)}
    lines = [
        f"{name} = {json.dumps(value)}"  # a string, number or list of these is the same in TOML
        for name, value in fields.items()
        if name not in ("capacity", "labels") and defaults[name] != value
    ]
    if config.capacity is not None:
        lines.append("[capacity]")
        lines += [f"{name} = {value}" for name, value in msgspec.structs.asdict(config.capacity).items()]
    if config.labels:
        lines.append("[labels]")
        lines += [f"{json.dumps(name)} = {json.dumps(value)}" for name, value in config.labels.items()]
    return "\n".join([*lines, ""])


def capacity_here(data_dir: Path) -> Resources:
    """What this machine has for applications: all CPUs, most of its memory and of the disk at `data_dir`."""
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Resources(
        cpus=os.cpu_count() or 1,
        memory_mb=int(memory_bytes / 2**20 * MEMORY_PART),
        disk_gb=int(shutil.disk_usage(data_dir).free / 2**30 * DISK_PART),
    )


def read_config(path: Path) -> HostConfig:
    """The file's contents; InvalidInput names the file and the place of what is wrong."""
    try:
        config = msgspec.convert(tomllib.loads(path.read_text()), HostConfig)
    except OSError as error:
        raise InvalidInput(
            f"{path}: {error.strerror}", hint="`flyd --config FILE` names another file."
        ) from None
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise InvalidInput(f"{path}: {error}", hint="flyd/hosts/config.py lists every key.") from None
    if against := labels.wrong(config.labels):
        raise InvalidInput(f"{path}: [labels]: {against}", hint='Like disk = "nvme".')
    return config
