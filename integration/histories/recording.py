"""One history: clients in places, what they wrote down, and what the checker says of it.

A place is where clients run and how they reach the database: this machine, or a host that may die. Every
function here waits; an event loop calls them by `asyncio.to_thread`.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from integration.cluster import wait_for
from integration.histories import edn
from integration.histories.checker import Report, check
from integration.histories.model import Append, Event, Transaction, transactions
from integration.histories.nemesis import Harm, counted, pauses

ROOT = Path(__file__).parent.parent.parent
KEPT = ROOT / "build" / "histories"  # each test's newest
END_S = 30.0  # for a client's last transaction
ACK_S = 60.0


class Place(Protocol):
    """Where a client may run."""

    @property
    def uri(self) -> str:
        """The database, as seen from there."""
        ...

    def command(self, *words: str) -> tuple[str, ...]:
        """What runs a command there, in this checkout, with the caller's standard input and output."""
        ...

    def file(self, name: str) -> str:
        """A path there that outlives what may happen to the place."""
        ...

    def text(self, file: str) -> str:
        """What is in it."""
        ...


@dataclass(frozen=True)
class Here:
    """This machine."""

    uri: str
    folder: Path

    def command(self, *words: str) -> tuple[str, ...]:
        """As it is."""
        return words

    def file(self, name: str) -> str:
        """In the history's folder."""
        return str(self.folder / name)

    def text(self, file: str) -> str:
        """Read it."""
        return Path(file).read_text()


class Launch:
    """A client at work in a place."""

    def __init__(self, place: Place, number: int, said: Path, words: Iterable[str]) -> None:
        self.place = place
        self.file = place.file(f"launch-{number}.edn")
        self.lost = False
        self._said = said
        client = (sys.executable, "-m", "integration.histories.client", place.uri, self.file)
        with said.open("w") as out:
            self._process = subprocess.Popen(
                place.command(*client, *words), stdin=subprocess.PIPE, stdout=out, cwd=ROOT
            )

    def acked_ns(self) -> int:
        """When an append was last acknowledged; 0 if none was."""
        lines = self._said.read_text().split("\n")[:-1]
        return int(lines[-1]) if lines else 0

    def end(self) -> None:
        """Let it finish its transactions; if its place died under it, it has ended already."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(END_S)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait(END_S)

    def at_work(self) -> bool:
        """True; AssertionError if it ended, which nobody asked of it."""
        assert self._process.poll() is None, f"the client of {self.place} ended with {self.code}"
        return True

    @property
    def code(self) -> int | None:
        """How it ended."""
        return self._process.returncode


class Recording:
    """The clients of one history and its folder."""

    def __init__(self, name: str, seed: int, isolation: str = "SERIALIZABLE") -> None:
        self.seed = seed
        self.table = f"lists_{secrets.token_hex(4)}"
        self.folder = KEPT / name
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.iterdir():
            old.unlink()
        self._isolation = isolation
        self._launches: list[Launch] = []
        self._numbers = itertools.count(1)

    def launch(self, place: Place, *words: str) -> Launch:
        """Begin a client."""
        number = next(self._numbers)
        options = (f"--table={self.table}", f"--launch={number}", f"--isolation={self._isolation}")
        said = self.folder / f"launch-{number}.said"
        made = Launch(place, number, said, (*options, f"--seed={self.seed}", *words))
        self._launches.append(made)
        return made

    def wait_acks(self, without: Place | None = None) -> None:
        """Return once every client that runs, but for those of one place, has had an append acknowledged
        after this was called.
        """
        now_ns = time.monotonic_ns()
        at_work = [launch for launch in self._launches if launch.place != without and not launch.lost]
        assert at_work, "no client runs"
        for launch in at_work:
            what = f"the client of {launch.place} goes on"
            wait_for(lambda launch=launch: launch.at_work() and launch.acked_ns() > now_ns, what, ACK_S)

    def lose(self, place: Place) -> None:
        """The clients of this place are dead, and were to be."""
        for launch in self._launches:
            launch.lost = launch.lost or launch.place == place

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave no client behind; what a run that failed has seen so far is kept."""
        for launch in self._launches:
            launch.kill()
        if kind is not None and not self.path.exists():
            for launch in self._launches:
                with contextlib.suppress(OSError, AssertionError, subprocess.SubprocessError):
                    self._events(launch)
            print(f"\nwhat each client saw until then: {self.folder}/launch-*.edn")

    @property
    def path(self) -> Path:
        """Of the whole history."""
        return self.folder / "history.edn"

    def finish(self, reader: Place) -> History:
        """End all clients, read every key once more, and put it all in one file."""
        for launch in self._launches:
            launch.end()
            assert launch.lost or launch.code == 0, f"the client of {launch.place} ended with {launch.code}"
        events = [event for launch in self._launches for event in self._events(launch)]
        keys = max((step.key for event in events for step in event.steps), default=0)
        last = self.launch(reader, f"--read={keys}")
        last.end()
        events += self._events(last)
        edn.write(self.path, events)
        assert last.code == 0, f"the last read failed; what there is: {self.path}"
        for rest in list(self.folder.glob("launch-*")):
            rest.unlink()
        return History(self.path, transactions(events))

    def _events(self, launch: Launch) -> list[Event]:
        copy = self.folder / Path(launch.file).name
        text = launch.place.text(launch.file)
        copy.write_text(text)
        return edn.read(copy)


class History:
    """A finished history and the checker's verdict."""

    def __init__(self, path: Path, done: list[Transaction]) -> None:
        self.path = path
        self.report: Report = check(done)
        acked = (t.ended_ns for t in done if t.ended_ns and t.outcome == "ok" and _appends(t))
        self.acked_ns = sorted(acked)

    def summary(self, seed: int, done: list[Harm]) -> str:
        """Two lines for a person."""
        outcomes, kinds = self.report.outcomes, self.report.kinds()
        ended = f"{outcomes['ok']} ok, {outcomes['fail']} failed, {outcomes['info']} unknown"
        hurt = ", ".join(
            f"{name} {counted(done)[name]} (up to {pause_s:.2f} s)"
            for name, pause_s in sorted(pauses(self.acked_ns, done).items())
        )
        found = ", ".join(f"{name} {count}" for name, count in sorted(kinds.items())) or "none"
        if "stale" in kinds:
            found += f" (by up to {self.report.stalest_s():.2f} s)"
        return (
            f"history, seed {seed}: {ended}; anomalies: {found}; {self.path}\n"
            f"faults, with their longest pause between acknowledged appends: {hurt or 'none'}"
        )


def _appends(t: Transaction) -> bool:
    return any(isinstance(step, Append) for step in t.steps)
