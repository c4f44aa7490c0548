"""fly console: a person's terminal, or a pipe, in a machine on another host; nothing is left when it ends."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
import zlib
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from integration.cluster import FLY, REGIONS, Cluster, tiny_app, wait_for

pytestmark = pytest.mark.timeout(180)

INVALID, NOT_FOUND, REFUSED = 2, 3, 5
SAY_S = 15.0
GONE_S = 10.0
SILENT_S = 30.0  # until a client that does not answer is given up
SIZE, NEW_SIZE = (31, 91), (44, 133)


@pytest.fixture(scope="module")
def desk(cluster: Cluster) -> Generator[Path]:
    """A small application in all three regions."""
    cluster.fly("apps", "create", "desk", "--regions", ",".join(REGIONS))
    folder = tiny_app(cluster.folder("desk"), "desk")
    cluster.fly("deploy", cwd=folder)
    yield folder
    cluster.fly("apps", "destroy", "desk", "--yes")


class Person:
    """`fly console` on a terminal of its own, asked of ams: its machine is in another region."""

    def __init__(self, cluster: Cluster, folder: Path, *words: str) -> None:
        self.screen = b""
        self._ours, self._theirs = pty.openpty()
        self.resize(SIZE)
        self.before = termios.tcgetattr(self._theirs)
        self.command = subprocess.Popen(
            [FLY, "console", *words],
            env={**cluster.fly.env, "FLY_API": cluster.api("ams"), "TERM": "vt220"},
            cwd=folder,
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            start_new_session=True,
        )

    def resize(self, size: tuple[int, int]) -> None:
        """The window has this many rows and columns now."""
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        if hasattr(self, "command"):
            self.command.send_signal(signal.SIGWINCH)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._ours, text.encode())

    def wait_sees(self, words: str) -> None:
        """Return once this is on the screen; only what follows it is still there then."""
        give_up_at = time.monotonic() + SAY_S
        while words.encode() not in self.screen:
            self._look()
            assert time.monotonic() < give_up_at, f"no {words!r} on the screen: {self.screen!r}"
        self.screen = self.screen.partition(words.encode())[2]

    def ended(self) -> int:
        """The exit code of a session that is ending; the terminal is as it was before."""
        give_up_at = time.monotonic() + SAY_S
        while (code := self.command.poll()) is None or self._look():
            self._look()
            assert time.monotonic() < give_up_at, f"it does not end: {self.screen!r}"
        assert termios.tcgetattr(self._theirs) == self.before
        return code

    def _look(self) -> bool:
        """Whether something new came onto the screen; waits a moment for it."""
        ready, _, _ = select.select([self._ours], [], [], 0.1)
        if ready:
            self.screen += os.read(self._ours, 65536)
        return bool(ready)

    def close(self) -> None:
        """Leave nothing."""
        self.command.kill()
        self.command.wait()
        os.close(self._ours)
        os.close(self._theirs)


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> str:
    """A number of seconds to sleep that nobody else sleeps."""
    return f"{zlib.crc32(request.node.nodeid.encode()) % 900_000 + 100_000}"


def sleepers(seconds: str) -> list[int]:
    """The processes that sleep so long."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and (entry / "cmdline").read_bytes() == f"sleep\0{seconds}\0".encode():
                found.append(int(entry.name))
    return found


def piped(cluster: Cluster, folder: Path, typed: bytes, *words: str) -> subprocess.CompletedProcess[bytes]:
    """`fly console` between pipes."""
    env = {**cluster.fly.env, "FLY_API": cluster.api("ams")}
    command = [FLY, "console", *words]
    return subprocess.run(
        command, env=env, cwd=folder, input=typed, capture_output=True, timeout=60, check=False
    )


def machine_in(cluster: Cluster, region: str) -> dict[str, Any]:
    return next(m for m in cluster.machines("desk") if m["region"] == region)


# --------------------------------------------------------------------------- pipes


def test_a_pipe(cluster: Cluster, desk: Path) -> None:
    assert piped(cluster, desk, b"x\n", "-C", "cat").stdout == b"x\n"
    much = b"".join(b"%07d\n" % n for n in range(200_000))
    ran = piped(cluster, desk, much, "--region", "sin", "-C", "cat")
    assert (ran.returncode, ran.stdout == much, ran.stderr) == (0, True, b"")
    script = "sh -c 'echo $FLY_REGION; tty; echo careful >&2; exit 7'"
    ran = piped(cluster, desk, b"", "-r", "sin", "-C", script)
    assert (ran.returncode, ran.stdout, ran.stderr) == (7, b"sin\nnot a tty\n", b"careful\n")
    ran = piped(
        cluster, desk, b"echo from $FLY_REGION\nexit 4\n", "--machine", machine_in(cluster, "iad")["id"]
    )
    assert (ran.returncode, ran.stdout) == (4, b"from iad\n")  # the shell reads its commands from the pipe


