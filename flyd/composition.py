"""The parts of one flyd, put together: the only place where adapters are chosen (the daemon runs them).

Nothing runs yet when `build` returns; `flyd/daemon.py` starts and ends the loops.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import msgspec

from flyd.api.context import ApiContext
from flyd.api.image_peers import fetch_image
from flyd.api.logs import last_lines
from flyd.api.peers import Peers
from flyd.api.volume_peers import VolumePeers
from flyd.deploy.deployer import Deployer
from flyd.drivers.process.driver import ProcessDriver
from flyd.drivers.process.sources import DirectorySources
from flyd.hosts.config import HostConfig, capacity_here
from flyd.hosts.installation import installation_folders
from flyd.hosts.newcomer import identity_folder
from flyd.identity.credentials import Credentials
from flyd.incidents.recorder import Recorder
from flyd.machines.host import HostLoop
from flyd.machines.leases import LEASES
from flyd.machines.probes import probe
from flyd.model import Host
from flyd.network.wireguard import WireguardLink
from flyd.placement.repairs import Repairs
from flyd.ports import Clock, Driver, ImageStore
from flyd.storage.copier import VolumeCopier
from flyd.storage.keeper import VolumeKeeper
from flyd.storage.moving import VolumeMover
from flyd.storage.rescuer import VolumeRescuer
from flyd.storage.verification import Verification, VolumeVerifier
from flyd.store import keys
from flyd.store.etcd import EtcdKV
from flyd.store.mirror import Mirror
from flyd.store.runlog import SqliteRunLog
from flyd.store.system import SystemEntropy
from volumes.btrfs import BtrfsVolumes
from volumes.directory import DirectoryVolumes
from volumes.pool import capacity_gb, open_pool
from volumes.streams import StreamStore

OWN_PROGRAMS_IMAGE = "flyd-base:bookworm"  # a plain Debian: what pgha runs on under the Docker driver
MIRRORED = (
    keys.MEMBERSHIPS,
    keys.HOSTS,
    keys.ALIVE,
    keys.RESERVATIONS,
    keys.LOSSES,
    keys.DRAINS,
    keys.SETTINGS,
    keys.APPS,
    keys.SECRETS,
    keys.MACHINES,
    keys.STATUS,
    keys.VOLUMES,
    keys.VOLUME_COPIES,
    keys.VOLUME_MOVES,
    keys.RELEASES,
    keys.RUNS,
    keys.PG,
    LEASES,
)


def mesh_link(config: HostConfig) -> WireguardLink:
    """This host's end of the mesh."""
    return WireguardLink(Path(config.data_dir) / "wireguard.key", listen_port=config.wireguard_port)


async def describe(config: HostConfig, clock: Clock) -> Host:
    """This host as the others see it."""
    encrypted = config.mesh == "wireguard"
    public = config.public_address or config.address
    capacity = config.capacity or capacity_here(Path(config.data_dir))
    if config.volumes == "btrfs":  # what the pool has, whatever was asked for
        disk_gb = min(capacity.disk_gb, capacity_gb(Path(config.data_dir) / "volumes"))
        capacity = msgspec.structs.replace(capacity, disk_gb=disk_gb)
    return Host(
        name=config.name,
        region=config.region,
        api_address=config.api_address,
        address=config.address,
        public_address=config.public_address,
        subnet=config.subnet,
        capacity=capacity,
        driver=config.driver,
        version=version("flyd"),
        http_port=config.http_port,
        wg_public_key=await mesh_link(config).public_key() if encrypted else "",
        wg_endpoint=f"{public}:{config.wireguard_port}" if encrypted else "",
        labels=config.labels,
        joined_at_s=clock.wall_s(),
    )


def machine_environment() -> dict[str, str]:
    """What every machine's environment begins with; nothing else of flyd's own gets through."""
    env = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
    if "FLYD_HOST" in os.environ:  # a local cluster finds a host's processes by this mark
        env["FLYD_HOST"] = os.environ["FLYD_HOST"]
    return env


def own_environment(config: HostConfig) -> dict[str, str]:
    """What flyd's own programs (pgha) need to speak to etcd: no other machine gets it."""
    return {"FLYD_ETCD": ",".join(config.etcd), "FLYD_IDENTITY": str(identity_folder(Path(config.data_dir)))}


