"""Who may use which call: by the certificate that the caller showed in the handshake.

Hosts and people may use everything, a join token the one call that uses it up, an expelled
host nothing. That somebody shows a certificate of this cluster at all is certain here: the
handshake lets nobody else in (flyd/identity/credentials.py).
"""

from __future__ import annotations

from typing import Any

import grpc.aio

from flyd.errors import Denied, InvalidInput
from flyd.hosts.joining import expelled_error
from flyd.identity.subjects import Subject, read_subject
from flyd.model import Membership
from flyd.store import keys
from flyd.store.mirror import Mirror

JOIN_METHOD = "/flyd.v1.IdentityService/Join"
COMMON_NAME = "x509_common_name"


def caller(context: grpc.aio.ServicerContext[Any, Any]) -> Subject:
    """Who calls, by the certificate that it showed."""
    name = b"".join(context.auth_context().get(COMMON_NAME, ())).decode(errors="replace")
    try:
        return read_subject(name)
    except InvalidInput as error:
        raise Denied(error.message, hint="The certificate was made by something else than flyd.") from None


def check(subject: Subject, method: str, membership: Membership | None) -> None:
    """Raise Denied where the subject may not use the method. `membership` is that of the subject's host."""
    if subject.kind == "join" and method != JOIN_METHOD:
        raise Denied("a join token is good for joining alone", hint="`fly hosts join` uses it.")
    if subject.kind == "host":
        if membership is None:
            raise Denied(f"host {subject.name} is no member of this cluster")
        if membership.id != subject.membership or membership.expelled_at_s:
            raise expelled_error(membership)


class Admission:
    """The check as flyd's server calls it, with the memberships of the mirror."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror

    def __call__(self, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Raise Denied unless the caller may use the method."""
        subject = caller(context)
        found = (
            self._mirror.get(keys.membership(subject.name), Membership) if subject.kind == "host" else None
        )
        check(subject, method, found.value if found else None)
