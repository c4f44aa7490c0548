"""This host's DNS: answers the private network's names, forwards all others.

Owns `DnsServer`: UDP and TCP on one address of the host. What a name means is names.py's
matter, read from the mirror: as it was last known, so names work while etcd is away
(`figures().stale_s` says for how long). Before the mirror's first view our names get SERVFAIL,
never a wrong "no such name".

Invariants: only this host's own machines and the host itself are served, others get no byte;
a malformed packet is dropped; a question of ours is answered on the spot, without a task; a
forwarded one is answered too, with SERVFAIL if the system's resolvers do not (resolvers.py).

Run `serve` in flyd/daemon.py's TaskGroup. Decides nothing, caches nothing but the view.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from typing import cast

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rdtypes.ANY.TXT
import dns.rrset
import structlog

from flyd.errors import Refused, Unavailable
from flyd.model import App, AppKind, Host, Machine, MachineStatus, PostgresLeader, Value
from flyd.network.addresses import subnet
from flyd.network.expelled import expelled_hosts, read_memberships
from flyd.network.names import (
    FLYCAST,
    INTERNAL,
    TTL_S,
    NamesView,
    Outcome,
    Question,
    RecordType,
    answer,
    names_view,
)
from flyd.network.resolvers import Resolver, SystemResolvers, system_resolvers
from flyd.ports import KV, Clock, Entropy
from flyd.store import keys
from flyd.store.mirror import Mirror

log = structlog.get_logger(__name__)

PREFIXES = (keys.HOSTS, keys.MEMBERSHIPS, keys.ALIVE, keys.APPS, keys.MACHINES, keys.STATUS, keys.PG)
"""What the mirror must hold for `DnsServer`."""

PORT = 53
MIN_UDP_BYTES = 512  # what every resolver takes
MAX_UDP_BYTES = 1232  # never fragmented, whatever the client offers
TXT_STRING_BYTES = 255
IP_FREEBIND = 15  # <linux/in.h>; Python does not name it
MAX_TCP_BYTES = 65535
RECEIVE_BUFFER_BYTES = 1 << 20  # a burst waits while the loop is busy elsewhere
MAX_CONNECTIONS = 128
CONNECTION_IDLE_S = 10.0
STORE_PROBE_S = 2.0

TYPES = {
    dns.rdatatype.A: RecordType.A,
    dns.rdatatype.ANY: RecordType.A,
    dns.rdatatype.AAAA: RecordType.AAAA,
    dns.rdatatype.TXT: RecordType.TXT,
}
# "Asked again after TTL_S" for names that are not there: without it some resolvers remember for long.
ABSENCE = {
    zone: dns.rrset.from_text(
        zone + ".", TTL_S, "IN", "SOA", f"{zone}. hostmaster.{zone}. 1 3600 600 86400 {TTL_S}"
    )
    for zone in (INTERNAL, FLYCAST)
}


class DnsFigures(Value, frozen=True, kw_only=True):
    """What this server has done since it began, in questions."""

    answered: int = 0  # ours, of these:
    no_such_name: int = 0
    forwarded: int = 0
    failed: int = 0  # answered SERVFAIL
    malformed: int = 0
    refused: int = 0  # packets and connections from strangers, or over a limit
    stale_s: float = 0.0  # how long etcd has been away, 0: it is there


def read_names(host: Host, mirror: Mirror) -> NamesView:
    """What names mean on `host`, as of the mirror's revision."""
    apps = [v.value for v in mirror.list(keys.APPS, App)]
    clusters = (keys.postgres_leader(a.name) for a in apps if a.kind is AppKind.POSTGRES)
    leaders = (mirror.get(key, PostgresLeader) for key in clusters)
    return names_view(
        host,
        hosts=[v.value for v in mirror.list(keys.HOSTS, Host)],
        alive=[keys.last_part(v.key) for v in mirror.list(keys.ALIVE, bytes)],
        apps=apps,
        machines=[v.value for v in mirror.list(keys.MACHINES, Machine)],
        statuses=[v.value for v in mirror.list(keys.STATUS, MachineStatus)],
        leaders=[leader.value for leader in leaders if leader is not None],
        expelled=expelled_hosts(host.name, read_memberships(mirror)),
    )