def build_driver(config: HostConfig, clock: Clock) -> Driver:
    """What runs this host's machines, as its configuration says."""
    data_dir = Path(config.data_dir)
    if config.driver == "docker":
        from flyd.drivers.docker.driver import (
            DockerDriver,  # the SDK costs memory that only this driver needs
        )
        from flyd.drivers.docker.spec import HostNetwork, OwnPrograms

        network = HostNetwork(host_name=config.name, subnet=config.subnet, gateway=config.address)
        folders = (*installation_folders(), str(identity_folder(Path(config.data_dir))))
        env = {**own_environment(config), "PATH": os.environ["PATH"]}
        own = OwnPrograms(image=OWN_PROGRAMS_IMAGE, folders=folders, env=env)
        return DockerDriver(network, data_dir / "docker", clock, {}, own=own)
    return ProcessDriver(data_dir / "machines", clock, machine_environment(), own_environment(config))


def build_images(config: HostConfig, peers: Peers) -> ImageStore | None:
    """What brings images to this host's engine; None where machines are no containers."""
    if config.driver != "docker":
        return None
    from flyd.images.engine import ImageEngine  # as above: the SDK
    from flyd.images.store import EngineImages

    root = Path(config.data_dir) / "images"
    return EngineImages(root, ImageEngine(config.name), partial(fetch_image, peers))


def build_volumes(config: HostConfig) -> StreamStore:
    """This host's volumes; a btrfs pool is made or mounted first."""
    at = Path(config.data_dir) / "volumes"
    if config.volumes == "directory":
        return DirectoryVolumes(at)
    disk = Path(config.volume_disk or f"{config.data_dir}/volumes.btrfs")
    open_pool(at, disk, (config.capacity or capacity_here(Path(config.data_dir))).disk_gb)
    return BtrfsVolumes(at)


@dataclass(frozen=True)
class Parts:
    """One flyd's parts, with real adapters behind every port."""

    credentials: Credentials
    kv: EtcdKV
    mirror: Mirror
    peers: Peers
    context: ApiContext
    host_loop: HostLoop
    deployer: Deployer
    recorder: Recorder
    repairs: Repairs
    volume_keeper: VolumeKeeper
    volume_copier: VolumeCopier
    volume_mover: VolumeMover
    volume_rescuer: VolumeRescuer
    volume_verifier: VolumeVerifier


def build(config: HostConfig, host: Host, clock: Clock, volumes: StreamStore) -> Parts:
    """Choose the adapters and put the parts together; nothing runs yet."""
    data_dir = Path(config.data_dir)
    entropy = SystemEntropy()
    credentials = Credentials(identity_folder(Path(config.data_dir)))
    kv = EtcdKV(config.etcd, credentials)
    mirror = Mirror(kv, MIRRORED, ignored=keys.is_postgres_lease)
    peers = Peers(host.name, mirror, credentials)
    context = ApiContext(
        host=host,
        kv=kv,
        mirror=mirror,
        clock=clock,
        entropy=entropy,
        driver=build_driver(config, clock),
        images=build_images(config, peers),
        sources=DirectorySources(data_dir / "sources", peers.fetch_source),
        peers=peers,
        etcd_endpoints=config.etcd,
        volumes=volumes,
    )
    host_loop = HostLoop(
        host=host,
        kv=kv,
        mirror=mirror,
        driver=context.driver,
        run_log=SqliteRunLog(data_dir / "runs.sqlite"),
        volumes=volumes,
        sources=context.sources,
        clock=clock,
        entropy=entropy,
        probe=probe,
        images=context.images,
    )
    deployer = Deployer(kv, mirror, context.placer, clock=clock, last_lines=partial(last_lines, context))
    recorder = Recorder(kv, mirror, clock=clock)
    repairs = Repairs(kv, mirror, context.placer, clock=clock, entropy=entropy)
    keeper = VolumeKeeper(host.name, kv, volumes, clock=clock, entropy=entropy)
    calls = VolumePeers(peers)
    copier = VolumeCopier(host.name, kv, mirror, volumes, calls, clock=clock)
    mover = VolumeMover(host.name, kv, mirror, copier, calls, clock=clock)
    rescuer = VolumeRescuer(kv, mirror, calls.recover, clock=clock)
    verification = Verification(host.name, kv, volumes, calls.digest, clock=clock, scratch="scheduled")
    verifier = VolumeVerifier(host.name, mirror, verification, clock=clock)
    roles = (deployer, recorder, repairs)
    return Parts(
        credentials, kv, mirror, peers, context, host_loop, *roles, keeper, copier, mover, rescuer, verifier
    )
