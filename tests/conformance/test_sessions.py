"""What every driver's sessions do (ports.Driver.session): input, terminals, ends, clients that go away."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from pathlib import Path

import pytest

from flyd.errors import InvalidInput, NotFound, Refused
from flyd.model import ExecOutput
from flyd.ports import Driver, SessionClient, Terminal, TerminalSize
from tests.support.drivers import WAIT_S, Rig, process_host, running, spec, until
from tests.support.engine import docker_host

HOSTS: dict[str, Callable[[], AbstractContextManager[Rig]]] = {
    "docker": docker_host,
    "process": process_host,
}
SIZE = TerminalSize(columns=90, rows=30)

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(params=sorted(HOSTS))
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with HOSTS[request.param]() as host:
        yield host


class Talk:
    """A session under way: what it has printed, and what it is told."""

    def __init__(self, driver: Driver, command: tuple[str, ...], *, terminal: bool) -> None:
        self.stdout = b""
        self.stderr = b""
        self.slow_s = 0.0  # the client takes so long for each piece
        self._typed: asyncio.Queue[bytes | TerminalSize | None] = asyncio.Queue()
        self._news = asyncio.Event()
        client = SessionClient(
            terminal=Terminal(SIZE, "vt220") if terminal else None, inputs=self._inputs(), output=self._hear
        )
        self.run = driver.session("m1", command, client)

    def type(self, *typed: bytes | TerminalSize | None) -> None:
        """Send input; None ends it."""
        for item in typed:
            self._typed.put_nowait(item)

    async def wait_said(self, words: bytes) -> None:
        """Return once it has printed this."""
        async with asyncio.timeout(WAIT_S):
            while words not in self.stdout:
                self._news.clear()
                await self._news.wait()

    async def _inputs(self) -> AsyncIterator[bytes | TerminalSize]:
        while (item := await self._typed.get()) is not None:
            yield item

    async def _hear(self, piece: ExecOutput) -> None:
        await asyncio.sleep(self.slow_s)
        self.stdout += piece.stdout
        self.stderr += piece.stderr
        self._news.set()


async def started(rig: Rig) -> Driver:
    driver = rig.driver()
    await driver.create(spec(rig.runs()))
    await driver.start(spec(rig.runs()))
    return driver


@asynccontextmanager
async def talking(
    rig: Rig, command: tuple[str, ...], *, terminal: bool = False
) -> AsyncGenerator[tuple[Talk, asyncio.Task[int]]]:
    """A session in a machine that runs, cancelled at the end if it has not ended."""
    talk = Talk(await started(rig), command, terminal=terminal)
    async with asyncio.timeout(3 * WAIT_S), asyncio.TaskGroup() as tasks:
        session = tasks.create_task(talk.run)
        yield talk, session
        session.cancel()


def found(word: str) -> list[int]:
    """The living processes of this machine that have this word in their command line."""
    pids: list[int] = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and word.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                pids.append(int(entry.name))
    return [pid for pid in pids if running(pid)]


async def gone(word: str) -> None:
    """Return once nothing has this word any more: a killed process may take a moment to be gone."""
    await until(lambda: not found(word), f"{word!r} is gone")


def mark(number: int) -> str:
    """A number of seconds to sleep that no other process here sleeps."""
    return f"{number}{os.getpid()}"


# --------------------------------------------------------------------------- on pipes


async def test_input_reaches_the_command(rig: Rig) -> None:
    async with talking(rig, rig.shell("cat; echo done >&2; exit 5")) as (talk, session):
        talk.type(b"hello ", b"there\n", None)
        assert await session == 5
    assert (talk.stdout, talk.stderr) == (b"hello there\n", b"done\n")


async def test_much_of_it_to_a_slow_client(rig: Rig) -> None:
    lines = b"".join(b"%07d\n" % n for n in range(100_000))
    async with talking(rig, ("cat",)) as (talk, session):
        talk.slow_s = 0.01
        pieces = [lines[at : at + 30_000] for at in range(0, len(lines), 30_000)]
        talk.type(*pieces, None)
        assert await session == 0
    assert talk.stdout == lines


async def test_it_runs_as_the_machine_does(rig: Rig) -> None:
    async with talking(rig, rig.shell("echo $COLOUR; test -t 0 || echo no terminal")) as (talk, session):
        assert await session == 0  # also while its input is still open
    assert talk.stdout == b"blue\nno terminal\n"


async def test_a_signal_ends_it(rig: Rig) -> None:
    async with talking(rig, rig.shell("kill -KILL $$")) as (_, session):
        assert await session == 137


@pytest.mark.parametrize("terminal", [False, True])
async def test_nothing_of_that_name(rig: Rig, terminal: bool) -> None:
    async with talking(rig, ("no-such-program",), terminal=terminal) as (talk, session):
        assert await session == 127
    assert b"no-such-program" in talk.stdout + talk.stderr


async def test_what_it_leaves_ends_with_it(rig: Rig) -> None:
    seconds = mark(71)
    async with talking(rig, rig.shell(f"sleep {seconds} & sleep {seconds} & exit 3")) as (_, session):
        async with asyncio.timeout(WAIT_S):
            assert await session == 3
    await gone(seconds)


# --------------------------------------------------------------------------- on a terminal


async def test_a_terminal(rig: Rig) -> None:
    script = (
        'until [ "$(stty size)" = "30 90" ]; do sleep 0.01; done; '
        "echo $TERM $COLOUR; echo trouble >&2; : < /dev/tty && read line && echo =$line; exit 4"
    )
    async with talking(rig, rig.shell(script), terminal=True) as (talk, session):
        await talk.wait_said(b"trouble\r\n")
        talk.type(b"typed\r")
        assert await session == 4
    assert talk.stdout == b"vt220 blue\r\ntrouble\r\ntyped\r\n=typed\r\n"
    assert talk.stderr == b""


async def test_a_new_size(rig: Rig) -> None:
    script = "until [ \"$(stty size)\" = '30 90' ]; do sleep 0.01; done; trap 'stty size; exit 6' WINCH; "
    script += "echo ready; while :; do sleep 0.05; done"
    async with talking(rig, rig.shell(script), terminal=True) as (talk, session):
        await talk.wait_said(b"ready")
        talk.type(TerminalSize(columns=132, rows=43))
        assert await session == 6
    assert b"43 132" in talk.stdout


async def test_ctrl_c_interrupts(rig: Rig) -> None:
    async with talking(rig, rig.shell("echo ready; exec sleep 1000"), terminal=True) as (talk, session):
        await talk.wait_said(b"ready")
        talk.type(b"\x03")
        assert await session == 130


@pytest.mark.parametrize("typed", [b"", b"a line\n", b"half a line"])
async def test_the_end_of_input_is_ctrl_d(rig: Rig, typed: bytes) -> None:
    async with talking(rig, ("cat",), terminal=True) as (talk, session):
        talk.type(typed, None) if typed else talk.type(None)
        assert await session == 0
    assert typed.strip() in talk.stdout


# --------------------------------------------------------------------------- clients that go away


@pytest.mark.parametrize("terminal", [False, True])
async def test_a_client_that_goes_takes_its_session_along(rig: Rig, terminal: bool) -> None:
    seconds = mark(72)
    script = f"set -m; trap '' HUP; sleep {seconds} & sleep {seconds} & echo begun; wait"
    async with talking(rig, rig.shell(script), terminal=terminal) as (talk, session):
        await talk.wait_said(b"begun")
        await until(lambda: len(found(seconds)) == 2, "both run")
        session.cancel()
    await gone(seconds)
    await gone(script)


async def test_a_client_that_goes_in_a_flood(rig: Rig) -> None:
    word = mark(73)
    async with talking(rig, ("yes", word), terminal=True) as (talk, session):
        await talk.wait_said(b"\r\n")
        talk.slow_s = 1000.0
        await until(lambda: len(found(word)) == 1, "it runs")
        session.cancel()
    await gone(word)


async def test_what_goes_has_a_moment_to_tidy_up(rig: Rig) -> None:
    script = f"trap 'exec sleep {mark(74)}' HUP; echo ready; while :; do sleep 0.05; done"
    async with talking(rig, rig.shell(script), terminal=True) as (talk, session):
        await talk.wait_said(b"ready")
        session.cancel()
        await until(lambda: len(found(mark(74))) == 1, "it heard of the hang-up")
    await gone(mark(74))


# --------------------------------------------------------------------------- refusals


async def test_it_needs_a_running_machine_and_a_command(rig: Rig) -> None:
    driver = rig.driver()
    with pytest.raises(NotFound):
        await Talk(driver, ("sh",), terminal=False).run
    await driver.create(spec(rig.runs()))
    with pytest.raises(Refused, match="not running"):
        await Talk(driver, ("sh",), terminal=False).run
    await driver.start(spec(rig.runs()))
    with pytest.raises(InvalidInput, match="empty"):
        await Talk(driver, (), terminal=False).run
