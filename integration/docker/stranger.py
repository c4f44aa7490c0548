"""Run by a container without a certificate, on the hosts' own network: who answers at which port?

Reads {"address": [ports]} from standard input; tries each port with plain HTTP, with TLS without a
certificate, and as a Postgres client; prints [[address, port, how, what was said], ...] of those that
answered. A refusal (a TLS alert, HTTP 400, a closed connection) is no answer.
"""

import json
import socket
import ssl
import struct
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

TIMEOUT_S = 2.0
AT_ONCE = 32

Try = tuple[str, int, Callable[[str, int], bytes]]

REQUEST = b"GET / HTTP/1.1\r\nHost: chat\r\nConnection: close\r\n\r\n"
STARTUP = b"user\0postgres\0\0"
POSTGRES = struct.pack("!ii", 8 + len(STARTUP), 3 << 16) + STARTUP
QUERY = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x04chat\x08internal\x00\x00\x01\x00\x01"


def said(connection: socket.socket, request: bytes) -> bytes:
    """The first bytes of the answer; empty if there is none."""
    connection.settimeout(TIMEOUT_S)
    connection.sendall(request)
    try:
        return connection.recv(256)
    except OSError:
        return b""


def plain(address: str, port: int, request: bytes) -> bytes:
    """Ask in plain text."""
    try:
        with socket.create_connection((address, port), timeout=TIMEOUT_S) as connection:
            return said(connection, request)
    except OSError:
        return b""


def http(address: str, port: int) -> bytes:
    """A plain request; a TLS server's alert or its 400 says only that this is the wrong door."""
    answer = plain(address, port, REQUEST)
    return answer if answer.startswith(b"HTTP/1.") and b" 400 " not in answer[:16] else b""


def tls(address: str, port: int) -> bytes:
    """A request over TLS by somebody who has no certificate."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    try:
        with socket.create_connection((address, port), timeout=TIMEOUT_S) as connection:
            connection.settimeout(TIMEOUT_S)
            with context.wrap_socket(connection) as secure:
                return said(secure, REQUEST)
    except OSError:
        return b""


def postgres(address: str, port: int) -> bytes:
    """Postgres asks for a password or says what is wrong with the user."""
    answer = plain(address, port, POSTGRES)
    return answer if answer[:1] in (b"R", b"E") else b""


def dns(address: str, port: int) -> bytes:
    """A question by UDP."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.settimeout(TIMEOUT_S)
        asked.sendto(QUERY, (address, port))
        try:
            return asked.recv(256)
        except OSError:
            return b""


def attempt(door: Try) -> bytes:
    """What is answered at one door."""
    address, port, how = door
    return how(address, port)


def main() -> None:
    """Try everything."""
    doors: dict[str, list[int]] = json.load(sys.stdin)
    tries: list[Try] = []
    for address, ports in doors.items():
        tries += [(address, port, how) for port in ports for how in (http, tls, postgres)]
        tries.append((address, 53, dns))
    with ThreadPoolExecutor(AT_ONCE) as pool:  # most of them wait for an answer that does not come
        answers = list(pool.map(attempt, tries))
    found = [
        (address, port, how.__name__, answer[:40].decode(errors="replace"))
        for (address, port, how), answer in zip(tries, answers, strict=True)
        if answer
    ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
