"""Health checks against a server on loopback that answers anything, or nothing."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from flyd.errors import InvalidInput
from flyd.machines.probes import probe
from flyd.model import Check


@asynccontextmanager
async def server(answer: bytes | None) -> AsyncGenerator[tuple[int, list[bytes]], None]:
    """Answers every request with these bytes; None keeps silent until the client goes."""
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            requests.append(await reader.readuntil(b"\r\n\r\n"))
            if answer is None:
                await reader.read()
            else:
                writer.write(answer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield listening.sockets[0].getsockname()[1], requests


@pytest.mark.parametrize(
    ("answer", "passes", "output"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", True, "200 OK"),
        (b"HTTP/1.1 204\r\n\r\n", True, "204"),
        (b"HTTP/1.0 299 Odd\n\n", True, "299 Odd"),
        (b"HTTP/1.1 301 Moved Permanently\r\nlocation: /\r\n\r\n", False, "301 Moved Permanently"),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", False, "503 Service Unavailable"),
        (b"HTTP/1.1 2\r\n\r\n", False, "2"),
        (b"SSH-2.0-OpenSSH\r\n", False, "PLACE does not speak HTTP"),
        (b"x" * 5000, False, "PLACE does not speak HTTP"),
        (b"", False, "PLACE closed the connection without an answer"),
    ],
)
async def test_http(answer: bytes, passes: bool, output: str) -> None:
    async with server(answer) as (port, _):
        check = Check(kind="http", port=port)
        assert await probe(check, "127.0.0.1") == (passes, output.replace("PLACE", f"127.0.0.1:{port}"))


async def test_the_request_is_the_checks() -> None:
    async with server(b"HTTP/1.1 200 OK\r\n\r\n") as (port, requests):
        headers = {"host": "web.internal", "X-Check": "1"}
        await probe(Check(kind="http", port=port, method="HEAD", path="/up", headers=headers), "127.0.0.1")
    lines = requests[0].decode().split("\r\n")
    assert lines[0] == "HEAD /up HTTP/1.1"
    assert {"host: web.internal", "X-Check: 1", "User-Agent: flyd-check"} <= set(lines)
    assert not any(line.startswith("Host:") for line in lines)


async def test_no_line_breaks_in_a_request() -> None:
    check = Check(kind="http", port=1, headers={"X": "a\r\nEvil: b"})
    assert await probe(check, "127.0.0.1") == (False, "the check's method, path or headers hold a line break")


async def test_tcp_silence_and_refusal() -> None:
    async with server(None) as (port, _):
        assert await probe(Check(kind="tcp", port=port), "127.0.0.1") == (
            True,
            f"connected to 127.0.0.1:{port}",
        )
        silent = Check(kind="http", port=port, timeout_s=0.1)
        assert await probe(silent, "127.0.0.1") == (False, f"no answer from 127.0.0.1:{port} within 0.1 s")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        for kind in ("tcp", "http"):
            check = Check(kind=kind, port=port)
            assert await probe(check, "127.0.0.1") == (False, f"connection refused on 127.0.0.1:{port}")


async def test_https_to_a_plain_server() -> None:
    async with server(b"HTTP/1.1 400 Bad Request\r\n\r\n") as (port, _):
        passes, output = await probe(
            Check(kind="http", port=port, protocol="https", timeout_s=0.2), "127.0.0.1"
        )
        assert not passes
        assert f"127.0.0.1:{port}" in output


async def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(InvalidInput, match="icmp"):
        await probe(Check(kind="icmp", port=1), "127.0.0.1")
