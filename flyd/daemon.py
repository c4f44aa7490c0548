"""flyd: one per host. The composition root: the only place where adapters are built.

    flyd --config /etc/flyd.toml

Order of a start: the host's lock, the store, the mirror's first view, then all loops at
once. SIGTERM and SIGINT cancel the loops; machines and Envoy run on, and the next flyd
takes them over. A SIGKILL differs only in that the host's lease runs out by itself.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import click
import structlog

from flyd.api.context import ApiContext
from flyd.api.image_peers import fetch_image
from flyd.api.logs import last_lines
from flyd.api.peers import Peers
from flyd.api.server import build_server
from flyd.deploy.deployer import Deployer
from flyd.drivers.process.driver import ProcessDriver
from flyd.drivers.process.sources import DirectorySources
from flyd.edge.envoy import Envoy
from flyd.edge.loop import keep_edge
from flyd.edge.xds import AdsServer
from flyd.errors import FlydError, Refused
from flyd.hosts.config import HostConfig, read_config
from flyd.hosts.installation import installation_folders
from flyd.hosts.membership import keep_membership
from flyd.images.prune import keep_images_pruned
from flyd.incidents.recorder import Recorder
from flyd.machines.host import HostLoop
from flyd.machines.probes import probe
from flyd.model import Host
from flyd.network.mesh import keep_mesh
from flyd.network.mesh_plan import MeshMode
from flyd.network.nftables import Nftables, keep_firewall
from flyd.network.wireguard import WireguardLink
from flyd.ports import Clock, Driver, ImageStore, Unchanged
from flyd.store import keys
from flyd.store.etcd import EtcdKV
from flyd.store.leader import lead
from flyd.store.mirror import Mirror
from flyd.store.runlog import SqliteRunLog
from flyd.store.system import SystemClock, SystemEntropy
from volumes.directory import DirectoryVolumes

log = structlog.get_logger(__name__)

STOP_GRACE_S = 1.0
OWN_PROGRAMS_IMAGE = "flyd-base:bookworm"  # a plain Debian: what pgha runs on under the Docker driver
MIRRORED = (
    keys.HOSTS,
    keys.ALIVE,
    keys.RESERVATIONS,
    keys.APPS,
    keys.SECRETS,
    keys.MACHINES,
    keys.STATUS,
    keys.VOLUMES,
    keys.RELEASES,
    keys.RUNS,
    keys.PG,
)


def lock_data_dir(data_dir: Path) -> int:
    """Hold the host's data directory alone; two flyds on one disk would undo each other's work."""
    data_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
    handle = os.open(data_dir / "flyd.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Refused(
            f"another flyd runs on {data_dir}", hint=f"`fuser {data_dir}/flyd.lock` shows its pid."
        ) from None
    return handle


def mesh_link(config: HostConfig) -> WireguardLink:
    """This host's end of the mesh."""
    return WireguardLink(Path(config.data_dir) / "wireguard.key", listen_port=config.wireguard_port)


async def describe(config: HostConfig, clock: Clock) -> Host:
    """This host as the others see it."""
    encrypted = config.mesh == "wireguard"
    public = config.public_address or config.address
    return Host(
        name=config.name,
        region=config.region,
        api_address=config.api_address,
        address=config.address,
        public_address=config.public_address,
        subnet=config.subnet,
        capacity=config.capacity,
        driver=config.driver,
        version=version("flyd"),
        http_port=config.http_port,
        wg_public_key=await mesh_link(config).public_key() if encrypted else "",
        wg_endpoint=f"{public}:{config.wireguard_port}" if encrypted else "",
        joined_at_s=clock.wall_s(),
    )


def prefer_own_programs() -> None:
    """Put this installation's programs (Envoy, pgha) first on the path, for flyd and its machines."""
    programs = str(Path(sys.executable).parent)
    os.environ["PATH"] = f"{programs}:{os.environ.get('PATH', os.defpath)}"


def machine_environment() -> dict[str, str]:
    """What every machine's environment begins with; nothing else of flyd's own gets through."""
    env = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
    if "FLYD_HOST" in os.environ:  # a local cluster finds a host's processes by this mark
        env["FLYD_HOST"] = os.environ["FLYD_HOST"]
    return env


async def run_edge(host: Host, mirror: Mirror, data_dir: Path, clock: Clock) -> None:
    """Run this host's Envoy and feed it."""
    ads = AdsServer(f"unix:{data_dir / 'ads.sock'}")
    address = await ads.start()
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(keep_edge(host, mirror, ads), name="routes")
            envoy = Envoy(data_dir / "envoy", host.name, host.region, address, clock)
            group.create_task(envoy.keep(), name="envoy")
    finally:
        await ads.stop()


def build_driver(config: HostConfig, clock: Clock) -> Driver:
    """What runs this host's machines, as its configuration says."""
    data_dir = Path(config.data_dir)
    if config.driver == "docker":
        from flyd.drivers.docker.driver import (
            DockerDriver,  # the SDK costs memory that only this driver needs
        )
        from flyd.drivers.docker.spec import HostNetwork, OwnPrograms

        network = HostNetwork(host_name=config.name, subnet=config.subnet, gateway=config.address)
        own = OwnPrograms(image=OWN_PROGRAMS_IMAGE, folders=installation_folders(), path=os.environ["PATH"])
        return DockerDriver(network, data_dir / "docker", clock, {}, own=own)
    return ProcessDriver(data_dir / "machines", clock, machine_environment())


