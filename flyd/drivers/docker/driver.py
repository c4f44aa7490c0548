"""The Docker driver: a machine is a container on its host's own bridge.

Owns the containers `flyd-<machine id>` that carry this host's label, the network `flyd-<host>`, and
one small file for each machine that flyd stopped itself (the engine can not tell that from another
end). Built inside the running loop by flyd/daemon.py; a new driver adopts what runs. The engine may
be down: calls then raise Unavailable, and ends that were missed are told of when it is back.

Invariants: at most one container of a machine; one that runs is never replaced; what carries no
label of this host is never touched. A machine whose spec has changed is made anew at its next start,
and with it its file system and its log: only volumes outlive a spec.

All that speaks to the engine runs in threads. Ends come from the engine's event stream, without polling.
What it does not do: pull or build images, route between hosts, or decide whether to restart.
"""

from __future__ import annotations

import asyncio
import re
import signal as signals
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from flyd.drivers import durable
from flyd.drivers.docker.engine import DEFAULT_URL, Engine
from flyd.drivers.docker.events import EventReader
from flyd.drivers.docker.exec import run_command
from flyd.drivers.docker.line import EngineSocket
from flyd.drivers.docker.runs import Run, Runs
from flyd.drivers.docker.session import Session
from flyd.drivers.docker.spec import (
    NANO,
    HostNetwork,
    OwnPrograms,
    Seen,
    container_body,
    log_line,
    nanoseconds,
    observed,
    spec_digest,
)
from flyd.drivers.docker.streams import ThreadedStream
from flyd.drivers.locks import Locks
from flyd.drivers.processes import container_members, look_at
from flyd.errors import Conflict, FlydError, InvalidInput, NotFound, Refused, Unavailable
from flyd.model import ExecOutput, ExitStatus, LogLine, MachineSpec, Observed
from flyd.model.machine import Process
from flyd.ports import Clock, SessionClient

CALLS_AT_ONCE = 8
END_TIMEOUT_S = 10.0  # from SIGKILL to the engine's word that the machine has ended
ALL = "all"  # of a log's lines
FOLLOW_PAUSE_S = 0.05  # between two looks at a log whose stream the engine has ended

_MACHINE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")

P = ParamSpec("P")
T = TypeVar("T")


