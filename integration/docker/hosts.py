"""A cluster whose hosts are containers, as its users have it. Black box.

All is asked of the `fly` command, of the edges, and of each host's own engine and kernel (`run`),
as a person with a shell on the host would.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from flyd.hosts.installation import installation_folders
from integration.cluster import EXAMPLES, REGIONS, Fly, wait_for
from volumes.pool import why_none

BASE = 221
DISK_GB = 6  # of each host, for volumes
DATABASE = "chat-db"
PYTHON_IMAGE = "flyd-python:bookworm"
SCRIPTS = EXAMPLES.parent / "scripts"
WRITER = Path(__file__).parent / "writer.py"
FIRST_BUILD_S = 420.0  # images are made once a machine
EXEC_TIMEOUT_S = 60.0
REQUEST_TIMEOUT_S = 2.0
REJOIN_S = 60.0


class Hosts:
    """Three regions, a container each."""

    def __init__(self, disk_gb: int = DISK_GB, base: int = BASE) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="flyd-docker-"))
        self.name = self.home.name
        self.fly = Fly(self.home, timeout_s=FIRST_BUILD_S)
        try:
            shape = ("--regions", ",".join(REGIONS), "--base", str(base))
            pools = () if why_none() else ("--volumes", "btrfs", "--disk", str(disk_gb))
            self.fly("cluster", "up", "--name", self.name, "--provider", "docker", *shape, *pools)
            self._hosts = {h["region"]: h for h in self.fly("hosts", "list", "--json").json()}
        except BaseException:
            shutil.rmtree(self.home)
            raise

    def destroy(self) -> None:
        """End it as a user would; nothing of it may be left."""
        self.fly("cluster", "down", "--name", self.name)
        for kind in ("container", "volume", "network"):
            everything = ("--all",) if kind == "container" else ()
            listed = (
                "docker",
                kind,
                "ls",
                *everything,
                "--quiet",
                "--filter",
                f"label=flyd.cluster={self.name}",
            )
            assert not subprocess.run(listed, check=True, capture_output=True).stdout, f"a {kind} is left"
        assert not list((self.home / "flyd" / "clusters").iterdir())
        shutil.rmtree(self.home)

    def edges(self) -> dict[str, str]:
        """Each region's public HTTP address, host:port."""
        return {region: f"{self.public(region)}:{h['http_port']}" for region, h in self._hosts.items()}

    def public(self, region: str) -> str:
        """The host's address among the hosts."""
        return str(self._hosts[region]["api_address"]).rpartition(":")[0]

    def api(self, region: str) -> str:
        """The address of one region's flyd."""
        return str(self._hosts[region]["api_address"])

    def private(self, region: str) -> str:
        """The host's end of its machines' network."""
        return str(self._hosts[region]["address"])

    def chaos(self, verb: str, region: str) -> None:
        """A fault, or its end."""
        self.fly("chaos", verb, "--name", self.name, region)

    def command(self, region: str, *words: str) -> tuple[str, ...]:
        """What runs a command in a host, with this command's standard input."""
        return ("docker", "exec", "--interactive", f"flyd-{self.name}-{self._hosts[region]['name']}", *words)

    def attempt(self, region: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a host, however it ends."""
        command = self.command(region, *words)
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=EXEC_TIMEOUT_S,
            check=False,
        )

    def run(self, region: str, *words: str) -> str:
        """Run a command in a host; what it printed."""
        ran = self.attempt(region, *words)
        assert ran.returncode == 0, f"{words} in {region}: {ran.returncode}\n{ran.stdout}\n{ran.stderr}"
        return ran.stdout

    def containers(self, region: str) -> dict[str, tuple[str, int]]:
        """The running containers of a host's own engine by name: id and pid."""
        ids = self.run(region, "docker", "ps", "--quiet", "--no-trunc").split()
        found: list[dict[str, Any]] = json.loads(self.run(region, "docker", "inspect", *ids)) if ids else []
        return {c["Name"].removeprefix("/"): (c["Id"], c["State"]["Pid"]) for c in found}

    def machines(self, app: str, api: str | None = None) -> dict[str, dict[str, Any]]:
        """An app's machines by region (one in each), "" for all apps' by id."""
        which = ("--app", app) if app else ("--all",)
        listed = self.fly("machine", "list", *which, "--json", api=api).json()
        return {m["region" if app else "id"]: m for m in listed}

    def in_machine(self, machine: dict[str, Any], *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a machine by its host's engine, which does not need the cluster."""
        return self.attempt(machine["region"], "docker", "exec", f"flyd-{machine['id']}", *words)

    def get(
        self, region: str, app: str, path: str = "/", timeout_s: float = REQUEST_TIMEOUT_S
    ) -> httpx.Response:
        """One request through a region's edge."""
        url = f"http://{self.edges()[region]}{path}"
        return httpx.get(url, headers={"Host": app}, timeout=timeout_s)

    def serves(self, region: str, app: str, path: str = "/") -> bool:
        """Whether a region's edge answers well for an app."""
        try:
            return self.get(region, app, path).status_code == 200
        except httpx.HTTPError:
            return False

    def members(self) -> dict[str, dict[str, Any]]:
        """The members of the database by region; the primary has "primary": True."""
        told = self.fly("postgres", "status", "--app", DATABASE, "--json").json()
        return {
            m["region"]: {**m, "primary": bool(told["serving"]) and m["node"] == told["primary"]}
            for m in told["members"]
        }

    def wait_replica(self, region: str) -> None:
        """Return once the member in this region follows the primary."""

        def follows() -> bool:
            member = self.members()[region]
            return bool(member["role"] == "replica" and member["streaming"] and member["host_status"] == "ok")

        wait_for(follows, f"the member in {region} streams as a replica", REJOIN_S)

    def put_primary(self, region: str) -> dict[str, Any]:
        """Have the database's primary here, by a planned move if need be, all others following."""
        for other in REGIONS:
            if not self.members()[other]["primary"]:
                self.wait_replica(other)
        member = self.members()[region]
        if not member["primary"]:
            self.fly("postgres", "failover", "--app", DATABASE, "--target", member["node"])
            for other in REGIONS:
                if other != region:
                    self.wait_replica(other)
        return self.members()[region]

    def database_url(self, region: str) -> str:
        """The database as chat's machine in this region reaches it: by its host's own endpoint."""
        ran = self.in_machine(self.machines("chat")[region], "printenv", "DATABASE_URL")
        return ran.stdout.strip()

    def folder(self, name: str) -> Path:
        """A new folder to deploy from."""
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.home))

    def example(self, name: str) -> Path:
        """A copy of an example, made to begin at an image that is there also without a registry."""
        copied = self.folder(name) / name
        shutil.copytree(EXAMPLES / name, copied, ignore=shutil.ignore_patterns("__pycache__"))
        config = copied / "fly.toml"
        config.write_text(config.read_text() + f'\n[build.args]\n  BASE = "{PYTHON_IMAGE}"\n')
        return copied


