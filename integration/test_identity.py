"""Who may talk to whom: join tokens, strangers, other clusters' certificates, expelled hosts, renewals."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

import grpc
import pytest

from flyd.cluster import processes
from flyd.cluster.layout import API_PORT, ETCD_CLIENT_PORT, ETCD_PEER_PORT, HTTP_PORT
from flyd.cluster.readiness import serves
from flyd.identity.credentials import Credentials, open_channel
from flyd.identity.folder import write_identity
from flyd.identity.founding import FirstHost, found
from flyd.store.system import SystemClock, SystemEntropy
from flyd.v1 import hosts_pb2, hosts_pb2_grpc
from integration.cluster import REGIONS, Cluster, Fly, wait_for

pytestmark = pytest.mark.timeout(180)

REFUSED, UNAVAILABLE = 5, 6
BASE = 151
NEWCOMER = "127.109.0.1"
DAY_S = 86400.0


class Newcomer:
    """A machine beside the cluster that may become a host of it."""

    def __init__(self, cluster: Cluster, folder: Path, name: str, address: str) -> None:
        self.name, self.address, self.folder = name, address, folder
        self._cluster = cluster
        self.options = (
            *("--name", name, "--region", "fra", "--address", address, "--driver", "process"),
            *("--data-dir", str(folder / "data"), "--config", str(folder / "flyd.toml")),
        )

    @property
    def identity(self) -> Path:
        return self.folder / "data" / "identity"

    def start(self) -> subprocess.Popen[str]:
        """Its flyd; ended with the cluster's other processes if the test does not."""
        command = [sys.executable, "-m", "flyd.daemon", "--config", str(self.folder / "flyd.toml")]
        mark = f"{self._cluster.local.mark()}/{self.name}"
        return subprocess.Popen(
            command, env={**os.environ, processes.MARK: mark}, stderr=subprocess.PIPE, text=True
        )

    def state(self) -> str:
        hosts = self._cluster.fly("hosts", "list", "--json").json()
        return next((str(host["state"]) for host in hosts if host["name"] == self.name), "")


def token(cluster: Cluster, ttl: str = "5m") -> str:
    return cluster.fly("hosts", "token", "--ttl", ttl).out.strip()


def test_a_host_joins_is_expelled_and_joins_again(cluster: Cluster, tmp_path: Path) -> None:
    newcomer = Newcomer(cluster, tmp_path, "fra-1", NEWCOMER)
    leave = token(cluster)
    joined = cluster.fly("hosts", "join", "--token", leave, *newcomer.options)
    assert "fra-1 is a member" in joined.err
    again = cluster.fly.refused(REFUSED, "hosts", "join", "--token", leave, *newcomer.options)
    assert "is a host of a cluster already" in again
    flyd = newcomer.start()
    wait_for(lambda: newcomer.state() == "up", "the newcomer is up")

    expelled = cluster.fly("hosts", "expel", "fra-1")
    assert "expelled" in expelled.err
    _, said = flyd.communicate(timeout=30)
    assert flyd.returncode == REFUSED
    assert "fra-1 was expelled" in said
    assert "fly hosts token" in said
    assert newcomer.state() == ""
    _, said = newcomer.start().communicate(timeout=30)  # it was told, and says so at once
    assert "fra-1 was expelled" in said
    with Credentials(newcomer.identity).open_channel(cluster.api("iad")) as channel:
        assert "fra-1 was expelled" in refusal(channel)
    wait_for(lambda: not etcd_answers(cluster, newcomer.identity), "etcd refuses its certificate")

    cluster.fly("hosts", "join", "--token", token(cluster), *newcomer.options)
    flyd = newcomer.start()
    wait_for(lambda: newcomer.state() == "up", "it is back")
    flyd.terminate()
    flyd.communicate(timeout=30)
    cluster.fly("hosts", "expel", "fra-1")


def test_expelled_while_away(cluster: Cluster, tmp_path: Path) -> None:
    """It can not ask etcd, which hangs up; the other flyds tell it."""
    newcomer = Newcomer(cluster, tmp_path, "fra-2", NEWCOMER)
    cluster.fly("hosts", "join", "--token", token(cluster), *newcomer.options)
    flyd = newcomer.start()
    wait_for(lambda: newcomer.state() == "up" and (newcomer.identity / "peers.json").exists(), "it is up")
    flyd.kill()
    flyd.communicate()
    cluster.fly("hosts", "expel", "fra-2")
    _, said = newcomer.start().communicate(timeout=60)
    assert "fra-2 was expelled" in said


def test_a_token_is_good_once_and_not_for_ever(cluster: Cluster, tmp_path: Path) -> None:
    first = Newcomer(cluster, tmp_path / "first", "fra-3", NEWCOMER)
    second = Newcomer(cluster, tmp_path / "second", "fra-4", NEWCOMER)
    leave = token(cluster)
    cluster.fly("hosts", "join", "--token", leave, *first.options)
    used = cluster.fly.refused(REFUSED, "hosts", "join", "--token", leave, *second.options)
    assert "used already, by fra-3" in used
    assert not (second.identity / "certificate.pem").exists()
    short = token(cluster, "1s")
    # As long as it is good, what is refused is the name of a host that is there.
    wait_for(lambda: "expired" in join_error(cluster, short, second), "the token expires")
    cut_off = cluster.fly.run("hosts", "join", "--token", leave[:-200], *second.options)
    assert cut_off.code == 2
    cluster.fly("hosts", "expel", "fra-3")