class DockerDriver:
    """ports.Driver with containers of this host's engine."""

    def __init__(
        self,
        network: HostNetwork,
        state_dir: Path,
        clock: Clock,
        base_env: Mapping[str, str],
        *,
        own: OwnPrograms | None = None,
        url: str = DEFAULT_URL,
    ) -> None:
        self._own = own
        self._network = network
        self._base_env = dict(base_env)
        self._state_dir = state_dir
        self._state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._runs = Runs(network.host_name, clock)
        self._locks = Locks()
        name = f"docker {network.host_name}"
        self._pool = ThreadPoolExecutor(CALLS_AT_ONCE, thread_name_prefix=name)
        self._url = url
        self._engine = Engine(url, network)
        self._events = EventReader(self._engine, self._runs, clock, f"{name} events")

    def close(self) -> None:
        """Forget the machines (they run on) and end the threads."""
        self._runs.close()
        self._events.close()
        self._pool.shutdown(wait=False)
        self._engine.close()

    # ------------------------------------------------------------------- the port

    async def create(self, spec: MachineSpec) -> None:
        """Make the machine's container; start nothing."""
        body = container_body(spec, self._network, self._base_env, self._own)
        async with self._locks.of(spec.machine_id):
            container = await self._find(spec.machine_id)
            if container is None or not self._runs_already(spec, container):
                await self._ensure_container(spec, container, body)

    async def start(self, spec: MachineSpec) -> Observed:
        """Start the machine; answers when the engine has started its init (which runs the command)."""
        body = container_body(spec, self._network, self._base_env, self._own)
        machine_id = spec.machine_id
        async with self._locks.of(machine_id):
            container = await self._find(machine_id)
            if container is not None and self._runs_already(spec, container):
                return self._observed(container)
            if (last := self._runs.get(machine_id)) is not None:
                await self._wait_end(machine_id, last, END_TIMEOUT_S)
            container_id = await self._ensure_container(spec, container, body)
            run = self._runs.begin(machine_id, container_id)
            try:
                await self._call(self._engine.start, machine_id, container_id)
            except FlydError:
                self._runs.forget(machine_id)
                raise
            started = await self._find(machine_id)
            if started is None:
                self._runs.settle(machine_id, run)
                raise Unavailable(f"the container of machine {machine_id} vanished while it started")
            self._runs.began(machine_id, run, started.started_ns)
            return self._observed(started)

    async def stop(self, machine_id: str, signal: str, timeout_s: float) -> ExitStatus | None:
        """Signal the main process, wait, SIGKILL; the kernel then ends all that is in the container."""
        _check_signal(signal)
        async with self._locks.of(machine_id):
            container = await self._find(machine_id)
            if container is None or not container.running:
                return None
            await self._call(self._mark_stopped, container)
            await self._end(container, signal, timeout_s)
            ended = await self._find(machine_id)
            return self._observed(ended).exit if ended is not None else None

    async def destroy(self, machine_id: str) -> None:
        """Kill what runs and remove the container; absent is no error."""
        async with self._locks.of(machine_id):
            container = await self._find(machine_id)
            if container is not None:
                run = self._runs.of(container) if container.running else None
                await self._call(self._engine.remove, machine_id, container.container_id)
                if run is not None:
                    await self._wait_end(machine_id, run, END_TIMEOUT_S)
            await self._call(durable.remove_file, self._mark(machine_id))

    async def observe(self) -> Mapping[str, Observed]:
        """Every container with this host's label, whether flyd's database knows it or not."""
        await self._runs.wait_connected()
        containers = await self._call(self._engine.list_own)
        return {c.machine_id: self._observed(c) for c in containers}

    async def look(self, machine_id: str) -> Observed | None:
        """One container, if it carries this host's label."""
        container = await self._find(machine_id)
        return self._observed(container) if container is not None else None

    async def signal(self, machine_id: str, signal: str) -> None:
        """Signal the container's init, which passes it on to the command."""
        _check_signal(signal)
        container = await self._running(machine_id)
        await self._call(self._engine.kill, machine_id, container.container_id, signal)

    async def processes(self, machine_id: str) -> tuple[Process, ...]:
        """All that is in the container's pid namespace, its init included."""
        container = await self._find(machine_id)
        if container is None or not container.running:
            return ()
        main = container.pid
        return await self._call(lambda: look_at(container_members(main)))

    async def exits(self) -> AsyncIterator[str]:
        """One id for each run that ended since this driver was built; for one consumer."""
        while True:
            yield await self._runs.exited.get()

    async def exec(
        self, machine_id: str, command: Sequence[str], timeout_s: float
    ) -> AsyncIterator[ExecOutput]:
        """Run a command in the container, with its environment and user."""
        container = await self._running(machine_id)
        if not command:
            raise InvalidInput("the command is empty")
        socket = self._socket(machine_id)
        async for output in run_command(self._engine, self._call, socket, container, command, timeout_s):
            yield output

    async def session(self, machine_id: str, command: Sequence[str], client: SessionClient) -> int:
        """Run a command in the container, as `exec` does, with its input and perhaps a terminal."""
        container = await self._running(machine_id)
        if not command:
            raise InvalidInput("the command is empty")
        session = Session(self._engine, self._call, self._socket(machine_id), container)
        return await session.run(command, client)

    async def logs(self, machine_id: str, *, tail: int, follow: bool) -> AsyncIterator[LogLine]:
        """The container's output of all its runs, as far back as its rotated files reach.

        The engine's stream ends with each run, so a follower then waits for news and goes on after
        the last line that it has seen. A line longer than 16 KiB comes in pieces of that size.
        """
        container = await self._find(machine_id)
        if container is None:
            raise _no_machine(machine_id)
        last = ""
        async with aclosing(self._messages(container, max(tail, 1), "", follow=False)) as messages:
            async for stamp, line in messages:
                last = max(last, stamp)
                if tail > 0:
                    yield line
        while follow:
            news = self._runs.news
            async with self._locks.of(machine_id):  # while it is being made anew there is no container
                container = await self._find(machine_id)
            if container is None:
                return
            async with aclosing(self._messages(container, ALL, last, follow=container.running)) as messages:
                async for stamp, line in messages:
                    last = max(last, stamp)
                    yield line
            if container.running:
                await asyncio.sleep(FOLLOW_PAUSE_S)
            else:
                await news.wait()

    # ------------------------------------------------------------------- parts

    def _socket(self, machine_id: str) -> EngineSocket:
        return EngineSocket(self._url, self._network.host_name, machine_id)

    async def _find(self, machine_id: str) -> Seen | None:
        _check_id(machine_id)
        await self._runs.wait_connected()
        return await self._call(self._engine.find, machine_id)

    async def _running(self, machine_id: str) -> Seen:
        container = await self._find(machine_id)
        if container is None:
            raise _no_machine(machine_id)
        if not container.running:
            raise Refused(f"machine {machine_id} is not running", hint=f"`fly machine start {machine_id}`")
        return container

    async def _call(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run it in a thread. Cancelled, it is waited for: nothing may happen behind the next call's back."""
        future = asyncio.get_running_loop().run_in_executor(self._pool, partial(call, *args, **kwargs))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait((future,))
            future.exception()  # looked at, so that asyncio does not report it as lost
            raise

    def _runs_already(self, spec: MachineSpec, container: Seen) -> bool:
        """Whether this very instance runs; another instance of the machine must be stopped first."""
        if container.running and container.instance_id != spec.instance_id:
            raise Conflict(
                f"machine {spec.machine_id} still runs instance {container.instance_id}, "
                f"so instance {spec.instance_id} cannot take its place",
                hint="stop the machine first",
            )
        return container.running

    async def _ensure_container(
        self, spec: MachineSpec, container: Seen | None, body: Mapping[str, Any]
    ) -> str:
        """The id of a container made from this very spec; one made from another makes place for it."""
        if container is not None:
            if container.spec_digest == spec_digest(body):
                return container.container_id
            await self._call(self._engine.remove, spec.machine_id, container.container_id, kill=False)
        return await self._call(self._engine.create, spec.machine_id, body)

    async def _end(self, container: Seen, signal: str, timeout_s: float) -> None:
        run = self._runs.of(container)
        machine_id = container.machine_id
        for name, wait_s in ((signal, timeout_s), ("SIGKILL", END_TIMEOUT_S)):
            await self._call(self._engine.kill, machine_id, container.container_id, name)
            if await self._wait_end(machine_id, run, wait_s):
                return
        raise Unavailable(
            f"machine {machine_id} still runs {END_TIMEOUT_S:g} s after SIGKILL "
            f"on host {self._network.host_name}",
            hint="Is a disk stuck there, or the engine? `docker ps` and `dmesg` on that host.",
        )

    async def _wait_end(self, machine_id: str, run: Run, wait_s: float) -> bool:
        """Whether the run is over within that time; the engine is asked once more before the answer is no."""
        try:
            async with asyncio.timeout(wait_s):
                await run.ended.wait()
        except TimeoutError:
            container = await self._find(machine_id)
            if container is not None and container.running:
                return False
            self._runs.settle(machine_id, run)
        return True

    async def _messages(
        self, container: Seen, tail: int | str, after: str, *, follow: bool
    ) -> AsyncGenerator[tuple[str, LogLine], None]:
        """Lines with their times as written, later than `after`."""
        machine_id, since_s = container.machine_id, nanoseconds(after) // NANO if after else 0
        opened = partial(
            self._engine.logs, machine_id, container.container_id, tail=tail, since_s=since_s, follow=follow
        )
        stream = ThreadedStream(opened, f"log of {machine_id}")
        try:
            while (message := await stream.next()) is not None:
                stamp, line = log_line(machine_id, message)
                if stamp > after:
                    yield stamp, line
        finally:
            stream.close()

    # ------------------------------------------------------------------- who asked for an end

    def _mark(self, machine_id: str) -> Path:
        return self._state_dir / f"{machine_id}.stop"

    def _mark_stopped(self, container: Seen) -> None:
        durable.write_file(self._mark(container.machine_id), container.run_key.encode())

    def _observed(self, container: Seen) -> Observed:
        try:
            requested = self._mark(container.machine_id).read_text() == container.run_key
        except FileNotFoundError:
            requested = False
        return observed(container, requested)


def _no_machine(machine_id: str) -> NotFound:
    return NotFound(f"no machine {machine_id} on this host", hint="`fly machine list` names them")


def _check_id(machine_id: str) -> None:
    if not _MACHINE_ID.fullmatch(machine_id):
        raise InvalidInput(f"{machine_id!r} is no machine id")


def _check_signal(name: str) -> None:
    if name not in signals.Signals.__members__:
        raise InvalidInput(f"there is no signal {name!r}", hint="use a name such as SIGINT or SIGTERM")