class DnsServer:
    """The DNS of `host`, on `address` (the host's own unless given)."""

    def __init__(
        self,
        host: Host,
        mirror: Mirror,
        kv: KV,
        *,
        clock: Clock,
        entropy: Entropy,
        address: str = "",
        port: int = PORT,
        resolvers: Callable[[], tuple[Resolver, ...]] | None = None,
    ) -> None:
        self.address = address or host.address
        self.port = port
        self._host = host
        self._mirror = mirror
        self._kv = kv
        self._clock = clock
        self._resolvers = SystemResolvers(resolvers or (lambda: system_resolvers(self.address)), entropy)
        self._clients = _networks(host, self.address)
        self._view = NamesView(host=host)
        self._view_version = 0
        self._counts: Counter[str] = Counter()
        self._away_since_s: float | None = None
        self._connections = 0
        self._serving = asyncio.Event()

    async def serve(self) -> None:
        """Answer for ever. `Refused` if the address and port can not be had."""
        loop = asyncio.get_running_loop()
        stream, datagrams = self._bind()
        async with asyncio.TaskGroup() as group:
            tcp = await asyncio.start_server(
                lambda reader, writer: self._connected(group, reader, writer), sock=stream
            )
            udp, _ = await loop.create_datagram_endpoint(lambda: _Datagrams(self, group), sock=datagrams)
            self._serving.set()
            try:
                await self._watch_store()
            finally:
                udp.close()
                tcp.close()

    def _bind(self) -> tuple[socket.socket, socket.socket]:
        """Both sockets on one port; the address may still be on its way (the mesh makes it)."""
        stream = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            datagrams.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
            for each in (stream, datagrams):
                each.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
                each.bind((self.address, self.port))
                self.port = each.getsockname()[1]
            stream.listen(MAX_CONNECTIONS)
        except OSError as error:
            stream.close()
            datagrams.close()
            raise Refused(
                f"DNS can not listen on {self.address}:{self.port}: {error.strerror}",
                hint=f"`ss -lntup 'sport = :{self.port}'` shows what does; port {PORT} needs root.",
            ) from error
        return stream, datagrams

    async def wait_serving(self) -> None:
        """Return once questions are answered; `port` is then the real one."""
        await self._serving.wait()

    def figures(self) -> DnsFigures:
        """What has been done so far."""
        away = self._away_since_s
        stale_s = self._clock.monotonic_s() - away if away is not None else 0.0
        return DnsFigures(**self._counts, stale_s=stale_s)

    async def _watch_store(self) -> None:
        """Know whether the mirror can be current: an idle watch does not say."""
        seen_s = self._clock.monotonic_s()
        while True:
            try:
                await self._kv.get(keys.host(self._host.name))
                seen_s = self._clock.monotonic_s()
                if self._away_since_s is not None:
                    log.info("dns.store_back", host=self._host.name)
                self._away_since_s = None
            except Unavailable as error:
                if self._away_since_s is None:
                    log.warning("dns.answers_from_last_known_state", host=self._host.name, error=str(error))
                self._away_since_s = seen_s
            await asyncio.sleep(STORE_PROBE_S)

    # ----------------------------------------------------------------------- one question

    def serves(self, source: str) -> bool:
        """Whether this client is one of ours; all others are met with silence."""
        try:
            address = IPv4Address(source)
        except ValueError:
            return False
        return any(address in network for network in self._clients)

    def count(self, figure: str) -> None:
        """One more of `figure`."""
        self._counts[figure] += 1

    def parse(self, packet: bytes) -> dns.message.QueryMessage | None:
        """The query in a packet, None (and counted) if there is none in it."""
        try:
            query = dns.message.from_wire(packet)
        except (dns.exception.DNSException, ValueError, struct.error):
            self.count("malformed")
            return None
        if query.flags & dns.flags.QR or len(query.question) != 1:
            self.count("malformed")
            return None
        return cast(dns.message.QueryMessage, query)

    def answer(self, query: dns.message.QueryMessage, source: str) -> dns.message.Message | None:
        """What we say ourselves, None if it is for the system's resolvers to say."""
        asked = query.question[0]
        if query.opcode() != dns.opcode.QUERY or asked.rdclass != dns.rdataclass.IN:
            return _refusal(query, dns.rcode.NOTIMP)
        kind = TYPES.get(asked.rdtype, RecordType.OTHER)
        name = asked.name.to_text(omit_final_dot=True).lower()
        found = answer(Question(name=name, type=kind, source=source), self._current_view())
        if found.outcome is Outcome.NOT_OURS:
            return None
        if self._mirror.revision == 0:
            self.count("failed")
            return _refusal(query, dns.rcode.SERVFAIL)
        self.count("answered")
        response = dns.message.make_response(query, recursion_available=True)
        response.flags |= dns.flags.AA
        if found.records:
            response.answer.append(_rrset(asked.name, kind, found.records))
        else:
            response.authority.append(ABSENCE[name.rpartition(".")[2]])
        if found.outcome is Outcome.NO_SUCH_NAME:
            self.count("no_such_name")
            response.set_rcode(dns.rcode.NXDOMAIN)
        return response

    def _current_view(self) -> NamesView:
        if self._view_version != self._mirror.version:
            self._view = read_names(self._host, self._mirror)
            self._view_version = self._mirror.version
        return self._view

    async def forward(self, query: dns.message.QueryMessage, *, tcp: bool) -> dns.message.Message:
        """What the system's resolvers say, SERVFAIL if none does in time."""
        try:
            response = await self._resolvers.ask(query, tcp=tcp)
        except Unavailable:
            self.count("failed")
            return _refusal(query, dns.rcode.SERVFAIL)
        self.count("forwarded")
        return response

    # ----------------------------------------------------------------------- TCP

    def _connected(
        self, group: asyncio.TaskGroup, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        source = writer.get_extra_info("peername")[0]
        if self._connections >= MAX_CONNECTIONS or not self.serves(source):
            self.count("refused")
            writer.transport.abort()
            return
        self._connections += 1
        group.create_task(self._converse(reader, writer, source), name=f"dns {source}")

    async def _converse(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, source: str
    ) -> None:
        """Answer the questions of one connection, one after the other, until it is idle or ends."""
        try:
            while True:
                async with asyncio.timeout(CONNECTION_IDLE_S):
                    size = int.from_bytes(await reader.readexactly(2))
                    query = self.parse(await reader.readexactly(size))
                if query is None:
                    return
                response = self.answer(query, source) or await self.forward(query, tcp=True)
                writer.write(_wire(response, MAX_TCP_BYTES, prepend_length=True))
                async with asyncio.timeout(CONNECTION_IDLE_S):
                    await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, OSError):
            return
        finally:
            self._connections -= 1
            writer.close()


