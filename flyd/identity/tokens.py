"""Join tokens: leave to join, once, as one line of text that a person can paste.

A token is a client's certificate with its key, the cluster's authority of hosts (so that the
newcomer knows whom it talks to) and where flyd answers: `flyd1.<addresses>.<key>.<certificate>.<authority>`.
flyd's API admits it to one call, Join. Single use and expiry are decided by the token's record
in etcd, not by the certificate, which lasts TOLD_FOR_S longer: so a late or second use is told
why instead of failing in the handshake.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

from flyd.errors import InvalidInput
from flyd.identity import certificates
from flyd.identity.subjects import TOLD_FOR_S, Subject
from flyd.model import Authority, Value

PREFIX = "flyd1"


class Token(Value, frozen=True, kw_only=True):
    """What a token says; PEM texts."""

    api: tuple[str, ...]
    key: str
    certificate: str
    hosts_certificate: str


def token_text(
    clients: Authority,
    hosts_certificate: str,
    token_id: str,
    api: Sequence[str],
    *,
    now_s: float,
    lifetime_s: float,
) -> str:
    """A new token for the record `token_id`, which says when it really ends."""
    key = certificates.new_key()
    issued = certificates.issue(
        clients,
        certificates.public_key(key),
        Subject(kind="join", name=token_id),
        (),
        now_s=now_s,
        lifetime_s=lifetime_s + TOLD_FOR_S,
    )
    where = base64.urlsafe_b64encode(",".join(api).encode()).decode().rstrip("=")
    words = (
        PREFIX,
        where,
        certificates.key_to_text(key),
        certificates.certificate_to_text(issued.certificate_pem),
        certificates.certificate_to_text(hosts_certificate),
    )
    return ".".join(words)


def read_token(text: str) -> Token:
    """What a token's text says; InvalidInput if it is none, or was cut off when copied."""
    words = "".join(text.split()).split(".")
    if len(words) != 5 or words[0] != PREFIX:
        raise InvalidInput(
            "this is no join token: it begins with `flyd1.` and has five parts",
            hint="Copy the whole line that `fly hosts token` prints, or hand it over as a file.",
        )
    try:
        where = base64.urlsafe_b64decode(words[1] + "=" * (-len(words[1]) % 4)).decode()
    except ValueError:
        raise InvalidInput("the join token was changed or cut off: its addresses can not be read") from None
    return Token(
        api=tuple(where.split(",")),
        key=certificates.key_from_text(words[2]),
        certificate=certificates.certificate_from_text(words[3]),
        hosts_certificate=certificates.certificate_from_text(words[4]),
    )
