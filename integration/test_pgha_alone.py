"""docs/pgha.md is typed in as it stands: three members beside one etcd, without anything else of flyd."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from pgha.binaries import find_binaries
from pgha.process_table import send, server_pids
from pgha.processes import unprivileged

DOCUMENT = Path(__file__).parent.parent / "docs" / "pgha.md"
TIMEOUT_S = 120.0
GONE_S = 20.0

pytestmark = pytest.mark.timeout(TIMEOUT_S + GONE_S + 10)


def block(kind: str) -> str:
    """The document's first block of this kind."""
    found = re.search(rf"```{kind}\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert found is not None
    return found.group(1)


@pytest.fixture
def room() -> Generator[Path]:
    """A folder that Postgres' user can enter."""
    with tempfile.TemporaryDirectory(prefix="pgha-alone-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def environment(room: Path) -> dict[str, str]:
    """As in a shell where pgha, etcd and psql are on PATH and nothing is set."""
    programs = find_binaries("", unprivileged(), room)
    path = f"{Path(sys.executable).parent}:{programs}:{os.environ['PATH']}"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "FLY"))}
    return clean | {"PATH": path, "TMPDIR": str(room)}


@contextlib.contextmanager
def typed(room: Path, script: str) -> Generator[str]:
    """What a shell printed that was given these lines; what runs in the background ends with the block."""
    with (room / "shell.err").open("w") as errors:
        shell = subprocess.Popen(
            ["bash", "-ec", script],
            cwd=room,
            env=environment(room),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    try:
        printed, _ = shell.communicate(timeout=TIMEOUT_S)
        assert shell.returncode == 0, printed + told(room)
        yield printed
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
        deadline_s = time.monotonic() + GONE_S
        while pids := [pid for data in room.glob("data/*/pgdata") for pid in server_pids(data)]:
            assert time.monotonic() < deadline_s, f"Postgres outlives its agent: {pids}"
            for pid in pids:
                send(pid, signal.SIGKILL)
            time.sleep(0.01)


def told(room: Path) -> str:
    """The ends of all logs."""
    logs = (*sorted(room.glob("*.log")), room / "shell.err")
    return "".join(f"\n== {log.name}\n{log.read_text()[-3000:]}" for log in logs if log.exists())


def test_the_document_works_as_typed(room: Path) -> None:
    (room / "pgha.toml").write_text(block("toml"))
    lines = [line[2:] for line in block("console").splitlines() if line.startswith("$ ")]
    lines.append("pgha --config pgha.toml status --json")
    lines.append("pgha --config pgha.toml switchover --to orders-9 || echo code $?")
    with typed(room, "\n".join(lines)) as printed:
        *_, status, code = printed.strip().splitlines()
        seen = json.loads(status)
        assert (seen["serving"], seen["lease"], seen["paused"]) == (True, "renewed", None)
        assert seen["epoch"] == 3, "one switchover after the first term"
        assert {member["node"] for member in seen["members"]} == {"orders-1", "orders-2", "orders-3"}
        assert "(2 rows)" in printed
        assert re.search(r"^orders-[23] is primary, epoch 3$", printed, re.MULTILINE)
        assert "paused since" in printed
        assert "moving cables" in printed
        assert code == "code 3"
        assert "orders-9 is no member of orders" in told(room)
