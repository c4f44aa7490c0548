"""Which cluster the command talks to, and how calls are made.

FLY_API (one or more host:port, by commas) wins; else the context file that
`fly cluster up` writes. Any flyd can answer; the first that connects is used. Who asks
shows a certificate: FLY_IDENTITY names its folder, else the context file does.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc

from flyd.api.status import AGE_KEY, from_rpc
from flyd.errors import InvalidInput, Unavailable
from flyd.identity.credentials import Credentials

R = TypeVar("R")

CALL_TIMEOUT_S = 15.0
ENV = "FLY_API"
IDENTITY_ENV = "FLY_IDENTITY"

_ages_s: list[int] = []  # of this command's answers that were made from an old view


def context_path() -> Path:
    """The file that remembers the cluster."""
    config = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(config) / "flyd" / "context.json"


def save_context(api: tuple[str, ...], identity: Path) -> None:
    """Remember a cluster, and who we are to it, for the next command."""
    path = context_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"api": list(api), "identity": str(identity)}) + "\n")


def forget_context(api: tuple[str, ...]) -> None:
    """Forget the cluster if it is the one remembered."""
    if remembered() == api:
        context_path().unlink(missing_ok=True)


def remembered() -> tuple[str, ...]:
    """The addresses in the context file; empty if there is none."""
    return tuple(_context().get("api", ()))


def identity() -> Credentials:
    """Who we are to the cluster: the certificate to show."""
    chosen = os.environ.get(IDENTITY_ENV) or _context().get("identity")
    if not chosen:
        raise Unavailable(
            "flyd answers nobody without a certificate, and none is known here",
            hint=f"{IDENTITY_ENV}=FOLDER names yours. `fly cluster up` and `fly hosts found` make the first.",
        )
    return Credentials(Path(chosen))


def _context() -> dict[str, Any]:
    try:
        found: object = json.loads(context_path().read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return cast(dict[str, Any], found) if isinstance(found, dict) else {}


def addresses() -> tuple[str, ...]:
    """Where flyd answers, or an error that says how to tell."""
    chosen = os.environ.get(ENV, "")
    found = tuple(part.strip() for part in chosen.split(",") if part.strip()) or remembered()
    if not found:
        raise Unavailable(
            "no cluster is known here",
            hint=f"`fly cluster up` starts one on this machine; {ENV}=HOST:PORT names one elsewhere.",
        )
    for address in found:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise InvalidInput(
                f"{address!r} is not an address of flyd",
                hint=f"{ENV} is one or more HOST:PORT, by commas, like 127.11.0.1:4280,127.12.0.1:4280.",
            )
    return found


def resolved(address: str) -> str:
    """The address with a number for the host's name, as gRPC's list of addresses needs it."""
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host, int(port), socket.AF_INET, socket.SOCK_STREAM)
    except (OSError, OverflowError) as error:
        raise Unavailable(
            f"the host of {address} can not be found: {error}",
            hint=f"{ENV} or {context_path()} names it; `fly cluster status` shows a cluster on this machine.",
        ) from None
    return f"{found[0][4][0]}:{port}"


@functools.cache
def channel() -> grpc.Channel:
    """One channel to the first address that connects."""
    return identity().open_channel(
        "ipv4:" + ",".join(resolved(a) for a in addresses()), (("grpc.max_reconnect_backoff_ms", 1000),)
    )


def call(method: Callable[..., R], request: object, timeout_s: float = CALL_TIMEOUT_S) -> R:
    """One call with a deadline; a failure as our own error. The answer's age is kept for `check_age`."""
    try:
        answer, ended = cast(Any, method).with_call(request, timeout=timeout_s)
        for key, value in ended.trailing_metadata() or ():
            if key == AGE_KEY:
                _ages_s.append(int(value))
        return answer
    except grpc.RpcError as error:
        raise from_rpc(cast(Any, error), ",".join(addresses())) from None


def check_age() -> None:
    """Raise if what was shown is old, because etcd is not heard of: it may have changed since."""
    if _ages_s:
        raise Unavailable(
            f"etcd does not answer: what is shown was known {max(_ages_s)} s ago and may have changed",
            hint="Machines run on. `fly cluster status` shows etcd's members; a majority must be up.",
        )


def stream(method: Callable[..., Any], request: object) -> Iterator[Any]:
    """A streaming call; a failure as our own error."""
    try:
        yield from method(request)
    except grpc.RpcError as error:
        raise from_rpc(cast(Any, error), ",".join(addresses())) from None


def app_name(given: str | None) -> str:
    """--app, else `app` of ./fly.toml, else an error."""
    if given:
        return given
    try:
        name = tomllib.loads(Path("fly.toml").read_text()).get("app")
    except FileNotFoundError:
        name = None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"fly.toml can not be read: {error}", hint="Give --app NAME instead.") from None
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"fly.toml: {error}", hint="`fly config validate` shows the place.") from None
    if not isinstance(name, str):
        raise InvalidInput("which app?", hint="Give --app NAME, or go to a folder whose fly.toml names it.")
    return name
