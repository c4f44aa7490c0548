"""What the Docker engine refuses, as flyd's own errors: what failed, on which host, why, what to do.

Pure but for the types of the SDK. Called by docker_engine.py around every call.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import requests
from docker.errors import APIError, DockerException, ImageNotFound

from flyd.errors import Conflict, FlydError, InvalidInput, NotFound, Refused, Unavailable

# The engine has no codes of its own for these, only words: (words in its message, our error, what to do).
_KNOWN: tuple[tuple[str, type[FlydError], str], ...] = (
    ("no space left", Unavailable, "`docker system df` on that host shows what fills its disk."),
    ("address already in use", Conflict, "`docker network inspect` on that host shows who has the address."),
    ("pool overlaps", Conflict, "`docker network ls` and `ip route` on that host show who has the subnet."),
    ("not contained within", InvalidInput, "The machine's address must be inside its host's subnet."),
    ("no configured subnet", InvalidInput, "The machine's address must be inside its host's subnet."),
    ("bind source path does not exist", NotFound, "Is the volume's disk mounted on that host?"),
    ("unable to find user", InvalidInput, "The image has no such user; see the machine's `run_as`."),
    (
        "docker-init",
        Unavailable,
        "Install the engine's init on that host: apt-get install tini (docker-init).",
    ),
    (
        "is already in use by container",
        Conflict,
        "`docker ps -a` on that host shows it; flyd deletes only its own.",
    ),
    (
        "no command specified",
        InvalidInput,
        "The image has neither CMD nor ENTRYPOINT: set `[processes]` in fly.toml.",
    ),
    ("minimum memory limit", InvalidInput, "Give the machine more memory: `[[vm]] memory` in fly.toml."),
)


@contextmanager
def translated(host: str, what: str) -> Generator[None, None, None]:
    """Run a call to the engine; `what` says in a few words what was being done."""
    try:
        yield
    except ImageNotFound as error:
        raise NotFound(
            f"cannot {what} on host {host}: {error.explanation or error}",
            hint="Deploy again: that moves the image to the host. `docker images` there shows what it has.",
        ) from error
    except APIError as error:
        raise _of_answer(host, what, error) from error
    except (requests.RequestException, DockerException, OSError) as error:
        raise Unavailable(
            f"cannot {what}: the Docker engine of host {host} does not answer: {_reason(error)}",
            hint="`systemctl status docker` on that host; may flyd open the engine's socket?",
        ) from error


def _of_answer(host: str, what: str, error: APIError) -> FlydError:
    why = " ".join((error.explanation or str(error)).split())
    message = f"cannot {what} on host {host}: Docker says: {why}"
    for words, kind, hint in _KNOWN:
        if words in why.lower():
            return kind(message, hint=hint)
    status = error.status_code or 500
    if status == 404:
        return NotFound(message)
    if status == 409:
        return Conflict(message, hint="Something else is at work on it: try again.")
    if status == 400:
        return InvalidInput(message)
    if status < 500:
        return Refused(message)
    return Unavailable(message, hint="`journalctl -u docker` on that host says more.")


def _reason(error: Exception) -> str:
    """The innermost words: the SDK wraps a refused connection five times."""
    inner: BaseException = error
    while inner.__cause__ or inner.__context__:
        inner = inner.__cause__ or inner.__context__ or inner
    return str(inner) or type(inner).__name__
