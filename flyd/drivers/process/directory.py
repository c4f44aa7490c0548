"""One machine's directory under the process driver: what is on disk, and what that says.

    <root>/<machine id>/
        spec.json      what was created; written last, so without it there is no machine
        work/          a private copy of the source tree; mounts are links in it; ephemeral
        log/           output.log and output.log.1, each line after its time; shim.err
        run/lock       held by the machine's shim for as long as it lives
        run/pid.json   the newest run: which shim, which process (flyd/drivers/process/shim.py)
        run/exit.json  how a run ended; counts only for the run that it names
        run/stop.json  the run that somebody asked to stop

Invariants: a crash at any instruction leaves either no spec.json (create begins anew) or a
complete machine. Only a shim, or who holds run/lock, writes exit.json. The work directory is as
ephemeral as a container's root file system: made anew for a new instance and after a reboot;
what must last belongs on a volume.

All calls block; the driver calls the slow ones from a thread. Nothing here starts or signals.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TypeVar

import msgspec

from flyd.drivers.durable import remove_file, sync_directory, write_file
from flyd.drivers.process import proc
from flyd.errors import InvalidInput, NotFound, Unavailable
from flyd.model import ExitStatus, MachineSpec, Observed, Value, decode, encode

T = TypeVar("T")

Identity = tuple[int, int, list[int]]  # uid, gid, supplementary groups


class Created(Value, frozen=True, kw_only=True):
    """spec.json: what the directory was made for, and in which boot."""

    spec: MachineSpec
    boot_id: str


class Run(Value, frozen=True, kw_only=True):
    """Which run: the shim that watches over it is a process of one boot."""

    boot_id: str
    shim: int
    shim_start: int

    def key(self) -> tuple[str, int, int]:
        """What exit.json and stop.json name a run by."""
        return self.boot_id, self.shim, self.shim_start


class RunRecord(Run, frozen=True, kw_only=True):
    """run/pid.json."""

    pid: int
    pid_start: int
    instance_id: str
    output: str
    started_at_s: float


class ExitRecord(Run, frozen=True, kw_only=True):
    """run/exit.json."""

    status: ExitStatus


def identity_of(user: str) -> Identity | None:
    """Whom to become for `user`; None where there is no user given or flyd may not change it."""
    if not user or os.geteuid() != 0:
        return None
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise InvalidInput(
            f"this host has no user {user!r}", hint=f"add it (useradd --system {user}) or name another"
        ) from None
    return entry.pw_uid, entry.pw_gid, os.getgrouplist(user, entry.pw_gid)


def check_spec(spec: MachineSpec) -> None:
    """Raise InvalidInput for what can never be run as a process."""
    texts = (*spec.command, *spec.env, *spec.env.values())
    if not spec.command or not spec.command[0]:
        raise InvalidInput(
            f"machine {spec.machine_id} has no command to run", hint="set [processes] or cmd in fly.toml"
        )
    if any("\0" in text for text in texts):
        raise InvalidInput(f"a NUL byte in the command or environment of machine {spec.machine_id}")


class MachineDirectory:
    """The files of one machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.work = path / "work"
        self.log = path / "log" / "output.log"
        self._run = path / "run"

    # ------------------------------------------------------------------- what is there

    def created(self) -> Created | None:
        """What was created here; None if nothing was (or not to its end)."""
        try:
            return decode((self.path / "spec.json").read_bytes(), Created)
        except FileNotFoundError:
            return None

    def newest_run(self) -> RunRecord | None:
        """The newest run that began, ended or not."""
        return self._read("pid.json", RunRecord)

    def exit_of(self, run: RunRecord) -> ExitStatus | None:
        """How that run ended, as far as is written."""
        record = self._read("exit.json", ExitRecord)
        if record is None or record.key() != run.key():
            return None
        stop = self._read("stop.json", Run)
        requested = stop is not None and stop.key() == run.key()
        return msgspec.structs.replace(record.status, requested=requested)

    def alive(self, run: RunRecord) -> bool:
        """Whether that run's shim lives."""
        return run.boot_id == proc.boot_id() and proc.start_ticks(run.shim) == run.shim_start

    def observe(self) -> Observed | None:
        """The machine as its files and the kernel say; None if there is no machine."""
        created = self.created()
        if created is None:
            return None
        spec, run = created.spec, self.newest_run()
        if run is None:
            return Observed(machine_id=spec.machine_id, instance_id=spec.instance_id, running=False)
        status = self.exit_of(run)
        running = status is None and self.alive(run)
        return Observed(
            machine_id=spec.machine_id,
            instance_id=run.instance_id if running else spec.instance_id,
            running=running,
            pid=run.pid if running else 0,
            started_at_s=run.started_at_s if running else 0.0,
            exit=status if run.instance_id == spec.instance_id else None,
        )

    def _read(self, name: str, kind: type[T]) -> T | None:
        try:
            return decode((self._run / name).read_bytes(), kind)
        except (FileNotFoundError, NotADirectoryError):
            return None

    # ------------------------------------------------------------------- making

    def prepare(self, spec: MachineSpec) -> None:
        """Make all that a start of `spec` needs; changes nothing that is already so."""
        try:
            self._prepare(spec)
        except OSError as error:
            raise Unavailable(
                f"cannot make the files of machine {spec.machine_id} in {self.path}: {error}",
                hint="is the host's disk full? (df -h; df -i)",
            ) from error

    def _prepare(self, spec: MachineSpec) -> None:
        source = Path(spec.source_path) if spec.source_path else None
        if source is not None and not source.is_dir():
            raise NotFound(
                f"the source tree of machine {spec.machine_id} is not at {source}",
                hint="deploy again: the host fetches the release's tree before it creates the machine",
            )
        identity = identity_of(spec.user)
        wanted = Created(spec=spec, boot_id=proc.boot_id())
        there = self.created()
        if there is None or _tree_of(there) != _tree_of(wanted):
            self._build(source, identity)
        for host_path, machine_path in spec.mounts:
            self._mount(Path(host_path), machine_path, identity)
        if there != wanted:
            write_file(self.path / "spec.json", encode(wanted))

    def _build(self, source: Path | None, identity: Identity | None) -> None:
        remove_file(self.path / "spec.json")
        for directory, mode in ((self.path, 0o711), (self._run, 0o700), (self.log.parent, 0o700)):
            directory.mkdir(mode=mode, parents=True, exist_ok=True)
            directory.chmod(mode)
        fresh = self.path / "work.new"
        _remove_tree(fresh)
        if source is None:
            fresh.mkdir()
        else:
            shutil.copytree(source, fresh, symlinks=True)
        fresh.chmod(0o755)
        if identity is not None:
            _chown_tree(fresh, identity)
        _remove_tree(self.work)
        os.replace(fresh, self.work)
        sync_directory(self.path)
        sync_directory(self.path.parent)

    def _mount(self, host_path: Path, machine_path: str, identity: Identity | None) -> None:
        """A link where the machine expects its volume; it hides (removes the copy of) what was there."""
        parts = PurePosixPath(machine_path.lstrip("/")).parts
        if not parts or ".." in parts:
            raise InvalidInput(
                f"a volume cannot be mounted at {machine_path!r}", hint="give an absolute path such as /data"
            )
        if not host_path.is_dir():
            raise NotFound(f"there is no volume at {host_path}", hint="it must be attached before the start")
        if identity is not None:
            os.chown(host_path, identity[0], identity[1])
        link = self.work.joinpath(*parts)
        if link.is_symlink() and os.readlink(link) == str(host_path):
            return
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.parent.resolve().is_relative_to(self.work.resolve()):
            raise InvalidInput(
                f"{machine_path!r} leads out of the machine's directory by a link in its source"
            )
        _remove_tree(link)
        link.symlink_to(host_path)

    def remove(self, trash: Path) -> None:
        """Make the machine vanish at once, then delete its files at leisure."""
        if self.path.exists():
            _remove_tree(trash)
            os.replace(self.path, trash)
            sync_directory(self.path.parent)
        _remove_tree(trash)

    # ------------------------------------------------------------------- runs

    def mark_stop(self, run: RunRecord) -> None:
        """Remember that this run's end was asked for."""
        record = Run(boot_id=run.boot_id, shim=run.shim, shim_start=run.shim_start)
        write_file(self._run / "stop.json", encode(record))

    def write_exit(self, run: RunRecord, status: ExitStatus) -> None:
        """Say how a run ended whose shim could not; only with `lock`."""
        record = ExitRecord(boot_id=run.boot_id, shim=run.shim, shim_start=run.shim_start, status=status)
        write_file(self._run / "exit.json", encode(record))

    @contextmanager
    def lock(self) -> Generator[bool, None, None]:
        """Keep every shim from starting here; answers False if one holds the lock."""
        try:
            fd = os.open(self._run / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            yield True  # no directory to start in
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
        except BlockingIOError:
            yield False
        finally:
            os.close(fd)


def _tree_of(created: Created) -> tuple[str, str, str]:
    return created.spec.instance_id, created.spec.source_path, created.boot_id


def _remove_tree(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _chown_tree(top: Path, identity: Identity) -> None:
    os.chown(top, identity[0], identity[1])
    for directory, names, files in os.walk(top):
        for name in (*names, *files):
            os.chown(os.path.join(directory, name), identity[0], identity[1], follow_symlinks=False)
