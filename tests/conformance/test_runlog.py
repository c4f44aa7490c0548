"""One suite for ports.RunLog, passed by the fake in memory and by SQLite; then what a file can suffer."""

from __future__ import annotations

import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from flyd.errors import InvariantBroken, Refused, Unavailable
from flyd.model import RunEvent
from flyd.ports import KEPT_ENDED_RUNS, RunLog
from flyd.store.memory import MemoryRunLog
from flyd.store.runlog import SqliteRunLog

APPENDER = """
import sys
from flyd.model import RunEvent
from flyd.store.runlog import SqliteRunLog
log = SqliteRunLog(sys.argv[1])
n = 0
while True:
    log.append(RunEvent(run_id="r", sequence=n, kind="begin" if n == 0 else "done", step=str(n)))
    log.put_record("counter", str(n).encode())
    print(n, flush=True)
    n += 1
"""


@pytest.fixture(params=["memory", "sqlite"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[RunLog]:
    if request.param == "memory":
        yield MemoryRunLog()
    else:
        sqlite = SqliteRunLog(tmp_path / "runs.db")
        yield sqlite
        sqlite.close()


def event(run_id: str, sequence: int, kind: str = "done") -> RunEvent:
    return RunEvent(
        run_id=run_id, sequence=sequence, kind=kind, step="s", data={"n": sequence, "x": [1, None]}
    )


def test_events_come_back_in_order(log: RunLog) -> None:
    written = [event("a", 0, "begin"), event("a", 1), event("a", 2, "failed")]
    for e in written:
        log.append(e)
        log.append(RunEvent(run_id="b", sequence=e.sequence, kind="done"))
    assert log.events("a") == tuple(written)
    assert log.events("never") == ()


@pytest.mark.parametrize("sequence", [0, 1, 3, -1])
def test_a_wrong_sequence_is_refused_and_changes_nothing(log: RunLog, sequence: int) -> None:
    log.append(event("a", 0, "begin"))
    log.append(event("a", 1))
    with pytest.raises(InvariantBroken, match="run a"):
        log.append(event("a", sequence))
    assert [e.sequence for e in log.events("a")] == [0, 1]
    log.append(event("a", 2))


def test_a_run_begins_at_zero(log: RunLog) -> None:
    with pytest.raises(InvariantBroken):
        log.append(event("a", 1, "begin"))
    assert log.open_runs() == ()


def test_open_runs_are_oldest_first(log: RunLog) -> None:
    for run_id in ("z", "m", "a"):
        log.append(event(run_id, 0, "begin"))
    log.append(event("z", 1))
    assert log.open_runs() == ("z", "m", "a")
    log.append(event("m", 1, "end"))
    assert log.open_runs() == ("z", "a")


def test_only_the_newest_ended_runs_are_kept(log: RunLog) -> None:
    log.append(event("open", 0, "begin"))
    for number in range(KEPT_ENDED_RUNS + 2):
        log.append(event(f"run-{number}", 0, "begin"))
        log.append(event(f"run-{number}", 1, "end"))
    assert log.events("run-0") == log.events("run-1") == ()
    assert len(log.events("run-2")) == len(log.events(f"run-{KEPT_ENDED_RUNS + 1}")) == 2
    assert log.open_runs() == ("open",)


def test_records(log: RunLog) -> None:
    for key in ("machine/b", "machine/a", "machine%", "other", "machine/é"):
        log.put_record(key, key.encode())
    log.put_record("machine/a", b"\x00new")
    assert list(log.records("machine/").items()) == [
        ("machine/a", b"\x00new"),
        ("machine/b", b"machine/b"),
        ("machine/é", "machine/é".encode()),
    ]
    log.delete_record("machine/a")
    log.delete_record("machine/a")
    assert list(log.records("")) == ["machine%", "machine/b", "machine/é", "other"]


def test_killed_at_any_moment_keeps_every_acknowledged_event(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    acknowledged = 0
    for count in (1, 7, 40):
        path.unlink(missing_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-c", APPENDER, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        with process, process.stdout as lines:
            for line in lines:
                acknowledged = int(line)
                if acknowledged == count:
                    process.kill()
        log = SqliteRunLog(path)
        steps = [e.step for e in log.events("r")]
        assert steps == [str(n) for n in range(len(steps))]
        assert len(steps) in (acknowledged + 1, acknowledged + 2)
        assert int(log.records("counter")["counter"]) >= acknowledged
        assert log.open_runs() == ("r",)
        log.append(event("r", len(steps), "end"))
        log.close()
        for extra in ("-wal", "-shm"):
            Path(f"{path}{extra}").unlink(missing_ok=True)


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    first = SqliteRunLog(tmp_path / "runs.db")
    first.append(event("a", 0, "begin"))
    with pytest.raises(Unavailable) as refused:
        SqliteRunLog(tmp_path / "runs.db")
    assert "another flyd" in refused.value.hint
    first.close()


def test_a_damaged_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    log = SqliteRunLog(path)
    for n in range(300):
        log.append(event("a", n, "begin" if n == 0 else "done"))
    log.close()
    data = path.read_bytes()
    for damaged in (b"not a database at all" * 100, data[:4096] + b"\xff" * 4096 + data[8192:]):
        path.write_bytes(damaged)
        with pytest.raises(InvariantBroken, match="damaged") as said:
            SqliteRunLog(path)
        assert str(path) in said.value.message
        assert said.value.hint


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    SqliteRunLog(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(Refused, match="99"):
        SqliteRunLog(path)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as said:
        SqliteRunLog(tmp_path / "absent" / "runs.db")
    assert "directory" in said.value.hint


FILLER = """
import resource, signal, sys
from flyd.errors import Unavailable
from flyd.store.runlog import SqliteRunLog
log = SqliteRunLog(sys.argv[1])
log.put_record("before", b"kept")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
try:
    log.put_record("big", bytes(1_000_000))
except Unavailable as e:
    print(e.hint)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.put_record("after", b"works again")
print(sorted(log.records("")))
"""


def test_a_disk_without_space(tmp_path: Path) -> None:
    """A file size limit stands in for a full disk: the same failed write, without a mount."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    path = tmp_path / "runs.db"
    done = subprocess.run(
        [sys.executable, "-c", FILLER, str(path)], capture_output=True, text=True, check=True, timeout=30
    )
    hint, records = done.stdout.splitlines()
    assert "full" in hint
    assert records == "['after', 'before']"
    copy = tmp_path / "copy.db"
    shutil.copy(path, copy)
    assert sorted(SqliteRunLog(copy).records("")) == ["after", "before"]
