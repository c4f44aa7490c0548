"""The engine's event stream, read by one thread for a driver, for as long as the driver lives.

Owns that thread and its reconnecting. In this order, after each (re)connect: the host's network
is made sure of, the stream opened, all running machines listed, then each event handed on; all in
the loop's thread through `call_soon_threadsafe`, so the order is kept. Events may come twice and
from a moment before the listing: the driver tells by their time. Called by driver.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, Protocol

from docker.errors import DockerException
from docker.types import CancellableStream

from flyd.drivers.docker.engine import Engine
from flyd.drivers.docker.spec import LABEL_MACHINE, NANO, Seen
from flyd.drivers.docker.streams import close_stream
from flyd.errors import FlydError, Unavailable
from flyd.model import Value
from flyd.ports import Clock

RETRY_S = 0.5  # after the engine did not answer
REPLAY_S = 2  # the engine answers a moment before it begins to collect events for us


class EngineEvent(Value, frozen=True, kw_only=True):
    """Something happened to a container: `start`, `die` or `destroy`."""

    action: str
    machine_id: str
    container_id: str
    at_ns: int  # by the engine's clock


class Sink(Protocol):
    """Who is told; each call is made in the loop's thread."""

    def listed(self, running: list[Seen], listed_at_s: float) -> None:
        """All machines that ran when they were listed, at a monotonic time."""
        ...

    def happened(self, event: EngineEvent) -> None:
        """One event."""
        ...

    def down(self, error: FlydError) -> None:
        """The engine does not answer; the next call is `listed`, once it does."""
        ...


class EventReader:
    """Reads until it is closed."""

    def __init__(self, engine: Engine, sink: Sink, clock: Clock, name: str) -> None:
        self._engine = engine
        self._sink = sink
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._closed = threading.Event()
        self._stream: CancellableStream[dict[str, Any]] | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop reading; nothing is handed on any more."""
        self._closed.set()
        if (stream := self._stream) is not None:
            close_stream(stream)

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._read()
                error: FlydError = Unavailable("the Docker engine has closed its event stream")
            except FlydError as refused:
                error = refused
            except (OSError, ValueError, DockerException) as broken:  # a half-read event
                error = Unavailable(f"the Docker engine's event stream broke: {broken}")
            self._hand_on(self._sink.down, error)
            self._closed.wait(RETRY_S)

    def _read(self) -> None:
        self._engine.ensure_network()
        self._stream = self._engine.events(since_s=int(self._clock.wall_s()) - REPLAY_S)
        try:
            listed_at_s, listed_wall_s = self._clock.monotonic_s(), self._clock.wall_s()
            running = self._engine.list_own(running_only=True)
            self._hand_on(self._sink.listed, running, listed_at_s)
            for told in self._stream:
                if self._closed.is_set():
                    return
                event = _event(told)
                if event.action == "start" and event.at_ns < listed_wall_s * NANO:
                    continue  # replayed; if it still runs it is in the listing
                self._hand_on(self._sink.happened, event)
        finally:
            close_stream(self._stream)

    def _hand_on(self, tell: Callable[..., None], *arguments: object) -> None:
        if not self._closed.is_set():
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(tell, *arguments)


def _event(event: dict[str, Any]) -> EngineEvent:
    actor = event["Actor"]
    return EngineEvent(
        action=event["Action"],
        machine_id=actor["Attributes"].get(LABEL_MACHINE, ""),
        container_id=actor["ID"],
        at_ns=event["timeNano"],
    )
