"""How an error crosses gRPC: its class as a status code, its message, its hint and its reasons.

`abort` (called by flyd/api/interceptor.py) makes a FlydError a status with trailing metadata; `from_rpc`
turns it back into the same class on the caller's side, so that the command prints what the server meant.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

import grpc
import grpc.aio

from flyd import errors

ERROR_KEY = "flyd-error-bin"
AGE_KEY = "flyd-age-s"  # on an answer made from a view that old, because etcd is not heard of

HANDSHAKE_WORDS = ("CERTIFICATE_VERIFY_FAILED", "Hostname Verification")
REFUSED_HINT = " It closes connections whose certificate it does not accept: expired, or of another cluster."

# A client refuses an answer with more than 8 KiB of metadata, and then knows nothing at all. The message
# is percent-encoded there, the rest is base64.
MESSAGE_MAX_BYTES = 3000
HINT_MAX_BYTES = 600
REASONS_MAX_BYTES = 1800

_CODES: dict[type[errors.FlydError], grpc.StatusCode] = {
    errors.FlydError: grpc.StatusCode.UNAVAILABLE,  # something failed, the caller's input did not
    errors.InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.Conflict: grpc.StatusCode.ABORTED,
    errors.Refused: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Denied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Unplaceable: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.OutcomeUnknown: grpc.StatusCode.UNAVAILABLE,
    errors.InvariantBroken: grpc.StatusCode.INTERNAL,
}
_CLASSES = {kind.__name__: kind for kind in _CODES}

Context = grpc.aio.ServicerContext[Any, Any]


async def abort(context: Context, error: errors.FlydError) -> None:
    """End the call with the error's code, message, hint and reasons."""
    detail: dict[str, Any] = {"class": type(error).__name__, "hint": _fitting(error.hint, HINT_MAX_BYTES)}
    if isinstance(error, errors.Unplaceable):
        detail["reasons"] = _fitting_reasons(error.reasons)
    context.set_trailing_metadata(((ERROR_KEY, json.dumps(detail, ensure_ascii=False).encode()),))
    code = next(_CODES[kind] for kind in type(error).__mro__ if kind in _CODES)
    await context.abort(code, _fitting(error.message, MESSAGE_MAX_BYTES))


def _fitting(text: str, most_bytes: int) -> str:
    """The text, or as much of its beginning as can be sent; what is no character is replaced."""
    encoded = 0
    for position, character in enumerate(text):
        encoded += (
            1 if " " <= character <= "~" and character != "%" else 3 * len(character.encode(errors="replace"))
        )
        if encoded > most_bytes:
            return text[:position] + "..."
    return text.encode(errors="replace").decode()


def _fitting_reasons(reasons: Mapping[str, str]) -> dict[str, str]:
    """As many hosts as can be sent, and how many there are besides."""
    shown: dict[str, str] = {}
    left_bytes = REASONS_MAX_BYTES
    for host, reason in reasons.items():
        left_bytes -= len(f"{host}{reason}".encode()) + len('"": "", ')
        if left_bytes < 0:
            shown["..."] = f"and {len(reasons) - len(shown)} other hosts"
            break
        shown[host] = reason
    return shown


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
    if code is grpc.StatusCode.UNAVAILABLE and any(word in message for word in HANDSHAKE_WORDS):
        return errors.Denied(
            f"flyd at {where} is not of the cluster that this certificate is of",
            hint="FLY_API and FLY_IDENTITY (or the context file) must name the same cluster.",
        )
    if code is grpc.StatusCode.UNAVAILABLE:
        return errors.Unavailable(
            f"flyd at {where} does not answer: {message}",
            hint="Is it running? `fly cluster status` shows; FLY_API names another flyd to ask."
            + (REFUSED_HINT if "Socket closed" in message else ""),
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
