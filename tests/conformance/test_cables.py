"""bench/cables.py: a member that is cut off hears and says nothing, and nobody is told."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from bench.cables import FIRST_GROUP, PREFIX, Cables, laid, why_not

HERE = "127.0.78.1"
QUIET_S = 0.3
SOON_S = 20.0

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"bench/cables.py: {why_not()}")

MEMBER = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as talk:
    while said := talk.recv(100):
        talk.sendall(said)
"""


def tables() -> str:
    """The packet filter's, of this module."""
    done = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True)
    return "\n".join(line for line in done.stdout.splitlines() if PREFIX in line)


def silent(talk: socket.socket) -> bool:
    """Whether nothing comes, not even the end."""
    talk.settimeout(QUIET_S)
    try:
        talk.recv(100)
        return False
    except TimeoutError:
        return True
    finally:
        talk.settimeout(SOON_S)


def test_what_it_opened_goes_silent_and_later_goes_on() -> None:
    cables = Cables({"a": f"{HERE}:1"}, {"a": FIRST_GROUP})
    with socket.create_server(("127.0.0.1", 0)) as server, laid(cables):
        command = [sys.executable, "-c", MEMBER, str(server.getsockname()[1])]
        with subprocess.Popen(command, group=FIRST_GROUP) as member, server.accept()[0] as talk:
            talk.settimeout(SOON_S)
            talk.sendall(b"one")
            assert talk.recv(100) == b"one"
            cables.cut("a")
            talk.sendall(b"two")
            assert silent(talk)
            cables.mend()
            assert talk.recv(100) == b"two"
            talk.shutdown(socket.SHUT_WR)
            assert member.wait(SOON_S) == 0
    assert f"{PREFIX}{os.getpid()}" not in tables()


def test_its_address_goes_silent_to_who_is_connected_and_to_who_connects() -> None:
    cables = Cables({"a": f"{HERE}:1"}, {"a": FIRST_GROUP})
    with (
        socket.create_server((HERE, 0)) as server,
        laid(cables),
        socket.create_connection(server.getsockname()) as talk,
        server.accept()[0] as end,
    ):
        cables.cut("a")
        end.sendall(b"one")
        assert silent(talk)
        with pytest.raises(TimeoutError):
            socket.create_connection(server.getsockname(), timeout=QUIET_S)
        cables.mend()
        assert talk.recv(100) == b"one"


def test_the_table_of_a_run_that_was_killed_goes() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    subprocess.run(["nft", "add", "table", "inet", f"{PREFIX}{dead.pid}"], check=True)
    with laid(Cables({}, {})):
        assert f"{PREFIX}{dead.pid}" not in tables()
