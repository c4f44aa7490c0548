"""The clusters of this machine: where each keeps its files, what it looks like, what kind it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from flyd.cluster.layout import Layout, LocalHost
from flyd.errors import Conflict, NotFound
from flyd.model import Value, decode, encode

STATE_FILE = "cluster.json"

Progress = Callable[[str], None]


class HostProcesses(Value, frozen=True, kw_only=True):
    """What runs of one host."""

    name: str
    region: str
    etcd_pid: int
    flyd_pid: int
    processes: int


class Cluster(Protocol):
    """A cluster on this machine, whatever its hosts are made of."""

    plan: Layout
    root: Path

    def up(self, progress: Progress) -> None:
        """Start everything and wait until each flyd answers; on failure nothing is left."""
        ...

    def down(self) -> int:
        """End all that belongs to the cluster and remove its files; how many processes there were."""
        ...

    def kill_host(self, host: LocalHost) -> int:
        """Lose a host as by a power cut; how many processes there were."""
        ...

    def start_host(self, host: LocalHost) -> None:
        """Bring a lost host back, with the disks it had."""
        ...

    def pause_host(self, host: LocalHost) -> None:
        """Freeze everything on a host."""
        ...

    def resume_host(self, host: LocalHost) -> None:
        """Let a frozen host go on."""
        ...

    def partition(self, host: LocalHost) -> None:
        """Cut a host off from all others; it lives on alone."""
        ...

    def heal(self, host: LocalHost) -> None:
        """Connect a host again."""
        ...

    def kill_flyd(self, host: LocalHost) -> None:
        """SIGKILL a host's flyd and nothing else."""
        ...

    def status(self) -> list[HostProcesses]:
        """What runs of each host."""
        ...


def home() -> Path:
    """Where clusters live: FLYD_HOME, else /var/lib/flyd for root, else the user's data folder.

    Not below /root, because Postgres runs as another user and must get to its files.
    """
    if chosen := os.environ.get("FLYD_HOME"):
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/var/lib/flyd")
    data = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local/share")
    return Path(data) / "flyd"


def folder(name: str) -> Path:
    """Where one cluster keeps its files."""
    return home() / "clusters" / name


def names() -> list[str]:
    """The clusters that exist on this machine."""
    return sorted(path.parent.name for path in (home() / "clusters").glob(f"*/{STATE_FILE}"))


def refuse_second(name: str) -> None:
    """Raise Conflict if there is a cluster of that name."""
    if (folder(name) / STATE_FILE).exists():
        raise Conflict(
            f"the local cluster {name!r} exists already",
            hint="`fly cluster status` shows it, `fly cluster down` removes it.",
        )


def remember(plan: Layout) -> Path:
    """Write a new cluster's layout down; Conflict if there is one of that name. Its folder."""
    refuse_second(plan.name)
    root = folder(plan.name)
    root.mkdir(parents=True)
    (root / STATE_FILE).write_bytes(encode(plan))
    return root


def recall(name: str) -> Layout:
    """The layout of a cluster that exists."""
    try:
        return decode((folder(name) / STATE_FILE).read_bytes(), Layout)
    except FileNotFoundError:
        raise NotFound(
            f"there is no local cluster {name!r}",
            hint=f"`fly cluster up` makes one. There are: {', '.join(names()) or 'none'}.",
        ) from None


def user_folder(name: str) -> Path:
    """The identity that commands on this machine show to a cluster."""
    return folder(name) / "user"