class _Datagrams(asyncio.DatagramProtocol):
    """UDP: ours are answered on the spot, the others by a task each."""

    def __init__(self, server: DnsServer, group: asyncio.TaskGroup) -> None:
        self._server = server
        self._group = group
        self._transport: asyncio.DatagramTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        server = self._server
        if not server.serves(addr[0]):
            server.count("refused")
            return
        query = server.parse(data)
        if query is None:
            return
        response = server.answer(query, addr[0])
        if response is None:
            self._group.create_task(self._forward(query, addr), name="dns forward")
        else:
            self._send(query, response, addr)

    async def _forward(self, query: dns.message.QueryMessage, addr: tuple[str, int]) -> None:
        self._send(query, await self._server.forward(query, tcp=False), addr)

    def _send(
        self, query: dns.message.QueryMessage, response: dns.message.Message, addr: tuple[str, int]
    ) -> None:
        """What fits in one packet; a longer answer says so, and the client asks again over TCP."""
        offered = query.payload if query.edns >= 0 else MIN_UDP_BYTES
        size = min(max(offered, MIN_UDP_BYTES), MAX_UDP_BYTES)
        if not self._transport.is_closing():
            self._transport.sendto(_wire(response, size), addr)


def _networks(host: Host, address: str) -> tuple[IPv4Network, ...]:
    """Who is served: the host's machines, the host itself, whatever asks over loopback."""
    own = (IPv4Network("127.0.0.0/8"), IPv4Network(host.address), IPv4Network(address))
    return (subnet(host), *own)


def _wire(response: dns.message.Message, max_size: int, *, prepend_length: bool = False) -> bytes:
    """The packet. Unshuffled: nearest first is our word, and many clients take the first."""
    return response.to_wire(
        max_size=max_size, prefer_truncation=True, prepend_length=prepend_length, want_shuffle=False
    )


def _refusal(query: dns.message.QueryMessage, code: dns.rcode.Rcode) -> dns.message.Message:
    response = dns.message.make_response(query, recursion_available=True)
    response.set_rcode(code)
    return response


def _rrset(name: dns.name.Name, kind: RecordType, records: tuple[str, ...]) -> dns.rrset.RRset:
    if kind in (RecordType.A, RecordType.AAAA):
        return dns.rrset.from_text_list(name, TTL_S, "IN", kind.value, records)
    texts = (
        dns.rdtypes.ANY.TXT.TXT(dns.rdataclass.IN, dns.rdatatype.TXT, _strings(record)) for record in records
    )
    return dns.rrset.from_rdata_list(name, TTL_S, list(texts))


def _strings(text: str) -> list[bytes]:
    """A TXT record's text in the pieces that DNS wants; clients join them."""
    data = text.encode()
    return [data[i : i + TXT_STRING_BYTES] for i in range(0, len(data), TXT_STRING_BYTES)] or [b""]
