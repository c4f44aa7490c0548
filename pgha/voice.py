"""The agents of a cluster talk past etcd: ports.Voice over UDP, on the port that Postgres has for TCP.

One datagram asks, one answers. Each carries a MAC made with the cluster's replication password, and an
answer the number of its question, so it cannot be taken for that of another. A question that is heard
twice only makes a voter wait longer. Made by pgha/main.py. Decides nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import os
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from flyd.model import Value
from pgha.model import Plea

MAC_BYTES = 32
MOST_QUEUED = 100
M = TypeVar("M", "Question", "Reply")


class Question(Value, frozen=True, kw_only=True):
    """A plea and the number that its answer repeats."""

    number: bytes
    plea: Plea


class Reply(Value, frozen=True, kw_only=True):
    """An answer to one question."""

    number: bytes
    yes: bool


class UdpVoice:
    """ports.Voice. `address`: host:port where this member's agent is asked."""

    def __init__(self, address: str, password: str) -> None:
        self._here = _place(address)
        self._key = hashlib.sha256(b"pgha voice\0" + password.encode()).digest()

    async def ask(self, address: str, plea: Plea, timeout_s: float) -> bool:
        """One datagram; whatever is not the answer to it is passed over."""
        question = Question(number=os.urandom(16), plea=plea)
        heard: asyncio.Queue[tuple[bytes, tuple[str, int]]] = asyncio.Queue(MOST_QUEUED)
        try:
            async with asyncio.timeout(timeout_s):
                transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
                    lambda: _Ear(heard), remote_addr=_place(address)
                )
                try:
                    transport.sendto(self._sealed(question))
                    while True:
                        reply = self._opened((await heard.get())[0], Reply)
                        if reply is not None and reply.number == question.number:
                            return reply.yes
                finally:
                    transport.close()
        except (OSError, TimeoutError):
            return False

    async def listen(self, answer: Callable[[Plea], Awaitable[bool]]) -> None:
        """Each question in a task of its own: answering takes a look at etcd."""
        heard: asyncio.Queue[tuple[bytes, tuple[str, int]]] = asyncio.Queue(MOST_QUEUED)
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: _Ear(heard), local_addr=self._here
        )

        async def settle(question: Question, asker: tuple[str, int]) -> None:
            reply = Reply(number=question.number, yes=await answer(question.plea))
            transport.sendto(self._sealed(reply), asker)

        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    data, asker = await heard.get()
                    question = self._opened(data, Question)
                    if question is not None:
                        group.create_task(settle(question, asker))
        finally:
            transport.close()

    def _sealed(self, message: Question | Reply) -> bytes:
        body = msgspec.json.encode(message)
        return self._mac(type(message), body) + body

    def _opened(self, data: bytes, kind: type[M]) -> M | None:
        """The message, if somebody who knows the password sent it as such."""
        mac, body = data[:MAC_BYTES], data[MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(kind, body)):
            return None
        return msgspec.json.decode(body, type=kind)

    def _mac(self, kind: type[Question | Reply], body: bytes) -> bytes:
        return hmac.digest(self._key, kind.__name__.encode() + body, "sha256")


class _Ear(asyncio.DatagramProtocol):
    """Puts what comes into a queue; drops it when that is full."""

    def __init__(self, heard: asyncio.Queue[tuple[bytes, tuple[str, int]]]) -> None:
        self._heard = heard

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        with contextlib.suppress(asyncio.QueueFull):
            self._heard.put_nowait((data, (addr[0], addr[1])))


def _place(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