class Writer:
    """integration/docker/writer.py at work in a host."""

    def __init__(self, hosts: Hosts, region: str, name: str, uri: str) -> None:
        self.name = name
        self._said = hosts.home / f"writer-{name}.jsonl"
        with self._said.open("w") as said:
            command = hosts.command(region, sys.executable, str(WRITER), name, uri)
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said)

    def acks(self) -> list[dict[str, Any]]:
        """The acknowledgements so far: key, server, at_s."""
        lines = self._said.read_text().split("\n")[:-1]
        return [told for line in lines if "key" in (told := json.loads(line))]

    def stop(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(EXEC_TIMEOUT_S)


@contextmanager
def writing(hosts: Hosts, writers: dict[str, tuple[str, str]]) -> Generator[dict[str, Writer]]:
    """Writers by name, each in a region with a URI, for as long as the block runs; all have begun."""
    started = {name: Writer(hosts, region, name, uri) for name, (region, uri) in writers.items()}
    try:
        for writer in started.values():
            wait_for(lambda writer=writer: len(writer.acks()) > 20, f"{writer.name} writes")
        yield started
    finally:
        for writer in started.values():
            writer.stop()


def wait_times(looks: dict[str, Any], timeout_s: float) -> dict[str, float]:
    """When each look first was true, in seconds from now."""
    began = time.monotonic()
    found: dict[str, float] = {}
    while len(found) < len(looks):
        for what, look in looks.items():
            if what not in found and look():
                found[what] = time.monotonic() - began
        missing = sorted(set(looks) - set(found))
        assert time.monotonic() - began < timeout_s or not missing, f"not within {timeout_s:g} s: {missing}"
        time.sleep(0.05)
    return found


@contextmanager
def bare_container(hosts: Hosts, name: str, address: str, *options: str) -> Generator[str]:
    """A container on the hosts' network, with this installation in it and nothing of the cluster."""
    full = f"flyd-{hosts.name}-{name}"
    folders = [word for folder in installation_folders() for word in ("--volume", f"{folder}:{folder}:ro")]
    command = ["docker", "run", "--detach", "--name", full, "--hostname", name, "--ip", address]
    command += [
        "--network",
        f"flyd-{hosts.name}",
        "--label",
        f"flyd.cluster={hosts.name}",
        *folders,
        *options,
    ]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield full
    finally:
        subprocess.run(["docker", "rm", "--force", "--volumes", full], check=True, capture_output=True)


def inside(container: str, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command in such a container, however it ends."""
    command = ["docker", "exec", "--interactive", container, *words]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)


def prepare_python_image() -> None:
    """The image that the examples and our own apps begin at."""
    subprocess.run([str(SCRIPTS / "python-image.sh")], check=True, capture_output=True)


def shown(figures: Iterable[tuple[str, float]]) -> str:
    """Seconds for a person."""
    return ", ".join(f"{what} {seconds:.2f} s" for what, seconds in figures)
