"""Sends hostile calls as bytes, and says how they ended."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import grpc.aio

from flyd.api.status import ERROR_KEY
from flyd.identity.credentials import Credentials, SecureChannel
from flyd.identity.subjects import ANY_HOST, host_dns_name
from integration.hostile_calls import Call

ANSWER_S = 5.0
AGAIN_S = 30.0
WAIT_S = 0.2  # the deadline of calls that may wait
CUT_S = 0.01
ANSWERS_READ = 50

Code = grpc.StatusCode
TYPED = (
    Code.OK,
    Code.INVALID_ARGUMENT,
    Code.NOT_FOUND,
    Code.ABORTED,
    Code.FAILED_PRECONDITION,
    Code.PERMISSION_DENIED,
    Code.RESOURCE_EXHAUSTED,
    Code.UNIMPLEMENTED,
)


class Channels:
    """To one flyd: for calls within the loop, and for those in threads."""

    def __init__(self, credentials: Credentials, address: str) -> None:
        self.steady = SecureChannel(address, credentials, (), host_dns_name(ANY_HOST))
        self.blocking = credentials.open_channel(address)

    async def close(self) -> None:
        """Both."""
        await self.steady.close()
        self.blocking.close()


def is_typed(call: Call, code: grpc.StatusCode, said_by_flyd: bool) -> bool:
    """Whether a caller learns from the status what was wrong with the call."""
    if code is Code.DEADLINE_EXCEEDED:
        return call.may_wait or call.manner == "half"
    if code is Code.CANCELLED:
        return call.manner == "cut"
    return code in TYPED or (code is Code.UNAVAILABLE and said_by_flyd)


async def outcome(channels: Channels, call: Call) -> tuple[grpc.StatusCode, bool, str]:
    """The status of a call, and whether flyd itself said it."""
    if call.client_streams:
        # Where the server ends a call early, grpc.aio's client makes an error of its own of it.
        return await asyncio.to_thread(stream_outcome, channels.blocking, call)
    raw: Any = channels.steady.get()
    make = raw.unary_stream if call.server_streams else raw.unary_unary
    begun = make(call.method)(call.messages[0], timeout=WAIT_S if call.may_wait else ANSWER_S)
    if call.manner == "cut":
        asyncio.get_running_loop().call_later(CUT_S, begun.cancel)
    try:
        if not call.server_streams:
            await begun
            return Code.OK, True, ""
        left = ANSWERS_READ
        async for _ in begun:
            if (left := left - 1) == 0:
                begun.cancel()
                break
    except grpc.aio.AioRpcError as error:
        return status_of(error)
    except asyncio.CancelledError:
        if not begun.cancelled():
            raise
        return Code.CANCELLED, False, ""
    return Code.OK, True, ""


def outcome_again(channels: Channels, call: Call) -> tuple[grpc.StatusCode, bool, str]:
    """The same call once more, by gRPC's other client: was it the server that did not answer, or we?

    Within a thread. Only for calls with one request.
    """
    raw: Any = channels.blocking
    try:
        if call.server_streams:
            begun = raw.unary_stream(call.method)(call.messages[0], timeout=AGAIN_S)
            for _, _ in zip(begun, range(ANSWERS_READ), strict=False):
                pass
            begun.cancel()
        else:
            raw.unary_unary(call.method)(call.messages[0], timeout=AGAIN_S)
    except grpc.RpcError as error:
        return status_of(error)
    return Code.OK, True, ""


def stream_outcome(channel: grpc.Channel, call: Call) -> tuple[grpc.StatusCode, bool, str]:
    """The same of a call with a stream of requests; within a thread."""
    raw: Any = channel
    waits = call.may_wait or call.manner == "half"
    over = threading.Event()

    def messages() -> Iterator[bytes]:
        yield from call.messages
        if call.manner != "whole":
            over.wait(WAIT_S)

    make = raw.stream_stream if call.server_streams else raw.stream_unary
    method = make(call.method)
    try:
        if call.server_streams:
            begun = method(messages(), timeout=WAIT_S if waits else ANSWER_S)
            if call.manner == "cut":
                over.wait(CUT_S)
                begun.cancel()
            for _, _ in zip(begun, range(ANSWERS_READ), strict=False):
                pass
            begun.cancel()
        else:
            begun = method.future(messages(), timeout=WAIT_S if waits else ANSWER_S)
            if call.manner == "cut":
                over.wait(CUT_S)
                begun.cancel()
            begun.result()
    except grpc.FutureCancelledError:
        return Code.CANCELLED, False, ""
    except grpc.RpcError as error:
        return status_of(error)
    finally:
        over.set()
    return Code.OK, True, ""


def status_of(error: Any) -> tuple[grpc.StatusCode, bool, str]:
    """The code, whether flyd said it, and the words."""
    told = [key for key, _ in error.trailing_metadata() or ()]
    return error.code(), ERROR_KEY in told, error.details() or ""
