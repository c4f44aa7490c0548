"""Packets in, packets out: no socket. integration/test_dns.py has those."""

from __future__ import annotations

import asyncio
from pathlib import Path

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flyd.model import App, encode
from flyd.network.dns import DnsServer
from flyd.network.resolvers import system_resolvers
from flyd.ports import Put
from flyd.store import keys
from flyd.store.memory import MemoryEtcd, MemoryKV
from flyd.store.mirror import Mirror
from flyd.store.system import SystemClock, SystemEntropy
from tests.support import edge as values

HOST = msgspec.structs.replace(values.host("ams", address="10.11.0.1"), subnet="10.11")


def server() -> tuple[DnsServer, Mirror, MemoryKV]:
    kv = MemoryKV(MemoryEtcd())
    mirror = Mirror(kv, (keys.ROOT,))
    return DnsServer(HOST, mirror, kv, clock=SystemClock(), entropy=SystemEntropy()), mirror, kv


async def filled() -> DnsServer:
    dns_server, mirror, kv = server()
    machine = values.machine("m1", "ams", ip="10.11.0.2")
    await kv.txn(
        [],
        [
            Put(keys.app("chat"), encode(App(name="chat"))),
            Put(keys.machine("chat", "m1"), encode(machine)),
            Put(keys.status("chat", "m1"), encode(values.status(machine))),
        ],
    )
    task = asyncio.ensure_future(mirror.keep())  # noqa: TID251
    await mirror.wait_synced()
    task.cancel()
    return dns_server


def ask(dns_server: DnsServer, name: str, kind: str = "A") -> dns.message.Message | None:
    query = dns_server.parse(dns.message.make_query(name, kind).to_wire())
    assert query is not None
    return dns_server.answer(query, "10.11.0.9")


async def test_an_answer_is_ours_and_short_lived() -> None:
    response = ask(await filled(), "cHat.internal.")
    assert response is not None
    assert response.flags & dns.flags.AA
    assert response.flags & dns.flags.RA
    assert response.answer[0].to_text() == "cHat.internal. 5 IN A 10.11.0.2"


async def test_absence_is_said_with_its_time() -> None:
    dns_server = await filled()
    missing = ask(dns_server, "nobody.internal")
    empty = ask(dns_server, "chat.internal", "AAAA")
    assert missing is not None
    assert empty is not None
    assert (missing.rcode(), empty.rcode()) == (dns.rcode.NXDOMAIN, dns.rcode.NOERROR)
    assert all(m.authority[0].rdtype == dns.rdatatype.SOA and not m.answer for m in (missing, empty))
    assert dns_server.figures().answered == 2
    assert dns_server.figures().no_such_name == 1


async def test_before_the_first_view_nothing_is_denied() -> None:
    dns_server, _, _ = server()
    response = ask(dns_server, "chat.internal")
    assert response is not None
    assert response.rcode() == dns.rcode.SERVFAIL


async def test_others_names_are_left_to_others() -> None:
    assert ask(await filled(), "example.com") is None


@pytest.mark.parametrize(
    ("source", "served"),
    [
        ("10.11.3.4", True),
        ("10.11.0.1", True),
        ("127.0.0.1", True),
        ("10.12.0.2", False),
        ("192.0.2.7", False),
        ("::1", False),
    ],
)
async def test_strangers_are_not_served(source: str, served: bool) -> None:
    dns_server, _, _ = server()
    assert dns_server.serves(source) is served


QUERY = dns.message.make_query("chat.internal", "A", use_edns=True).to_wire()


@settings(max_examples=150)
@given(st.binary(max_size=80), st.integers(0, len(QUERY)))
@example(b"", 0)
@example(b"\xc0\x0c", 12)  # a name that points at itself
def test_no_packet_hurts(noise: bytes, at: int) -> None:
    dns_server, _, _ = asyncio.run(asyncio.to_thread(server))
    for packet in (noise, QUERY[:at] + noise, QUERY[:at] + noise + QUERY[at + len(noise) :]):
        query = dns_server.parse(packet)
        if query is not None:
            response = dns_server.answer(query, "10.11.0.9")
            if response is not None:
                response.to_wire(prefer_truncation=True)


async def test_an_answer_to_nothing_is_dropped() -> None:
    dns_server, _, _ = server()
    query = dns.message.make_query("chat.internal", "A")
    query.flags |= dns.flags.QR
    assert dns_server.parse(query.to_wire()) is None
    assert dns_server.figures().malformed == 1


def test_resolvers_are_the_systems_without_ourselves(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("# one\nnameserver 10.11.0.1\nsearch x\nnameserver 192.0.2.53\nnameserver\n")
    assert system_resolvers("10.11.0.1", path) == (("192.0.2.53", 53),)
