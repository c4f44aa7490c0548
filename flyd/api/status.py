"""How an error crosses gRPC: its class as a status code, its message, its hint and its reasons.

The server's interceptor turns every FlydError that a servicer raises into a status with
trailing metadata; `from_rpc` turns it back into the same class on the caller's side, so
that the command prints what the server meant. Anything else is a bug: logged with its
traceback on the server, INTERNAL for the caller.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

import grpc
import grpc.aio
import structlog

from flyd import errors

log = structlog.get_logger(__name__)

ERROR_KEY = "flyd-error-bin"
AGE_KEY = "flyd-age-s"  # on an answer made from a view that old, because etcd is not heard of
STALE_AFTER_S = 5.0

_CODES: dict[type[errors.FlydError], grpc.StatusCode] = {
    errors.InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.Conflict: grpc.StatusCode.ABORTED,
    errors.Refused: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Unplaceable: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.OutcomeUnknown: grpc.StatusCode.UNAVAILABLE,
    errors.InvariantBroken: grpc.StatusCode.INTERNAL,
}
_CLASSES = {kind.__name__: kind for kind in _CODES}

Context = grpc.aio.ServicerContext[Any, Any]


async def abort(context: Context, error: errors.FlydError) -> None:
    """End the call with the error's code, message, hint and reasons."""
    detail: dict[str, Any] = {"class": type(error).__name__, "hint": error.hint}
    if isinstance(error, errors.Unplaceable):
        detail["reasons"] = error.reasons
    context.set_trailing_metadata(((ERROR_KEY, json.dumps(detail).encode()),))
    await context.abort(_CODES.get(type(error), grpc.StatusCode.UNKNOWN), error.message)


def from_rpc(error: grpc.aio.AioRpcError, where: str) -> errors.FlydError:
    """The server's error again; or, if none of ours, what it means that `where` did not answer."""
    metadata = error.trailing_metadata()
    raw: object = dict(iter(cast(Any, metadata))).get(ERROR_KEY) if metadata else None
    message = error.details() or ""
    if isinstance(raw, bytes):
        detail = cast(dict[str, Any], json.loads(raw))
        kind = _CLASSES.get(str(detail.get("class")), errors.FlydError)
        if kind is errors.Unplaceable:
            return errors.Unplaceable(message, detail.get("reasons", {}), hint=detail.get("hint", ""))
        return kind(message, hint=detail.get("hint", ""))
    code = error.code()
    if code is grpc.StatusCode.UNAVAILABLE:
        return errors.Unavailable(
            f"flyd at {where} does not answer: {message}",
            hint="Is it running? `fly cluster status` shows; FLY_API names another flyd to ask.",
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.Unavailable(
            f"flyd at {where} did not answer in time",
            hint="It may be waiting for etcd: `fly hosts list` and `fly cluster status` tell more.",
        )
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return errors.InvalidInput(f"the message is too large for flyd at {where}: {message}")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return errors.Refused(
            f"flyd at {where} does not know this call: {message}",
            hint="The command and flyd have different versions; `fly version` shows both.",
        )
    return errors.FlydError(
        f"flyd at {where} failed: {code.name} {message}", hint="flyd's log has the details."
    )


# The handler's attribute for each (request streams, response streams).
_SHAPES = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}


if TYPE_CHECKING:  # generic in its stubs only
    _Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    _Interceptor = grpc.aio.ServerInterceptor


class ErrorInterceptor(_Interceptor):
    """Wraps every handler so that a raised FlydError becomes its status.

    `stale_s` tells how old the view is that answers are made from; what is older than
    STALE_AFTER_S is marked so.
    """

    def __init__(self, stale_s: Callable[[], float]) -> None:
        self._stale_s = stale_s

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
        if handler is None or not handler_call_details.method.startswith("/flyd."):
            return handler
        shape = _SHAPES[handler.request_streaming, handler.response_streaming]
        guard = _guard_stream if handler.response_streaming else _guard_unary
        make = getattr(cast(Any, grpc), f"{shape}_rpc_method_handler")
        return make(
            guard(getattr(handler, shape), handler_call_details.method, self._mark_age),
            handler.request_deserializer,
            handler.response_serializer,
        )


def _guard_unary(
    behaviour: Callable[[Any, Context], Awaitable[Any]], method: str, mark_age: Callable[[Context], None]
) -> Callable[[Any, Context], Awaitable[Any]]:
    async def guarded(request: Any, context: Context) -> Any:
        try:
            answer = await behaviour(request, context)
            mark_age(context)
            return answer
        except errors.FlydError as error:
            await _end(context, method, error)
        except Exception as bug:
            log.exception("api.bug", method=method)
            await abort(context, _as_bug(method, bug))

    return guarded


def _guard_stream(
    behaviour: Callable[[Any, Context], AsyncIterator[Any]], method: str, mark_age: Callable[[Context], None]
) -> Callable[[Any, Context], AsyncIterator[Any]]:
    async def guarded(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            async for response in behaviour(request, context):
                yield response
            mark_age(context)
        except errors.FlydError as error:
            await _end(context, method, error)
        except Exception as bug:
            log.exception("api.bug", method=method)
            await abort(context, _as_bug(method, bug))

    return guarded


async def _end(context: Context, method: str, error: errors.FlydError) -> None:
    if isinstance(error, errors.InvariantBroken):
        log.error("api.invariant_broken", method=method, error=error.message)
    await abort(context, error)


def _as_bug(method: str, bug: Exception) -> errors.InvariantBroken:
    """Ours, not the caller's: the traceback stays in the log, the caller hears where to look."""
    return errors.InvariantBroken(
        f"a bug in flyd: {method} raised {type(bug).__name__}: {bug}",
        hint="flyd's log on that host has the traceback.",
    )
