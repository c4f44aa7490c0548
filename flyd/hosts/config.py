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
dns_port = 0                    # answers .internal on `address` for machines; 53, or 0 for none
[capacity]
cpus = 4
memory_mb = 4096
disk_gb = 50
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

import msgspec

from flyd.errors import InvalidInput
from flyd.model import Resources, Value


class HostConfig(Value, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What /etc/flyd.toml says."""

    name: str
    region: str
    address: str
    public_address: str = ""
    subnet: str
    etcd: tuple[str, ...]
    data_dir: str
    capacity: Resources
    api_port: int = 4280
    http_port: int = 8080
    driver: Literal["process", "docker"] = "process"
    mesh: Literal["off", "wireguard", "routes"] = "off"
    wireguard_port: int = 51820
    dns_port: int = 0

    @property
    def api_address(self) -> str:
        """Where this host's flyd answers."""
        return f"{self.public_address or self.address}:{self.api_port}"


def read_config(path: Path) -> HostConfig:
    """The file's contents; InvalidInput names the file and the place of what is wrong."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), HostConfig)
    except OSError as error:
        raise InvalidInput(
            f"{path}: {error.strerror}", hint="`flyd --config FILE` names another file."
        ) from None
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise InvalidInput(f"{path}: {error}", hint="flyd/hosts/config.py lists every key.") from None
