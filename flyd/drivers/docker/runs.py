"""The runs of a host's containers: which are under way, and whose end the engine has told of.

Owns what the driver knows of machines that run, from the engine's event stream (events.py), and
tells of each end once. Invariants: an end counts only for a run that began before it, by the engine's own
clock, since events may come twice or late; after a time without the stream, each run that is not in the
new listing has ended. Everything happens in the loop's thread. Called by driver.py.
"""

from __future__ import annotations

import asyncio

import structlog

from flyd.drivers.docker.events import EngineEvent
from flyd.drivers.docker.spec import Seen
from flyd.errors import FlydError, Unavailable
from flyd.ports import Clock

log = structlog.get_logger(__name__)

CONNECT_TIMEOUT_S = 5.0  # until the engine's event stream is open


class Run:
    """One run of a machine, from just before its start (or its adoption) to its end."""

    def __init__(self, container_id: str, *, started_ns: int | None = None, known_at_s: float = 0.0) -> None:
        self.container_id = container_id
        self.started_ns = started_ns  # None: the engine is still starting it
        self.known_at_s = known_at_s  # monotonic: when `started_ns` was learned
        self.last_end_ns = 0
        self.ended = asyncio.Event()

    def is_over(self) -> bool:
        """Whether the engine has told of an end after this run's begin (events may come twice, or late)."""
        return self.started_ns is not None and self.last_end_ns >= self.started_ns > 0


class Runs:
    """docker_events.Sink of one driver."""

    def __init__(self, host_name: str, clock: Clock) -> None:
        self._host_name = host_name
        self._clock = clock
        self._runs: dict[str, Run] = {}
        self._connected = asyncio.Event()
        self._last_error: FlydError | None = None
        self._closed = False
        self.exited: asyncio.Queue[str] = asyncio.Queue()  # ids of machines, one for each end
        self.news = asyncio.Event()  # set, and replaced by a new one, when anything happens

    def close(self) -> None:
        """What the stream still says is not heard any more."""
        self._closed = True

    async def wait_connected(self) -> None:
        """Return when the stream is open: only then is no end missed."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._connected.wait()
        except TimeoutError:
            error = self._last_error or Unavailable(
                f"the Docker engine of host {self._host_name} did not answer in {CONNECT_TIMEOUT_S:g} s",
                hint="`systemctl status docker` on that host.",
            )
            raise type(error)(error.message, hint=error.hint) from None

    # ------------------------------------------------------------------- what the driver does

    def begin(self, machine_id: str, container_id: str) -> Run:
        """A run that the engine is about to be asked for."""
        run = self._runs[machine_id] = Run(container_id)
        return run

    def began(self, machine_id: str, run: Run, started_ns: int) -> None:
        """The engine has started it; it may have ended already."""
        run.started_ns, run.known_at_s = started_ns, self._clock.monotonic_s()
        if run.is_over():
            self.settle(machine_id, run)

    def forget(self, machine_id: str) -> None:
        """The engine has refused to start it."""
        self._runs.pop(machine_id, None)

    def get(self, machine_id: str) -> Run | None:
        """The run whose end has not been told of yet."""
        return self._runs.get(machine_id)

    def of(self, container: Seen) -> Run:
        """The run of a container that runs, adopted if this driver did not start it."""
        run = self._runs.get(container.machine_id)
        if run is None or run.container_id != container.container_id:
            run = self._runs[container.machine_id] = Run(
                container.container_id,
                started_ns=container.started_ns,
                known_at_s=self._clock.monotonic_s(),
            )
        return run

    def settle(self, machine_id: str, run: Run) -> None:
        """The run is over: say so, once."""
        if run.ended.is_set():
            return
        run.ended.set()
        if self._runs.get(machine_id) is run:
            del self._runs[machine_id]
        self.exited.put_nowait(machine_id)
        self._tell()

    # ------------------------------------------------------------------- what the event stream says

    def listed(self, running: list[Seen], listed_at_s: float) -> None:
        """The stream is open: adopt what runs, and tell of what ended while it was not."""
        if self._closed:
            return
        now = {container.machine_id: container for container in running}
        for machine_id, run in sorted(self._runs.items()):
            container = now.get(machine_id)
            if run.started_ns is None or run.known_at_s >= listed_at_s:
                continue  # started since: the stream will tell of its end
            if container is None or container.started_ns > run.started_ns:
                self.settle(machine_id, run)
        for container in running:
            self.of(container)
        self._last_error = None
        self._connected.set()
        self._tell()

    def happened(self, event: EngineEvent) -> None:
        """A container started, ended or was removed."""
        if self._closed:
            return
        run = self._runs.get(event.machine_id)
        if event.action == "start" and run is None:  # by somebody else's hand
            self._runs[event.machine_id] = Run(
                event.container_id, started_ns=event.at_ns, known_at_s=self._clock.monotonic_s()
            )
        elif event.action == "die" and run is not None and run.container_id == event.container_id:
            run.last_end_ns = max(run.last_end_ns, event.at_ns)
            if run.is_over():
                self.settle(event.machine_id, run)
        self._tell()

    def down(self, error: FlydError) -> None:
        """The engine does not answer; the reader tries again by itself."""
        if self._closed:
            return
        if self._connected.is_set() or self._last_error is None:
            log.warning("docker.engine_lost", host=self._host_name, error=str(error))
        self._last_error = error
        self._connected.clear()

    def _tell(self) -> None:
        """Wake up who waits for news of any machine."""
        self.news.set()
        self.news = asyncio.Event()
