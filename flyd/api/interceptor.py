"""What stands before every servicer: messages are looked at (flyd/api/limits.py), callers admitted.

Every FlydError that a servicer raises becomes its status (flyd/api/status.py). Anything else is a bug: logged
with its traceback here, INTERNAL for the caller.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from flyd import errors
from flyd.api import limits
from flyd.api.status import AGE_KEY, Context, abort

log = structlog.get_logger(__name__)

STALE_AFTER_S = 5.0

# The handler's attribute for each (request streams, response streams).
_SHAPES = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}


class _Malformed:
    """Stands for a message whose bytes are none: gRPC would end the call as a bug of ours."""


def _reader(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if deserialize is None:
        return None

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Malformed()

    return read


def _checked(message: Any) -> Any:
    if isinstance(message, _Malformed):
        raise errors.InvalidInput(
            "the request's bytes are no such message", hint="Caller and flyd may have different versions."
        )
    limits.check(message)
    return message


class _CheckedMessages:
    """The messages of a client's stream, each looked at before the servicer sees it."""

    def __init__(self, messages: AsyncIterator[Any]) -> None:
        self._messages = aiter(messages)

    def __aiter__(self) -> _CheckedMessages:
        return self

    async def __anext__(self) -> Any:
        return _checked(await anext(self._messages))


if TYPE_CHECKING:  # generic in its stubs only
    _Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    _Interceptor = grpc.aio.ServerInterceptor


class ErrorInterceptor(_Interceptor):
    """Wraps every handler so that a raised FlydError becomes its status.

    `admit` raises where the caller may not use the method. `stale_s` tells how old the view is
    that answers are made from; what is older than STALE_AFTER_S is marked so.
    """

    def __init__(self, stale_s: Callable[[], float], admit: Callable[[str, Context], None]) -> None:
        self._stale_s = stale_s
        self._admit = admit

    def _mark_age(self, context: Context) -> None:
        if (age_s := self._stale_s()) > STALE_AFTER_S:
            context.set_trailing_metadata(((AGE_KEY, f"{age_s:.0f}"),))

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Replace the handler's function, whatever its streaming shape, by a guarded one."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        shape = _SHAPES[handler.request_streaming, handler.response_streaming]
        guard = _guard_stream if handler.response_streaming else _guard_unary
        make = getattr(cast(Any, grpc), f"{shape}_rpc_method_handler")
        check = _CheckedMessages if handler.request_streaming else _checked
        admit = self._admit if method.startswith("/flyd.") else _admit_all  # health, reflection
        return make(
            guard(getattr(handler, shape), method, check, admit, self._mark_age),
            _reader(handler.request_deserializer),
            handler.response_serializer,
        )


def _admit_all(method: str, context: Context) -> None:
    """Whoever is let into the handshake may use gRPC's own services."""


def _guard_unary(
    behaviour: Callable[[Any, Context], Awaitable[Any]],
    method: str,
    check: Callable[[Any], Any],
    admit: Callable[[str, Context], None],
    mark_age: Callable[[Context], None],
) -> Callable[[Any, Context], Awaitable[Any]]:
    async def guarded(request: Any, context: Context) -> Any:
        try:
            admit(method, context)
            answer = await behaviour(check(request), context)
            mark_age(context)
            return answer
        except (grpc.aio.AbortError, grpc.aio.InternalError):
            raise  # the servicer has ended the call itself, or the client is gone: gRPC's matter
        except Exception as error:  # noqa: BLE001 - what is not ours is logged as a bug
            await _end(context, method, error)

    return guarded


def _guard_stream(
    behaviour: Callable[[Any, Context], AsyncGenerator[Any] | Awaitable[None]],
    method: str,
    check: Callable[[Any], Any],
    admit: Callable[[str, Context], None],
    mark_age: Callable[[Context], None],
) -> Callable[[Any, Context], Awaitable[None]]:
    async def guarded(request: Any, context: Context) -> None:
        try:
            admit(method, context)
            responses = behaviour(check(request), context)
            if isinstance(responses, Awaitable):  # it writes them itself, as gRPC's own services do
                await responses
            else:
                await _write_all(responses, context)
            mark_age(context)
        except (grpc.aio.AbortError, grpc.aio.InternalError):
            raise  # the servicer has ended the call itself, or the client is gone: gRPC's matter
        except Exception as error:  # noqa: BLE001 - what is not ours is logged as a bug
            await _end(context, method, error)

    return guarded


async def _write_all(responses: AsyncGenerator[Any], context: Context) -> None:
    """Write what a servicer yields; when the client is gone, cancel the servicer at its yield.

    gRPC would leave it there to be collected, and no task group lives through that: it cancels what it
    runs only where it is cancelled itself.
    """
    async for response in responses:
        try:
            await context.write(response)
        except (asyncio.CancelledError, grpc.aio.InternalError):
            with suppress(asyncio.CancelledError, StopAsyncIteration):
                await responses.athrow(asyncio.CancelledError())
            raise


async def _end(context: Context, method: str, error: Exception) -> None:
    meant = _meant(error)
    if meant is None:
        log.error("api.bug", method=method, exc_info=error)
        meant = _as_bug(method, error)
    elif isinstance(meant, errors.InvariantBroken):
        log.error("api.invariant_broken", method=method, error=meant.message)
    await abort(context, meant)


def _meant(error: Exception) -> errors.FlydError | None:
    """The error as it was raised on purpose, also out of a task group; None: a bug."""
    if isinstance(error, ExceptionGroup):
        inner = [_meant(one) for one in cast("ExceptionGroup[Exception]", error).exceptions]
        return None if None in inner else inner[0]
    return error if isinstance(error, errors.FlydError) else None


def _as_bug(method: str, bug: Exception) -> errors.InvariantBroken:
    """Ours, not the caller's: the traceback stays in the log, the caller hears where to look."""
    return errors.InvariantBroken(
        f"a bug in flyd: {method} raised {type(bug).__name__}: {bug}",
        hint="flyd's log on that host has the traceback.",
    )
