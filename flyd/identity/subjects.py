"""Who a certificate names: `host:<name>:<membership>`, `user:<name>`, `join:<token id>`. Pure."""

from __future__ import annotations

import re
from typing import Literal, cast, get_args

from flyd.errors import InvalidInput
from flyd.model import Value

Kind = Literal["host", "user", "join"]

TOLD_FOR_S = 30 * 86400.0  # after a join token has ended, whoever comes with it is still told so
HOST_NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")  # with a membership it stays below X.520's 64 characters


class Subject(Value, frozen=True, kw_only=True):
    """Who it is. `membership` names one stay of a host in the cluster; empty for all others."""

    kind: Kind
    name: str
    membership: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}" + (f":{self.membership}" if self.membership else "")


def read_subject(common_name: str) -> Subject:
    """A certificate's common name again as who it is."""
    kind, _, rest = common_name.partition(":")
    name, _, membership = rest.partition(":")
    if kind not in get_args(Kind) or not name or (kind == "host") != bool(membership):
        raise InvalidInput(f"{common_name!r} names nobody of this cluster")
    return Subject(kind=cast(Kind, kind), name=name, membership=membership)


ANY_HOST = "any"
"""A name in every host's certificate, for those who ask whichever flyd answers; no host is called so."""


def check_host_name(name: str) -> None:
    """Refuse what can not be a host's name: it is part of certificates, keys and paths."""
    if not HOST_NAME.fullmatch(name) or name == ANY_HOST:
        raise InvalidInput(
            f"{name!r} can not be a host's name",
            hint="Use 1-40 lower-case letters, digits and -, beginning with a letter.",
        )


def host_dns_name(name: str) -> str:
    """The name under which one flyd checks that the other is the host that it means."""
    return f"{name}.host.flyd"
