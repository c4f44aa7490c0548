"""The btrfs pools of a cluster on this machine: whether they can be, and their mounts' end.

Hosts of processes have each their own pool below the cluster's folder, made and mounted by their flyd. A
container can not make a loop device, so its host's pool is made and mounted here, and the container gets it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from flyd.cluster.layout import Layout
from flyd.errors import Refused
from volumes.pool import close_pool, open_pool, why_none


def check(folder: Path, plan: Layout) -> None:
    """Refuse a cluster whose pools can not be made on this machine."""
    if reason := why_none():
        raise Refused(
            f"volumes on btrfs: {reason}", hint="Leave out --volumes btrfs: directories need nothing."
        )
    above = next(p for p in (folder, *folder.parents) if p.exists())
    free_gb = shutil.disk_usage(above).free >> 30
    wanted_gb = sum(host.capacity.disk_gb for host in plan.hosts)
    if wanted_gb >= free_gb:
        raise Refused(
            f"pools of {wanted_gb} GB in all are laid aside at once, and {above} has {free_gb} GB free",
            hint=f"--disk {max(free_gb // (2 * len(plan.hosts)), 1)} takes half of it.",
        )


def make(host_folder: Path, size_gb: int) -> Path:
    """A container host's pool, mounted; where. One that is there is only mounted again."""
    at = host_folder / "volumes"
    open_pool(at, host_folder / "volumes.btrfs", size_gb)
    return at


def release(cluster_folder: Path) -> None:
    """Unmount every pool of a cluster; their files can go then."""
    for at in (*cluster_folder.glob("*/volumes"), *cluster_folder.glob("*/data/volumes")):
        if at.is_mount():
            close_pool(at)
