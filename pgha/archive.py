"""The archive's two commands, run by Postgres itself: a segment goes in, a segment comes out (I12).

Going in: copied beside, made durable, then named by a link, which never replaces anything. So however many
members archive the same segment (all do: archive_mode is `always`, so what a primary had not archived when
it died its replicas have), and whenever one of them dies, a name has one content for ever. The same content
again is fine; another is refused, Postgres logs it, keeps the segment and tries again. A timeline is written
by one primary only (it is the epoch), so that only happens if two clusters were given one directory.

Plain shell (coreutils, diffutils): Postgres' user may not be allowed to run our Python. Pure.
"""

from __future__ import annotations

import shlex
from pathlib import Path

PUSH = """\
[ -e {there} ] || {{ cp %p {partial} && sync {partial} && ln {partial} {there}; rm -f {partial}; }}; \
cmp %p {there} && sync {folder}"""


def push_command(wal_dir: Path, node: str) -> str:
    """For archive_command: succeeds once the segment is durable under its name."""
    return PUSH.format(
        there=_file(wal_dir, "%f"), partial=_file(wal_dir, f".%f.{node}.") + "$$", folder=_file(wal_dir, "")
    )


def fetch_command(wal_dir: Path) -> str:
    """For restore_command: fails for what is not there; that is how Postgres finds the end."""
    there = _file(wal_dir, "%f")
    return f"[ -e {there} ] && cp {there} %p"


def _file(folder: Path, name: str) -> str:
    """A word of the shell; Postgres replaces %f and %p, and %% by %."""
    return shlex.quote(str(folder).replace("%", "%%") + "/") + name
