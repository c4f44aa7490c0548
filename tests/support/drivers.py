"""What a driver must bring to be put through tests/conformance/test_driver.py.

A rig is one host: it makes driver objects over the same host, and knows commands that do what
the suite asks for in the driver's own world (a fake may use words of its own).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from flyd.drivers.process.driver import ProcessDriver
from flyd.model import ExecOutput, LogLine, MachineSpec
from flyd.ports import Driver
from flyd.store.system import SystemClock

WAIT_S = 10.0
BASE_IMAGE = "flyd-base:bookworm"  # scripts/base-image.sh makes it


class Rig(Protocol):
    """One host with machines, and the commands to run on it."""

    def driver(self) -> Driver:
        """A new driver object over this host; machines of earlier ones are adopted."""
        ...

    def runs(self) -> tuple[str, ...]:
        """A command that prints `up` and runs until a signal ends it."""
        ...

    def ends(self, code: int) -> tuple[str, ...]:
        """A command that ends at once with an exit code."""
        ...

    def ignores_sigterm(self) -> tuple[str, ...]:
        """A command that prints `up` and ignores SIGTERM."""
        ...

    def prints(self, lines: int) -> tuple[str, ...]:
        """A command that prints `line 1` ... `line <n>` and then runs on."""
        ...

    def shell(self, script: str) -> tuple[str, ...]:
        """A command for `exec`: `echo WORD`, `echo WORD >&2`, `exit N`, `sleep N`, joined by `; `."""
        ...


class ShellCommands:
    """The commands of Rig for machines that have a shell."""

    def runs(self) -> tuple[str, ...]:
        """See Rig."""
        return self.shell("echo up; exec sleep 1000")

    def ends(self, code: int) -> tuple[str, ...]:
        """See Rig."""
        return self.shell(f"exit {code}")

    def ignores_sigterm(self) -> tuple[str, ...]:
        """See Rig."""
        return self.shell("trap '' TERM; echo up; while :; do sleep 1000; done")

    def prints(self, lines: int) -> tuple[str, ...]:
        """See Rig."""
        return self.shell(f"for i in $(seq {lines}); do echo line $i; done; exec sleep 1000")

    def shell(self, script: str) -> tuple[str, ...]:
        """See Rig."""
        return ("sh", "-c", script)


class ProcessRig(ShellCommands):
    """The process driver in a temporary directory."""

    def __init__(self, top: Path) -> None:
        self.root = top / "machines"
        self._drivers: list[ProcessDriver] = []

    def driver(self) -> ProcessDriver:
        """A driver over the one root; the one before is forgotten, as if flyd had been restarted."""
        self.close()
        path = os.environ["PATH"]
        driver = ProcessDriver(
            self.root, SystemClock(), {"PATH": path, "LANG": "C.UTF-8", "FLYD_HOST": "rig"}
        )
        self._drivers.append(driver)
        return driver

    def close(self) -> None:
        """Forget the driver; machines run on."""
        while self._drivers:
            self._drivers.pop().close()


@contextmanager
def process_host() -> Generator[ProcessRig, None, None]:
    """A host whose machines are all gone at the end."""
    top = Path(tempfile.mkdtemp(prefix="flyd-driver-"))
    top.chmod(0o755)
    rig = ProcessRig(top)
    try:
        yield rig
    finally:
        rig.close()
        asyncio.run(_destroy_all(rig))
        shutil.rmtree(top)


async def _destroy_all(rig: ProcessRig) -> None:
    driver = rig.driver()
    for path in rig.root.iterdir():
        await driver.destroy(path.name)
    rig.close()


def spec(
    command: tuple[str, ...],
    machine_id: str = "m1",
    *,
    instance_id: str = "i1",
    source_path: str = "",
    mounts: tuple[tuple[str, str], ...] = (),
    user: str = "",
) -> MachineSpec:
    """A machine to run."""
    return MachineSpec(
        machine_id=machine_id,
        app="web",
        instance_id=instance_id,
        command=command,
        env={"COLOUR": "blue"},
        private_ip="",  # the engine chooses one; a process has none of its own
        image=BASE_IMAGE,
        source_path=source_path,
        mounts=mounts,
        user=user,
    )


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that has no event of its own."""
    try:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"still not so after {WAIT_S:g} s: {what}") from None


async def first_lines(driver: Driver, machine_id: str, count: int, *, tail: int = 100) -> list[LogLine]:
    """Follow a log until there are `count` lines."""
    lines: list[LogLine] = []
    async with asyncio.timeout(WAIT_S):
        async for line in driver.logs(machine_id, tail=tail, follow=True):
            lines.append(line)
            if len(lines) == count:
                break
    return lines


async def collected(outputs: AsyncIterator[ExecOutput]) -> tuple[bytes, bytes, int | None]:
    """All output of an exec, and its exit code."""
    stdout, stderr, code = b"", b"", None
    async for output in outputs:
        assert code is None, "the exit code must come last"
        stdout, stderr, code = stdout + output.stdout, stderr + output.stderr, output.exit_code
    return stdout, stderr, code


def running(pid: int) -> bool:
    """Whether a process lives (zombies do not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in (b"Z", b"X")