def join_error(cluster: Cluster, leave: str, newcomer: Newcomer) -> str:
    ran = cluster.fly.run("hosts", "join", "--token", leave, *newcomer.options, "--name", "ams-1")
    assert ran.code != 0
    return ran.err


def test_a_token_is_good_for_joining_alone(cluster: Cluster) -> None:
    from flyd.identity.tokens import read_token

    leave = read_token(token(cluster))
    shown = grpc.ssl_channel_credentials(
        leave.hosts_certificate.encode(), leave.key.encode(), leave.certificate.encode()
    )
    with open_channel(cluster.api("ams"), shown) as channel:
        assert "good for joining alone" in refusal(channel)


def test_a_certificate_of_another_cluster(cluster: Cluster, tmp_path: Path) -> None:
    other = found(
        [FirstHost(name="x", addresses=("127.0.0.1",), subnet="127.1")],
        "admin",
        SystemClock(),
        SystemEntropy(),
        DAY_S,
    )
    write_identity(tmp_path / "other", other.user)
    env = {**cluster.fly.env, "FLY_IDENTITY": str(tmp_path / "other")}
    ran = subprocess.run(
        [Path(sys.executable).parent / "fly", "hosts", "list"],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == REFUSED
    assert "is not of the cluster that this certificate is of" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_without_a_certificate_only_the_edge_answers(cluster: Cluster) -> None:
    """Every port that a host listens on outside its loopback, tried with and without TLS."""
    for region in REGIONS:
        host = cluster.host(region)
        ports = listening(host.address)
        assert {API_PORT, ETCD_CLIENT_PORT, ETCD_PEER_PORT, HTTP_PORT} <= ports
        closed = {
            port
            for port in ports
            if not plain_answer(host.address, port) and not tls_answer(host.address, port)
        }
        assert {API_PORT, ETCD_CLIENT_PORT, ETCD_PEER_PORT} <= closed
        assert plain_answer(host.address, HTTP_PORT).startswith(b"HTTP/1.1")


def listening(address: str) -> set[int]:
    """The TCP ports at which somebody listens on an address."""
    shown = subprocess.run(["ss", "-ltnH"], check=True, capture_output=True, text=True).stdout
    return {int(port) for port in re.findall(rf"{re.escape(address)}\]?:(\d+)", shown)}


def plain_answer(address: str, port: int) -> bytes:
    with socket.create_connection((address, port), timeout=5) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: chat\r\n\r\n")
        return answer(connection)


def tls_answer(address: str, port: int) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    try:
        with (
            socket.create_connection((address, port), timeout=5) as connection,
            context.wrap_socket(connection) as secure,
        ):
            secure.sendall(b"GET / HTTP/1.1\r\nHost: chat\r\n\r\n")
            return answer(secure)
    except (ssl.SSLError, OSError):
        return b""


def answer(connection: socket.socket) -> bytes:
    """What is said to a stranger; a settings frame of HTTP/2 or a TLS alert is no answer to the request."""
    try:
        said = connection.recv(4096)
    except OSError:
        return b""
    return said if said.startswith(b"HTTP/1.1 ") and not said.startswith(b"HTTP/1.1 400") else b""


def refusal(channel: grpc.Channel) -> str:
    """What a call that must be refused is told."""
    with pytest.raises(grpc.RpcError) as refused:
        hosts_pb2_grpc.HostsServiceStub(channel).ListHosts(hosts_pb2.ListHostsRequest(), timeout=10)
    return refused.value.details() or ""


def etcd_answers(cluster: Cluster, identity: Path) -> bool:
    """Whether any member of etcd talks to who shows this certificate."""
    environment = {**os.environ, "ETCDCTL_API": "3"}
    shown = [
        *("--cacert", str(identity / "hosts.pem"), "--cert", str(identity / "certificate.pem")),
        *("--key", str(identity / "key.pem"), "--command-timeout=1s", "--dial-timeout=1s"),
    ]
    for region in REGIONS:
        at = f"https://{cluster.host(region).address}:{ETCD_CLIENT_PORT}"
        command = [Path(sys.executable).parent / "etcdctl", "--endpoints", at, *shown, "get", "x"]
        if subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0:
            return True
    return False


@pytest.fixture
def brief() -> Generator[Fly]:
    """One host whose certificate lasts 12 s."""
    home = Path(tempfile.mkdtemp(prefix="flyd-brief-"))
    home.chmod(0o755)  # Postgres runs as another user
    fly = Fly(home)
    fly(
        "cluster",
        "up",
        "--name",
        "brief",
        "--base",
        str(BASE),
        "--regions",
        "ams",
        "--certificate-days",
        str(12 / DAY_S),
    )
    try:
        yield fly
    finally:
        fly("cluster", "down", "--name", "brief")
        shutil.rmtree(home)


def test_certificates_renew_themselves(brief: Fly, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLYD_HOME", brief.env["FLYD_HOME"])
    identity = brief.home / "flyd" / "clusters" / "brief" / "ams-1" / "data" / "identity"

    def ends_at_s() -> float:
        return float(json.loads((identity / "identity.json").read_text())["expires_at_s"])

    first_ends_at_s = ends_at_s()
    wait_for(lambda: SystemClock().wall_s() > first_ends_at_s, "the first certificate has ended", 60)
    assert ends_at_s() > SystemClock().wall_s()
    assert brief("hosts", "list", "--json").json()[0]["state"] == "up"  # a new connection to flyd
    brief("chaos", "kill-flyd", "--name", "brief", "ams")  # and a new flyd, which connects to etcd anew
    wait_for(lambda: serves("brief", f"127.{BASE}.0.1"), "the new flyd serves")
    brief("apps", "create", "after")