def build_images(config: HostConfig, peers: Peers) -> ImageStore | None:
    """What brings images to this host's engine; None where machines are no containers."""
    if config.driver != "docker":
        return None
    from flyd.images.engine import ImageEngine  # as above: the SDK
    from flyd.images.store import EngineImages

    root = Path(config.data_dir) / "images"
    return EngineImages(root, ImageEngine(config.name), partial(fetch_image, peers))


@dataclass(frozen=True)
class Parts:
    """One flyd's parts, with real adapters behind every port."""

    kv: EtcdKV
    mirror: Mirror
    peers: Peers
    context: ApiContext
    host_loop: HostLoop
    deployer: Deployer
    recorder: Recorder


def build(config: HostConfig, host: Host, clock: Clock) -> Parts:
    """Choose the adapters and put the parts together; nothing runs yet."""
    data_dir = Path(config.data_dir)
    entropy = SystemEntropy()
    kv = EtcdKV(config.etcd)
    mirror = Mirror(kv, MIRRORED)
    peers = Peers(host.name, mirror)
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
    )
    host_loop = HostLoop(
        host=host,
        kv=kv,
        mirror=mirror,
        driver=context.driver,
        run_log=SqliteRunLog(data_dir / "runs.sqlite"),
        volumes=DirectoryVolumes(data_dir / "volumes"),
        sources=context.sources,
        clock=clock,
        entropy=entropy,
        probe=probe,
        images=context.images,
    )
    deployer = Deployer(kv, mirror, clock=clock, entropy=entropy, last_lines=partial(last_lines, context))
    return Parts(kv, mirror, peers, context, host_loop, deployer, Recorder(kv, mirror, clock=clock))


async def run(config: HostConfig) -> None:
    """Run one flyd until it is cancelled."""
    clock = SystemClock()
    host = await describe(config, clock)
    parts = build(config, host, clock)
    kv, mirror = parts.kv, parts.mirror
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(mirror.keep(), name="mirror")
            group.create_task(parts.host_loop.run(), name="machines")
            group.create_task(run_private_network(config, parts), name="network")
            await mirror.wait_synced()
            group.create_task(keep_membership(kv, host), name="membership")
            for role, work in (
                ("deployer", parts.deployer.keep_deploying),
                ("recorder", parts.recorder.keep_recording),
            ):
                group.create_task(keep_leading(kv, role, host.name, work), name=role)
            if host.http_port:
                edge = run_edge(host, mirror, Path(config.data_dir), clock)
                group.create_task(edge, name="edge")
            if parts.context.images is not None:
                pruning = keep_images_pruned(mirror, parts.context.images, clock)
                group.create_task(pruning, name="images")
            group.create_task(serve(parts.context), name="api")
    finally:
        await parts.peers.close()
        await kv.close()


async def run_private_network(config: HostConfig, parts: Parts) -> None:
    """Keep this host's machines reachable from all others, apart from strangers, and known by name."""
    host, mirror = parts.context.host, parts.mirror
    async with asyncio.TaskGroup() as group:
        if config.mesh != "off":
            link = mesh_link(config)
            group.create_task(keep_mesh(host, mirror, link, MeshMode(config.mesh)), name="mesh")
            firewall = Nftables(link.interface, config.dns_port)
            group.create_task(keep_firewall(host, mirror, firewall), name="firewall")
        if config.dns_port:
            from flyd.network.dns import DnsServer  # dnspython costs memory that only such hosts need

            clock, entropy = parts.context.clock, parts.context.entropy
            dns = DnsServer(host, mirror, parts.kv, clock=clock, entropy=entropy, port=config.dns_port)
            group.create_task(dns.serve(), name="dns")


async def keep_leading(
    kv: EtcdKV, role: str, name: str, work: Callable[[Unchanged], Awaitable[None]]
) -> None:
    """Campaign for a role for ever; while it is held, do its work under its guard."""
    await lead(kv, role, name, lambda held: work(held.guard))


async def serve(context: ApiContext) -> None:
    """Answer this host's API until cancelled."""
    server = build_server(context)
    await server.start()
    log.info("flyd.serves", host=context.host.name, api=context.host.api_address)
    try:
        await server.wait_for_termination()
    finally:
        await server.stop(STOP_GRACE_S)


async def run_until_signalled(config: HostConfig) -> None:
    """Run until SIGTERM or SIGINT; any other end of a loop ends flyd with its error."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        await run(config)
    except asyncio.CancelledError:
        log.info("flyd.stopped", host=config.name, machines="run on")


def configure_logging() -> None:
    """One line an event: time, level, event, fields; to standard error."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=False),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(
                key_order=["timestamp", "level", "event"], bool_as_flag=False
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    default=Path("/etc/flyd.toml"),
    show_default=True,
    help="The host's configuration; flyd/hosts/config.py explains each key.",
)
def main(config_path: Path) -> None:
    """Run this host's flyd. Stopping it, in any way, stops no machine."""
    configure_logging()
    prefer_own_programs()
    try:
        config = read_config(config_path)
        lock = lock_data_dir(Path(config.data_dir))
        asyncio.run(run_until_signalled(config))
        os.close(lock)
    except FlydError as error:
        _exit(error)
    except BaseExceptionGroup as group:
        matched = group.subgroup(FlydError)
        if matched is None:
            raise
        error: BaseException = matched
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        assert isinstance(error, FlydError)
        _exit(error)


def _exit(error: FlydError) -> None:
    """Say why flyd does not run, for a person and for systemd."""
    click.echo(f"flyd: {error.message}\n{error.hint}".rstrip(), err=True)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
