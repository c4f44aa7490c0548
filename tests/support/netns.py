"""Hosts and machines as network namespaces: real interfaces, on this machine alone.

    switch ── hosts a, b and a stranger, each by a veth; behind each host a bridge with machines

Needs root and iproute2; `why_not()` says what is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Generator
from contextlib import ExitStack, contextmanager

from flyd.network.addresses import address6, bridge, mac

PROGRAMS = ("ip", "nft", "iptables", "wg", "wireguard-go")
UNDERLAY = "198.51.100"  # TEST-NET-2: never routed anywhere
ECHO_PORT = 7000

ECHO = """
    import socket, socketserver, sys
    class Say(socketserver.BaseRequestHandler):
        def handle(self):
            while self.request.recv(65536):
                who = self.client_address[0].removeprefix("::ffff:")
                self.request.sendall(who.encode() + bytes([10]))
    class Server(socketserver.ThreadingTCPServer):
        address_family = socket.AF_INET6  # and IPv4, too
        allow_reuse_address = True
    server = Server(("::", int(sys.argv[1])), Say)
    print("ready", flush=True)
    server.serve_forever()
"""
CONNECT = """
    import socket, sys
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), float(sys.argv[3])) as s:
        s.sendall(sys.argv[4].encode())
        print(s.makefile().readline())
"""


def missing_programs() -> list[str]:
    return [p for p in PROGRAMS if shutil.which(p) is None]


def why_not() -> str:
    """Why namespaces can not be used here, "" if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := missing_programs():
        return f"missing: {', '.join(missing)} (scripts/test-tools.sh installs them)"
    probe = f"probe{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode:
        return "this kernel or container does not allow `ip netns add`"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return ""


def python(code: str, *words: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code), *words]


class Net:
    """The namespaces of one test, named with its process id."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._prefix = f"fm{os.getpid()}"

    def name(self, short: str) -> str:
        return f"{self._prefix}-{short}"

    def ip(self, short: str, *words: str) -> None:
        """`ip` within a namespace."""
        subprocess.run(["ip", "-n", self.name(short), *words], check=True, capture_output=True)

    def command(self, short: str, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.name(short), *words]

    def run(self, short: str, *words: str, timeout_s: float = 10) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(short, *words), capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def start(self, short: str, *words: str) -> subprocess.Popen[str]:
        """A process in a namespace, ended with the test."""
        process = subprocess.Popen(
            self.command(short, *words), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

        def end() -> None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

        self._stack.callback(end)
        return process

    def namespace(self, short: str) -> None:
        subprocess.run(["ip", "netns", "add", self.name(short)], check=True)
        self._stack.callback(subprocess.run, ["ip", "netns", "del", self.name(short)], check=False)
        self.ip(short, "link", "set", "lo", "up")

    def switch(self) -> None:
        self.namespace("sw")
        self.ip("sw", "link", "add", "br0", "type", "bridge")
        self.ip("sw", "link", "set", "br0", "up")

    def plug(self, short: str, number: int, device: str = "eth0") -> None:
        """Connect a host with the switch: its address is UNDERLAY.number."""
        self._veth(short, device, "sw", f"to-{short}", "br0")
        self.ip(short, "address", "add", f"{UNDERLAY}.{number}/24", "dev", device)

    def host(self, short: str, number: int, subnet: str) -> None:
        self.namespace(short)
        self.plug(short, number)
        self.ip(short, "link", "add", bridge(short), "type", "bridge")
        self.ip(short, "address", "add", f"{subnet}.0.1/16", "dev", bridge(short))
        own = f"{address6(f'{subnet}.0.1')}/64"
        self.ip(short, "address", "add", own, "dev", bridge(short), "nodad")
        self.ip(short, "link", "set", bridge(short), "up")

    def machine(self, short: str, host: str, address: str) -> None:
        """A machine behind a host, with the echo server in it."""
        self.namespace(short)
        self._veth(short, "eth0", host, f"to-{short}", bridge(host), mac(address))
        gateway = ".".join([*address.split(".")[:2], "0", "1"])
        self.ip(short, "address", "add", f"{address}/16", "dev", "eth0")
        self.ip(short, "address", "add", f"{address6(address)}/64", "dev", "eth0", "nodad")
        for way in (gateway, address6(gateway)):
            self.ip(short, "route", "add", "default", "via", way)
        self.echo(short)

    def echo(self, short: str, port: int = ECHO_PORT) -> None:
        """A server on every address of the namespace, which says to each client who it is."""
        server = self.start(short, *python(ECHO, str(port)))
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"

    def connect(
        self, short: str, address: str, payload: str = "hello", *, timeout_s: float = 1, port: int = ECHO_PORT
    ) -> str:
        """As whom the other end sees us, "" if it can not be reached."""
        code = python(CONNECT, address, str(port), str(timeout_s), payload)
        return self.run(short, *code, timeout_s=timeout_s * 3 + 5).stdout.strip()

    def _veth(self, short: str, device: str, other: str, port: str, bridge: str, mac: str = "") -> None:
        peer = ("peer", "name", port, "netns", self.name(other))
        own = ("address", mac) if mac else ()
        self.ip(short, "link", "add", device, *own, "type", "veth", *peer)
        self.ip(other, "link", "set", port, "master", bridge, "up")
        self.ip(short, "link", "set", device, "up")


@contextmanager
def net() -> Generator[Net]:
    with ExitStack() as stack:
        yield Net(stack)
