"""A host's data disk on a cluster of containers: a file of its size with a file system of its own in it.

So a host's disk can be full without this machine's being so, and a host can use no more than it was
given. The file is sparse: it takes what is written to it and gives back what is deleted. It is mounted
below the cluster's folder, and the container gets that. Mounting makes a loop device that the
kernel takes away with the mount: nothing of it outlasts a reboot, and no device has to be remembered.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from flyd.errors import Unavailable

TOOLS = ("mkfs.ext4", "mount", "umount", "losetup")
LOOP_CONTROL = Path("/dev/loop-control")


def why_none() -> str:
    """Why no such disks can be made here, "" if they can."""
    if os.geteuid() != 0:
        return "mounting one needs root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"this machine has no {', '.join(missing)}"
    return "" if LOOP_CONTROL.exists() else "this machine's kernel has no loop devices"


def image(host_folder: Path) -> Path:
    """The file that is a host's disk."""
    return host_folder / "disk.ext4"


def mount_point(host_folder: Path) -> Path:
    """Where the disk is seen on this machine."""
    return host_folder / "disk"


def make(host_folder: Path, size_gb: int) -> Path:
    """Make a host's disk and mount it; where it is. Raises Unavailable with what the tools said."""
    file = image(host_folder)
    with file.open("xb") as made:
        made.truncate(size_gb << 30)
    _run("mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", str(file))
    return mount(host_folder)


def mount(host_folder: Path) -> Path:
    """See that a host's disk is mounted, as it is not after a reboot; where."""
    at = mount_point(host_folder)
    at.mkdir(exist_ok=True)
    if not at.is_mount():
        # discard: what is deleted is given back; noinit_itable: nothing is written that nobody asked for.
        _run("mount", "-t", "ext4", "-o", "loop,discard,noinit_itable", str(image(host_folder)), str(at))
    return at


def release(cluster_folder: Path) -> None:
    """Unmount the disks of a cluster, whatever state it is in; their files can go then."""
    for at in sorted(cluster_folder.glob("*/disk")):
        while at.is_mount():
            _run("umount", str(at))
    for file in sorted(cluster_folder.glob("*/disk.ext4")):
        for device in _loops(file):  # of a mount that was begun and not finished
            # It may have gone by itself meanwhile, or go when the kernel lets go of the mount.
            subprocess.run(("losetup", "--detach", device), capture_output=True, check=False)


def _loops(file: Path) -> list[str]:
    return loop_devices(_run("losetup", "--noheadings", "--output", "NAME", "--associated", str(file)))


def loop_devices(listed: str) -> list[str]:
    """The devices in losetup's list."""
    return [line.strip() for line in listed.splitlines() if line.strip()]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Unavailable(
            f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}",
            hint="Is this machine's disk full (df -h)? Are all its loop devices in use (losetup)?",
        )
    return done.stdout
