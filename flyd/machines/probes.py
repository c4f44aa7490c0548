"""The acting half of health checks: ask a machine once and say what it answered.

Called by the host's check loop; what results mean, how often to ask and when a machine is
unhealthy is decided elsewhere (flyd/machines/checks.py). One try, one deadline
(`check.timeout_s`), an output short enough for a table. Redirects are not followed; https takes
any certificate, for the address is the machine's own.
"""

from __future__ import annotations

import asyncio
import os
import ssl

from flyd.errors import InvalidInput
from flyd.model import Check

STATUS_LINE_MAX_BYTES = 512
OUTPUT_MAX_CHARS = 80


async def probe(check: Check, address: str) -> tuple[bool, str]:
    """Whether the check passes on the machine at `address` (an IP), and what was seen."""
    place = f"{address}:{check.port}"
    try:
        async with asyncio.timeout(check.timeout_s):
            if check.kind == "tcp":
                return await _tcp(address, check.port, place)
            if check.kind == "http":
                return await _http(check, address, place)
    except TimeoutError:
        return False, f"no answer from {place} within {check.timeout_s:g} s"
    except ConnectionRefusedError:
        return False, f"connection refused on {place}"
    except ssl.SSLError as error:
        return False, f"no TLS on {place}: {error.reason or 'handshake failed'}"
    except (ConnectionError, asyncio.IncompleteReadError):
        return False, f"{place} closed the connection without an answer"
    except OSError as error:
        return False, f"cannot reach {place}: {os.strerror(error.errno) if error.errno else error}"
    raise InvalidInput(f"there is no check of type {check.kind!r}", hint="use tcp or http")


async def _tcp(address: str, port: int, place: str) -> tuple[bool, str]:
    _, writer = await asyncio.open_connection(address, port)
    writer.close()
    return True, f"connected to {place}"


async def _http(check: Check, address: str, place: str) -> tuple[bool, str]:
    headers = {"Host": place, "User-Agent": "flyd-check", "Accept": "*/*", "Connection": "close"}
    given = {name.lower() for name in check.headers}
    headers = {name: value for name, value in headers.items() if name.lower() not in given} | check.headers
    head = [f"{check.method} {check.path} HTTP/1.1", *(f"{name}: {headers[name]}" for name in headers)]
    if any("\r" in line or "\n" in line for line in head):
        return False, "the check's method, path or headers hold a line break"
    context = _any_certificate() if check.protocol == "https" else None
    reader, writer = await asyncio.open_connection(
        address, check.port, ssl=context, limit=STATUS_LINE_MAX_BYTES
    )
    try:
        writer.write(("\r\n".join(head) + "\r\n\r\n").encode("utf-8"))
        await writer.drain()
        line = await reader.readuntil(b"\n")
    except asyncio.LimitOverrunError:
        return False, f"{place} does not speak HTTP"
    finally:
        writer.transport.abort()
    return _judge(line.decode("latin-1").strip(), place)


def _judge(line: str, place: str) -> tuple[bool, str]:
    version, _, rest = line.partition(" ")
    code = rest[:3]
    if not version.startswith("HTTP/") or not (code.isascii() and code.isdigit()):
        return False, f"{place} does not speak HTTP"
    return code.startswith("2") and len(code) == 3, rest.strip()[:OUTPUT_MAX_CHARS]


def _any_certificate() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