def test_a_reader_that_has_enough(cluster: Cluster, desk: Path, seconds: str) -> None:
    script = f"fly console -r sin -C \"sh -c 'sleep {seconds} & yes'\" | head -n 1"
    path = f"{FLY.parent}:{os.environ['PATH']}"
    ran = subprocess.run(
        ["bash", "-o", "pipefail", "-c", script],
        env={**cluster.fly.env, "PATH": path},
        cwd=desk,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (141, b"y\n", b"")
    wait_for(lambda: not sleepers(seconds), "nothing is left", GONE_S)


def test_what_can_not_be(cluster: Cluster, desk: Path) -> None:
    cases = (
        (INVALID, ("-C", "echo 'open"), b"No closing quotation"),
        (INVALID, ("--machine", "m", "--region", "sin"), b"--region"),
        (NOT_FOUND, ("--machine", "nonsense"), b"nonsense"),
        (REFUSED, ("--region", "fra"), b"ams, iad, sin"),
        (127, ("-C", "no-such-program"), b"no-such-program"),
    )
    for code, words, said in cases:
        ran = piped(cluster, desk, b"", *words)
        assert (ran.returncode, said in ran.stderr) == (code, True), (words, ran.stderr)
        assert b"Traceback" not in ran.stderr


# --------------------------------------------------------------------------- a terminal


@pytest.fixture
def person(cluster: Cluster, desk: Path) -> Generator[Person]:
    """In a shell in sin."""
    made = Person(cluster, desk, "--region", "sin")
    try:
        made.type("export PS1='> '; echo rea''dy\r")
        made.wait_sees("ready")
        yield made
    finally:
        made.close()


def test_a_shell(person: Person, seconds: str) -> None:
    person.type("stty size; echo $TERM-$FLY_REGION-$(tty | cut -c 1-8)\r")
    person.wait_sees(f"{SIZE[0]} {SIZE[1]}")
    person.wait_sees("vt220-sin-/dev/pts")
    person.resize(NEW_SIZE)
    person.type("until stty size | grep '{} {}'; do sleep 0.1; done\r".format(*NEW_SIZE))
    person.wait_sees("{} {}\r\n".format(*NEW_SIZE))
    person.type(f"sleep {seconds}\r")
    wait_for(lambda: sleepers(seconds), "it sleeps")
    person.type("\x03")  # interrupts what runs there, not the command here
    person.wait_sees("> ")
    person.type("echo still $((40 + 2))\r")
    person.wait_sees("still 42")
    person.type("exit 3\r")
    assert person.ended() == 3


def test_flyctls_name_for_it(cluster: Cluster, desk: Path) -> None:
    ran = cluster.fly.run("ssh", "console", "-C", "echo hello", cwd=desk)
    assert (ran.code, ran.out) == (0, "hello\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_client_that_is_ended(person: Person, number: signal.Signals, seconds: str) -> None:
    person.type(f"sleep {seconds} & echo begu''n\r")
    person.wait_sees("begun")
    person.command.send_signal(number)
    assert person.ended() == 128 + number
    wait_for(lambda: not sleepers(seconds), "nothing is left", GONE_S)


def test_a_client_that_is_killed(person: Person, seconds: str) -> None:
    person.type(f"sleep {seconds} & trap '' HUP; sleep {seconds}\r")
    wait_for(lambda: len(sleepers(seconds)) == 2, "both sleep")
    person.command.kill()
    wait_for(lambda: not sleepers(seconds), "nothing is left", GONE_S)


def test_a_client_that_falls_silent(person: Person, seconds: str) -> None:
    person.type(f"exec sleep {seconds}\r")
    wait_for(lambda: sleepers(seconds), "it sleeps")
    person.command.send_signal(signal.SIGSTOP)
    wait_for(lambda: not sleepers(seconds), "nothing is left", SILENT_S)


def test_flyd_is_killed(cluster: Cluster, person: Person, seconds: str) -> None:
    person.type(f"exec sleep {seconds}\r")
    wait_for(lambda: sleepers(seconds), "it sleeps")
    cluster.fly("chaos", "kill-flyd", "--name", cluster.name, "sin")
    assert person.ended() == 6
    assert b"Error:" in person.screen
    wait_for(lambda: not sleepers(seconds), "nothing is left", GONE_S)
