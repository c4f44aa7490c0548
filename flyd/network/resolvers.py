"""Names that are not ours: asked of the system's resolvers, within a deadline.

Owns `SystemResolvers`. Invariants: at most MAX_FORWARDS questions are under way; each ends
within FORWARD_TIMEOUT_S; each goes out under an id of our own, from a port of its own, so that a
stranger can not guess an answer. Called by flyd/network/dns.py. Caches nothing: the
system's resolver does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import dns.asyncquery
import dns.exception
import dns.message
import structlog

from flyd.errors import Unavailable
from flyd.ports import Entropy

log = structlog.get_logger(__name__)

RESOLVER_PORT = 53
MAX_FORWARDS = 256
FORWARD_TRY_S = 1.5  # for each of the system's resolvers
FORWARD_TIMEOUT_S = 4.0  # for all; a client's resolver gives up after 5

Resolver = tuple[str, int]


def system_resolvers(own: str, path: Path = Path("/etc/resolv.conf")) -> tuple[Resolver, ...]:
    """The system's resolvers as its file says now, without ourselves."""
    words = (line.split() for line in path.read_text().splitlines())
    named = [w[1] for w in words if len(w) > 1 and w[0] == "nameserver"]
    return tuple((address, RESOLVER_PORT) for address in named if address != own)


class SystemResolvers:
    """The resolvers that `named` names each time."""

    def __init__(self, named: Callable[[], tuple[Resolver, ...]], entropy: Entropy) -> None:
        self._named = named
        self._entropy = entropy
        self._under_way = 0
        self._failing = False

    async def ask(self, query: dns.message.Message, *, tcp: bool) -> dns.message.Message:
        """The first answer of any of them; `Unavailable` if there is none in time."""
        if self._under_way >= MAX_FORWARDS:
            raise Unavailable(f"{MAX_FORWARDS} questions are under way to the system's resolvers")
        self._under_way += 1
        try:
            async with asyncio.timeout(FORWARD_TIMEOUT_S):
                response = await self._ask_each(query, tcp=tcp)
        except (TimeoutError, OSError, dns.exception.DNSException, Unavailable) as error:
            cause = str(error) or type(error).__name__
            if not self._failing:  # once an outage, not once a question
                log.warning("dns.forward_failed", name=str(query.question[0].name), error=cause)
            self._failing = True
            raise Unavailable(f"no resolver of the system answered: {cause}") from error
        finally:
            self._under_way -= 1
        self._failing = False
        return response

    async def _ask_each(self, query: dns.message.Message, *, tcp: bool) -> dns.message.Message:
        client_id = query.id
        query.id = int(self._entropy.token(2), 16)
        failure: Exception = Unavailable("/etc/resolv.conf names no resolver but this host itself")
        try:
            for address, port in self._named():
                try:
                    response = await _ask(query, address, port, tcp=tcp)
                except (OSError, dns.exception.DNSException) as error:
                    failure = error
                    continue
                response.id = client_id
                return response
        finally:
            query.id = client_id
        raise failure


async def _ask(query: dns.message.Message, address: str, port: int, *, tcp: bool) -> dns.message.Message:
    if tcp:
        return await dns.asyncquery.tcp(query, address, FORWARD_TRY_S, port)
    return await dns.asyncquery.udp(
        query, address, FORWARD_TRY_S, port, ignore_unexpected=True, ignore_errors=True
    )
