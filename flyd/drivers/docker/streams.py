"""A blocking stream of the Docker SDK, read by a thread of its own, as something to await.

Owns that thread: it ends with the stream, or when the reader closes. A slow reader slows the
stream down (QUEUE_MAX). Called by driver.py for logs and exec.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from docker.types import CancellableStream

T = TypeVar("T")

QUEUE_MAX = 256  # items read ahead of a slow reader


class ThreadedStream(Generic[T]):
    """Opened and read in a thread; `next` answers None at its end, and raises what opening raised."""

    def __init__(self, open_stream: Callable[[], CancellableStream[T]], name: str) -> None:
        self._open = open_stream
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[T | BaseException | None] = asyncio.Queue()
        self._slots = threading.Semaphore(QUEUE_MAX)
        self._lock = threading.Lock()
        self._closed = False
        self._stream: CancellableStream[T] | None = None
        threading.Thread(target=self._read, name=name, daemon=True).start()

    async def next(self) -> T | None:
        """The next item."""
        item = await self._items.get()
        self._slots.release()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stop reading; the thread ends soon after."""
        with self._lock:
            self._closed = True
            stream = self._stream
        self._slots.release()
        if stream is not None:
            close_stream(stream)

    def _read(self) -> None:
        end: BaseException | None = None
        try:
            stream = self._open()
            with self._lock:
                self._stream = stream
                closed = self._closed
            if closed:
                close_stream(stream)
                return
            for item in stream:
                self._slots.acquire()
                if self._closed:
                    return
                self._hand_on(item)
        except Exception as error:  # noqa: BLE001 - the reader gets it
            end = error
        finally:
            self._hand_on(end)

    def _hand_on(self, item: T | BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)


def close_stream(stream: CancellableStream[T]) -> None:
    """Wake up its reader; one that has ended by itself has no socket any more."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        stream.close()
