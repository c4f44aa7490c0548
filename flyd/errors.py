"""Every error that flyd raises on purpose, as one tree.

    FlydError
    ├── InvalidInput         the caller's input can never work        (exit code 2)
    ├── NotFound             the named thing does not exist           (exit code 3)
    ├── Conflict             somebody else changed or holds it        (exit code 4)
    ├── Refused              understood, and declined with a reason   (exit code 5)
    │   ├── Unplaceable      no host can take it; each host's reason
    │   └── Denied           whoever asks may not
    ├── Unavailable          a part we need did not answer in time    (exit code 6)
    │   └── OutcomeUnknown   a write may or may not have happened
    ├── Compacted            a watch asked for history that is gone
    └── InvariantBroken      our own bug: stop and say so             (exit code 70)

A message says what failed, where and why; `hint` says what to do about it. An
error crosses gRPC as its code, its message and its hint (flyd/api/status.py) and
is shown by the command with the exit code above (flyd/cli/output.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class FlydError(Exception):
    """Base of all deliberate errors: a message for a person, and what to do next."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InvalidInput(FlydError):
    """The input is wrong and trying again will not help: fix the input."""

    exit_code = 2


class NotFound(FlydError):
    """The named app, machine, volume, host or release does not exist."""

    exit_code = 3


class Conflict(FlydError):
    """Somebody else changed, created or holds the thing; read again and decide again."""

    exit_code = 4


class Refused(FlydError):
    """The request is understood and declined; the message says which rule and why."""

    exit_code = 5


class Unplaceable(Refused):
    """No host can take the machine. `reasons` maps each host's name to its reason.

    `lost` names those hosts that would take it if they were back.
    """

    def __init__(
        self, message: str, reasons: Mapping[str, str], *, hint: str = "", lost: Sequence[str] = ()
    ) -> None:
        super().__init__(message, hint=hint)
        self.reasons = dict(reasons)
        self.lost = tuple(lost)


class Denied(Refused):
    """Whoever asks may not: a used token, an expelled host, a certificate that names nobody here."""


class Unavailable(FlydError):
    """A part that we need (etcd, a host, Postgres) did not answer within its deadline."""

    exit_code = 6


class OutcomeUnknown(Unavailable):
    """A write was sent and no answer came: it may have happened. Read before writing again."""


class Compacted(FlydError):
    """A watch asked for revisions that etcd has compacted: list again, then watch from there."""

    def __init__(self, compact_revision: int) -> None:
        super().__init__(f"history before revision {compact_revision} is compacted")
        self.compact_revision = compact_revision


class InvariantBroken(FlydError):
    """Something that can not happen did: a bug in flyd. Nothing is repaired by going on."""

    exit_code = 70
