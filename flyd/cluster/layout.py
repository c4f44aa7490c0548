"""The shape of a cluster on one machine: who listens where. Pure.

Each host gets a loopback network of its own, 127.<base+i>.0.0/16, which Linux routes to
itself without any set-up: the host is .0.1, its machines get the rest. Losing a host is
killing all that belongs to it; nothing else changes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from flyd.errors import InvalidInput
from flyd.hosts.config import METRICS_PORT, HostConfig, config_text
from flyd.identity.folder import CERTIFICATE, EXPELLED, HOSTS_CA, KEY
from flyd.model import Resources, Value

API_PORT = 4280
HTTP_PORT = 8080
ETCD_CLIENT_PORT = 2379
ETCD_PEER_PORT = 2380
MAX_BASE = 240
CERTIFICATE_DAYS = 90.0  # of a host; it renews itself after two thirds
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


class LocalHost(Value, frozen=True, kw_only=True):
    """One host of a local cluster."""

    name: str
    region: str
    subnet: str
    capacity: Resources
    public_address: str = ""  # where the host itself is reached; empty: at `private_address`

    @property
    def private_address(self) -> str:
        """The host's end of its machines' network."""
        return f"{self.subnet}.0.1"

    @property
    def address(self) -> str:
        """Where the host's flyd, etcd and edge are reached."""
        return self.public_address or self.private_address


class Layout(Value, frozen=True, kw_only=True):
    """A local cluster."""

    name: str
    base: int
    hosts: tuple[LocalHost, ...]
    certificate_days: float = CERTIFICATE_DAYS
    provider: Literal["process", "docker"] = "process"  # docker: a host is a container
    volumes: Literal["directory", "btrfs"] = "directory"  # what the hosts keep volumes on

    @property
    def etcd(self) -> tuple[str, ...]:
        """All client addresses of etcd."""
        return tuple(f"{host.address}:{ETCD_CLIENT_PORT}" for host in self.hosts)

    @property
    def api(self) -> tuple[str, ...]:
        """All addresses at which a flyd answers."""
        return tuple(f"{host.address}:{API_PORT}" for host in self.hosts)

    def host(self, region: str) -> LocalHost:
        """The host of a region."""
        for host in self.hosts:
            if host.region == region or host.name == region:
                return host
        known = ", ".join(host.region for host in self.hosts)
        raise InvalidInput(f"no host is in region {region!r}", hint=f"Regions of this cluster: {known}.")


def layout(
    name: str,
    regions: tuple[str, ...],
    base: int,
    capacity: Resources,
    certificate_days: float = CERTIFICATE_DAYS,
) -> Layout:
    """One host for each region, in order, each a loopback network."""
    check(name, regions, base)
    hosts = tuple(
        LocalHost(name=f"{region}-1", region=region, subnet=f"127.{base + i}", capacity=capacity)
        for i, region in enumerate(regions)
    )
    return Layout(name=name, base=base, hosts=hosts, certificate_days=certificate_days)


def container_layout(
    name: str,
    regions: tuple[str, ...],
    base: int,
    capacity: Resources,
    certificate_days: float = CERTIFICATE_DAYS,
) -> Layout:
    """One container for each region, at 10.<base>.0.11 and on; its machines in 10.<base+1+i>.0.0/16."""
    check(name, regions, base)
    hosts = tuple(
        LocalHost(
            name=f"{region}-1",
            region=region,
            subnet=f"10.{base + 1 + i}",
            capacity=capacity,
            public_address=f"10.{base}.0.{11 + i}",
        )
        for i, region in enumerate(regions)
    )
    return Layout(name=name, base=base, hosts=hosts, provider="docker", certificate_days=certificate_days)


def check(name: str, regions: tuple[str, ...], base: int) -> None:
    """Raise InvalidInput unless a cluster can be made of this."""
    for word, what in ((name, "a cluster's name"), *((region, "a region") for region in regions)):
        if not NAME.fullmatch(word):  # both become folders, which `down` deletes
            raise InvalidInput(
                f"{word!r} can not be {what}", hint="Use 1-63 lower-case letters, digits, - and _."
            )
    if len(set(regions)) != len(regions) or len(regions) not in (1, 3, 5):
        raise InvalidInput(
            f"a local cluster has 1, 3 or 5 different regions, not {', '.join(regions) or 'none'}",
            hint="etcd needs an odd number to survive the loss of one: --regions ams,iad,sin",
        )
    if not 1 <= base <= MAX_BASE:
        raise InvalidInput(f"--base is {base}, it must be between 1 and {MAX_BASE}")


def etcd_command(binary: str, plan: Layout, host: LocalHost, data_dir: Path, identity: Path) -> list[str]:
    """How to start a host's etcd member; `identity` is the host's identity folder."""
    client = f"https://{host.address}:{ETCD_CLIENT_PORT}"
    peer = f"https://{host.address}:{ETCD_PEER_PORT}"
    members = ",".join(f"{h.name}=https://{h.address}:{ETCD_PEER_PORT}" for h in plan.hosts)
    return [
        binary,
        *("--name", host.name, "--data-dir", str(data_dir)),
        *("--listen-client-urls", client, "--advertise-client-urls", client),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
        *("--initial-cluster", members, "--initial-cluster-token", f"flyd-{plan.name}"),
        *etcd_tls(identity),
        *("--heartbeat-interval", "100", "--election-timeout", "1000"),
        *("--auto-compaction-mode", "periodic", "--auto-compaction-retention", "1h"),
        *("--log-level", "warn", "--logger", "zap"),
    ]


def etcd_tls(identity: Path) -> list[str]:
    """What makes etcd speak to hosts of the cluster alone. It reads certificates and the list of
    refused ones at each handshake: renewing and expelling need no restart.
    """
    certificate, key = str(identity / CERTIFICATE), str(identity / KEY)
    authority, refused = str(identity / HOSTS_CA), str(identity / EXPELLED)
    return [
        *("--client-cert-auth", "--trusted-ca-file", authority, "--client-crl-file", refused),
        *("--cert-file", certificate, "--key-file", key),
        *("--peer-client-cert-auth", "--peer-trusted-ca-file", authority, "--peer-crl-file", refused),
        *("--peer-cert-file", certificate, "--peer-key-file", key),
        # A member's connections may come from another address than it answers at: loopback, NAT.
        "--experimental-peer-skip-client-san-verification",
    ]


def flyd_config(plan: Layout, host: LocalHost, data_dir: Path) -> str:
    """A host's flyd.toml."""
    network: dict[str, Any] = {}
    if plan.provider == "docker":
        network = {"mesh": "wireguard", "dns_port": 53, "metrics_port": METRICS_PORT}
    config = HostConfig(
        name=host.name,
        region=host.region,
        address=host.private_address,
        public_address=host.address,
        subnet=host.subnet,
        etcd=plan.etcd,
        data_dir=str(data_dir),
        driver=plan.provider,
        volumes=plan.volumes,
        api_port=API_PORT,
        http_port=HTTP_PORT,
        capacity=host.capacity,
        **network,
    )
    return config_text(config)
