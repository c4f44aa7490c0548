"""The btrfs pool that a host's volumes live in: made on a free disk or in a file, checked, mounted.

Called by flyd's start before anything else touches the volumes, by the tests and the benchmark. All of
it can be repeated: what is there already is checked and left. A file gets all its blocks at once: were
it sparse, a full disk below would be an I/O error to every volume at the same time.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from flyd.errors import InvalidInput, Refused, Unavailable
from volumes.btrfs import ALL, keep_reserve
from volumes.contract import GB
from volumes.files import run

LABEL = "flyd-volumes"
TOOLS = {"btrfs": "btrfs-progs", "mkfs.btrfs": "btrfs-progs", "mount": "mount", "blkid": "util-linux"}
MIN_FILE_GB = 1
USABLE_PART = 0.9


def why_none() -> str:
    """Why no pool can be opened here, "" if one can."""
    if os.geteuid() != 0:
        return "mounting btrfs needs root"
    if missing := sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None}):
        return f"this host has no {', '.join(missing)}: apt-get install {' '.join(missing)}"
    with open("/proc/filesystems") as known:
        if "btrfs" in known.read() or Path("/lib/modules", os.uname().release).exists():
            return ""
    return "this host's kernel has no btrfs"


def open_pool(mount_point: Path, disk: Path, file_gb: int = 0) -> None:
    """Have the pool mounted. `disk`: a block device without contents, or a file, made with `file_gb`.

    Refused, with nothing changed, where it can not be had: no root, no tools, a disk that holds
    something else, volumes of another back end at the mount point.
    """
    if reason := why_none():
        raise Refused(
            f"volumes on btrfs: {reason}",
            hint='`volumes = "directory"` in flyd.toml needs neither, and limits nothing.',
        )
    mount_point.mkdir(mode=0o711, parents=True, exist_ok=True)
    if not is_mounted(mount_point):
        if any(mount_point.iterdir()):
            raise Refused(
                f"{mount_point} holds files already: a pool mounted there would hide them",
                hint='They may be volumes of `volumes = "directory"`: move them away first.',
            )
        _have_file_system(disk, file_gb)
        loop = "loop," if not _is_device(disk) else ""
        run("mount", "-t", "btrfs", "-o", f"{loop}noatime,nodiscard", str(disk), str(mount_point))
    run("btrfs", "quota", "enable", str(mount_point))
    mount_point.chmod(0o711)
    if f"\n{ALL} " not in run("btrfs", "qgroup", "show", "--raw", str(mount_point)):
        run("btrfs", "qgroup", "create", ALL, str(mount_point))
    if _miscounted(mount_point):  # a count takes minutes where there is much
        run("btrfs", "quota", "rescan", "-w", str(mount_point))
    keep_reserve(mount_point)


def close_pool(mount_point: Path) -> None:
    """Unmount the pool, and with it its loop device; absent is no error."""
    if is_mounted(mount_point):
        run("umount", str(mount_point))


def capacity_gb(mount_point: Path) -> int:
    """How many GB of volumes a pool can be promised to hold: all but what btrfs needs for itself."""
    disk = os.statvfs(mount_point)
    return int(disk.f_blocks * disk.f_frsize * USABLE_PART / GB)


def is_mounted(mount_point: Path) -> bool:
    """Whether a btrfs is mounted there; Refused if something else is."""
    at = str(mount_point.resolve())
    with open("/proc/self/mountinfo") as mounts:
        kinds = [mounted_kind(line) for line in mounts if line.split()[4] == at]
    if kinds and kinds[-1] != "btrfs":
        raise Refused(f"{at} has {kinds[-1]} mounted, not btrfs", hint=f"umount {at}")
    return bool(kinds)


def mounted_kind(line: str) -> str:
    """The file system of one line of mountinfo."""
    return line.split(" - ")[1].split()[0]


def _have_file_system(disk: Path, file_gb: int) -> None:
    if disk.exists():
        if not _is_device(disk) and not stat.S_ISREG(disk.lstat().st_mode):
            raise InvalidInput(
                f"{disk} is neither a disk nor a file", hint="Name a block device, or a new file."
            )
        kind = _tag(disk, "TYPE")
        if kind == "btrfs" and _tag(disk, "LABEL") == LABEL:
            return
        if kind or not _is_device(disk):
            raise Refused(
                f"{disk} holds {kind or 'something'} that is not a pool of flyd's",
                hint="Name another disk. If nothing on it is needed: wipefs --all.",
            )
        _make_file_system(disk)
        return
    if disk.parent == Path("/dev"):
        raise InvalidInput(f"there is no disk {disk}", hint="`lsblk` shows the disks.")
    if file_gb < MIN_FILE_GB:
        raise InvalidInput(f"a pool of {file_gb} GB can not be made", hint=f"At least {MIN_FILE_GB} GB.")
    fresh = disk.with_name(f".new-{disk.name}")
    fresh.unlink(missing_ok=True)
    try:
        with open(fresh, "xb") as file:
            os.posix_fallocate(file.fileno(), 0, file_gb * GB)
        _make_file_system(fresh)
    except OSError as error:
        fresh.unlink()
        raise Unavailable(
            f"{disk}: {error.strerror} while {file_gb} GB were laid aside", hint="`df -h` shows what is free."
        ) from error
    os.replace(fresh, disk)


def _make_file_system(disk: Path) -> None:
    run("mkfs.btrfs", "--quiet", "--nodiscard", "--label", LABEL, str(disk))


def _tag(disk: Path, tag: str) -> str:
    """What blkid finds on it, "" for nothing."""
    try:
        return run("blkid", "-p", "-o", "value", "-s", tag, str(disk)).strip()
    except Unavailable:  # its code for "nothing found"
        return ""


def _miscounted(mount_point: Path) -> bool:
    """Whether the kernel says that its quota groups are not to be trusted (before 6.1 it does not say)."""
    uuid = run("findmnt", "--noheadings", "--output", "UUID", str(mount_point)).strip()
    told = Path(f"/sys/fs/btrfs/{uuid}/qgroups/inconsistent")
    return not told.exists() or told.read_text().strip() != "0"


def _is_device(disk: Path) -> bool:
    return disk.exists() and stat.S_ISBLK(disk.stat().st_mode)
