"""What listens: the kernel's tables read, and what of it reaches a machine's services."""

from __future__ import annotations

import ipaddress
import os
import socket

import pytest

from flyd.drivers.processes import address_of, look_at, socket_of
from flyd.machines.listening import unheard_services
from flyd.model import MachineConfig, Service
from flyd.model.machine import ListenSocket, Process

ADDRESS = "127.11.0.2"


@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("0100007F", "127.0.0.1"),
        ("00000000", "0.0.0.0"),
        ("02000B7F", "127.11.0.2"),
        ("00000000000000000000000001000000", "::1"),
        ("00000000000000000000000000000000", "::"),
        ("0000000000000000FFFF00000100007F", "::ffff:127.0.0.1"),
    ],
)
def test_addresses_as_the_kernel_writes_them(written: str, address: str) -> None:
    assert ipaddress.ip_address(address_of(written)) == ipaddress.ip_address(address)


def test_only_what_receives_counts() -> None:
    line = "0: 0100007F:1F90 00000000:0000 {} 00000000:00000000 00:00000000 00000000 0 0 4242 1"
    found = socket_of("tcp", line.format("0A"))
    assert found == ("4242", ListenSocket(protocol="tcp", address="127.0.0.1", port=8080))
    assert socket_of("tcp", line.format("01")) is None
    assert socket_of("udp", line.format("07")) is not None
    assert socket_of("tcp", "") is None


def test_a_process_is_seen_with_its_sockets() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(type=socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        (me,) = look_at([os.getpid(), 2**22 + 1])
        ports = {(s.protocol, s.address, s.port) for s in me.listens}
        assert ("tcp", "127.0.0.1", server.getsockname()[1]) in ports
        assert ("udp", "127.0.0.1", udp.getsockname()[1]) in ports
    assert "python" in me.command
    assert me.memory_kb > 1000


def listens(address: str, port: int = 80, protocol: str = "tcp") -> ListenSocket:
    return ListenSocket(protocol=protocol, address=address, port=port)


@pytest.mark.parametrize(
    ("socket", "said"),
    [
        (listens("0.0.0.0"), ""),
        (listens(ADDRESS), ""),
        (listens("::", protocol="tcp6"), ""),
        (listens(f"::ffff:{ADDRESS}", protocol="tcp6"), ""),
        (listens("127.0.0.1"), "listened on at 127.0.0.1 alone"),
        (listens("::1", protocol="tcp6"), "listened on at ::1 alone"),
        (listens("0.0.0.0", port=81), "nothing listens on port 80"),
        (listens("0.0.0.0", protocol="udp"), "nothing listens on port 80"),
    ],
)
def test_a_service_is_heard_or_a_warning_says_why_not(socket: ListenSocket, said: str) -> None:
    config = MachineConfig(image="host:", services=(Service(internal_port=80),))
    warnings = unheard_services(config, ADDRESS, [Process(pid=1, command="x", listens=(socket,))])
    if not said:
        assert warnings == []
    else:
        assert len(warnings) == 1
        assert said in warnings[0]
