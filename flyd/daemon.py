"""flyd: one per host. Starts its parts (flyd/composition.py), runs their loops, ends no machine when it ends.

    flyd --config /etc/flyd.toml

Order of a start: the host's lock, the store, the mirror's first view, then all loops at
once. SIGTERM and SIGINT cancel the loops; machines and Envoy run on, and the next flyd
takes them over. A SIGKILL differs only in that the host's lease runs out by itself.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType

import click
import structlog

from flyd import metrics
from flyd.api.context import ApiContext
from flyd.api.server import build_server
from flyd.composition import Parts, build, build_volumes, describe, mesh_link
from flyd.edge.envoy import Envoy
from flyd.edge.loop import keep_edge
from flyd.edge.xds import AdsServer
from flyd.errors import FlydError, Refused
from flyd.hosts.config import HostConfig, read_config
from flyd.hosts.identity import check_not_expelled, keep_identity, put_founding, wait_admitted
from flyd.hosts.membership import keep_membership
from flyd.hosts.newcomer import identity_folder
from flyd.identity.credentials import Credentials
from flyd.images.prune import keep_images_pruned
from flyd.model import Host
from flyd.network.mesh import keep_mesh
from flyd.network.mesh_plan import MeshMode
from flyd.network.nftables import Nftables, keep_firewall
from flyd.ports import Clock
from flyd.store.leader import CONTROLLER, Leadership, lead
from flyd.store.mirror import Mirror
from flyd.store.system import SystemClock

log = structlog.get_logger(__name__)

STOP_GRACE_S = 1.0
M_ARENA_MAX = -8  # <malloc.h>


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


def use_few_arenas() -> None:
    """Let all threads share two of glibc's heaps: with one each, much of a large message's memory stays.

    Must come before the first thread. Another C library has no such call, and no such heaps.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_ARENA_MAX, 2)


def prefer_own_programs() -> None:
    """Put this installation's programs (Envoy, pgha) first on the path, for flyd and its machines."""
    programs = str(Path(sys.executable).parent)
    os.environ["PATH"] = f"{programs}:{os.environ.get('PATH', os.defpath)}"


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


async def run(config: HostConfig) -> None:
    """Run one flyd until it is cancelled."""
    clock = SystemClock()
    volumes = build_volumes(config)
    host = await describe(config, clock)
    parts = build(config, host, clock, volumes)
    kv, mirror, credentials = parts.kv, parts.mirror, parts.credentials
    try:
        await put_founding(kv, credentials.folder)
        async with asyncio.TaskGroup() as group:
            group.create_task(mirror.keep(), name="mirror")
            group.create_task(parts.host_loop.run(), name="machines")
            group.create_task(run_private_network(config, parts), name="network")
            await wait_admitted(mirror, credentials.folder, parts.peers.ask_whether_admitted)
            group.create_task(keep_identity(kv, mirror, credentials, clock), name="identity")
            group.create_task(keep_membership(kv, host), name="membership")
            group.create_task(parts.repairs.watch_silences(), name="silences")
            group.create_task(parts.volume_keeper.keep_volumes(), name="volumes")
            group.create_task(parts.volume_copier.keep_copying(), name="copies")
            group.create_task(parts.volume_mover.keep_moving(), name="moves")
            group.create_task(parts.volume_verifier.keep_verifying(), name="verifications")
            group.create_task(keep_leading(host, parts), name="leader")
            if host.http_port:
                edge = run_edge(host, mirror, Path(config.data_dir), clock)
                group.create_task(edge, name="edge")
            if parts.context.images is not None:
                pruning = keep_images_pruned(mirror, parts.context.images, clock)
                group.create_task(pruning, name="images")
            group.create_task(serve(parts.context, credentials), name="api")
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
        figures = None
        if config.dns_port:
            from flyd.network.dns import DnsServer  # dnspython costs memory that only such hosts need

            clock, entropy = parts.context.clock, parts.context.entropy
            dns = DnsServer(host, mirror, parts.kv, clock=clock, entropy=entropy, port=config.dns_port)
            group.create_task(dns.serve(), name="dns")
            figures = dns.figures
        if config.metrics_port:
            group.create_task(metrics.serve(host, mirror, config.metrics_port, figures), name="metrics")


async def keep_leading(host: Host, parts: Parts) -> None:
    """Campaign for ever; while this host leads, do what one host does for all, under the term's guard."""

    async def work(held: Leadership) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(parts.deployer.keep_deploying(held.guard), name="deployer")
            group.create_task(parts.recorder.keep_recording(held.guard), name="recorder")
            group.create_task(parts.repairs.keep_repairing(held.guard), name="repairs")
            group.create_task(parts.volume_rescuer.keep_rescuing(held.guard), name="rescues")

    await lead(parts.kv, CONTROLLER, host.name, work)


async def serve(context: ApiContext, credentials: Credentials) -> None:
    """Answer this host's API until cancelled."""
    server = build_server(context, credentials)
    await server.start()
    log.info("flyd.serves", host=context.host.name, api=context.host.api_address)
    try:
        await server.wait_for_termination()
    finally:
        await server.stop(STOP_GRACE_S)


def _ignore(number: int, frame: FrameType | None) -> None:
    """A handler of ours: unlike SIG_IGN it is not inherited by what flyd starts."""


async def run_until_signalled(config: HostConfig) -> None:
    """Run until SIGTERM or SIGINT; any other end of a loop ends flyd with its error."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # by nohup: flyd ignores it, machines must not
        signal.signal(signal.SIGHUP, _ignore)
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
    use_few_arenas()
    prefer_own_programs()
    try:
        config = read_config(config_path)
        lock = lock_data_dir(Path(config.data_dir))
        check_not_expelled(identity_folder(Path(config.data_dir)))
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
