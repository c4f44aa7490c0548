"""A whole cluster as its users have it: the `fly` command, the edges, the API. Black box.

LocalCluster is used for what a user has no verb for: killing a flyd, finding a pid. Apps for
tests that need one of their own are written by `tiny_app`: one file, up in a moment.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import httpx

from flyd.cluster import local, processes
from flyd.cluster.layout import API_PORT, HTTP_PORT, LocalHost
from flyd.cluster.readiness import open_channel
from flyd.identity.credentials import Credentials

EXAMPLES = Path(__file__).parent.parent / "examples"
FLY = Path(sys.executable).parent / "fly"
BASE = 101
REGIONS = ("ams", "iad", "sin")
FLY_TIMEOUT_S = 90.0  # the longest that a command here may take
WAIT_S = 30.0
EDGE_S = 1.0
LOOK_S = 0.1
BUSY_FACTOR = 5.0

T = TypeVar("T")


@dataclass(frozen=True)
class Ran:
    """A command that has ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """What it printed, read."""
        return json.loads(self.out)


def wait_for(look: Callable[[], T | None], what: str, timeout_s: float = WAIT_S) -> T:
    """The first true answer of `look`."""
    give_up_at = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < give_up_at, f"{what}: not within {timeout_s:g} s"
        time.sleep(LOOK_S)
    return found


def promised(seconds: float) -> float:
    """A time that is promised to users; several times as long while this machine does much else beside.

    Whoever judges a promise runs the test alone (`make docker`): with more to run than twice the
    processors can, what takes long here says nothing.
    """
    busy = os.getloadavg()[0] > 2 * (os.cpu_count() or 1)
    return seconds * BUSY_FACTOR if busy else seconds


class Fly:
    """The command, with a home and settings of its own."""

    def __init__(self, home: Path, api: str = "", timeout_s: float = FLY_TIMEOUT_S) -> None:
        self.home = home
        self._timeout_s = timeout_s
        self.env = {
            **os.environ,
            "FLYD_HOME": str(home / "flyd"),
            "XDG_CONFIG_HOME": str(home / "settings"),
            "FLY_API": api,
        }

    def start(self, *words: str, cwd: Path | None = None, api: str | None = None) -> subprocess.Popen[str]:
        """Begin a command; `api` asks one flyd alone."""
        return subprocess.Popen(
            [FLY, *words],
            env=self.env if api is None else {**self.env, "FLY_API": api},
            cwd=cwd or self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, cwd: Path | None = None, api: str | None = None) -> Ran:
        """A command to its end, however it ends; never with a traceback."""
        return ended(self.start(*words, cwd=cwd, api=api), self._timeout_s)

    def __call__(self, *words: str, cwd: Path | None = None, api: str | None = None) -> Ran:
        """A command that must go well."""
        ran = self.run(*words, cwd=cwd, api=api)
        assert ran.code == 0, f"fly {' '.join(words)}: {ran.code}\n{ran.out}\n{ran.err}"
        return ran

    def refused(self, code: int, *words: str, cwd: Path | None = None, api: str | None = None) -> str:
        """A command that must end with this exit code; what it said."""
        ran = self.run(*words, cwd=cwd, api=api)
        assert ran.code == code, f"fly {' '.join(words)}: {ran.code}, not {code}\n{ran.out}\n{ran.err}"
        assert "Error: " in ran.err, ran.err
        return ran.err


def ended(command: subprocess.Popen[str], timeout_s: float = FLY_TIMEOUT_S) -> Ran:
    """Wait for a command that was begun."""
    try:
        out, err = command.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        command.kill()
        out, err = command.communicate()
        raise AssertionError(f"fly did not end in {timeout_s:g} s:\n{out}\n{err}") from None
    assert "Traceback" not in err, err
    return Ran(command.returncode, out, err)


class Cluster:
    """Three regions on this machine, with chat (on Postgres) and notes (on a volume) deployed."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="flyd-test-"))
        self.home.chmod(0o755)  # Postgres runs as another user
        self.name = self.home.name
        api = ",".join(f"127.{BASE + i}.0.1:{API_PORT}" for i in range(len(REGIONS)))
        self.fly = Fly(self.home, api)
        os.environ["FLYD_HOME"] = self.fly.env["FLYD_HOME"]  # for LocalCluster
        try:
            self.fly("cluster", "up", "--name", self.name, "--base", str(BASE))
        except BaseException:
            shutil.rmtree(self.home)
            raise
        self.local = local.LocalCluster.load(self.name)

    def deploy_examples(self) -> None:
        """The applications that most tests look at."""
        fly = self.fly
        fly("postgres", "create", "chat-db", "--regions", ",".join(REGIONS))
        fly("apps", "create", "chat")
        fly("postgres", "attach", "chat-db", "--app", "chat")
        fly("deploy", cwd=EXAMPLES / "chat")
        fly("apps", "create", "notes")
        fly("deploy", cwd=EXAMPLES / "notes")

    def destroy(self) -> None:
        """End it as a user would, and leave nothing whatever happens."""
        try:
            self.fly("cluster", "down", "--name", self.name)
            assert not processes.find_marked(self.local.mark())
            assert not list((self.home / "flyd" / "clusters").iterdir())
        finally:
            processes.kill_marked(self.local.mark())
            shutil.rmtree(self.home)

    def host(self, region: str) -> LocalHost:
        """The host of a region."""
        return self.local.plan.host(region)

    def api(self, region: str) -> str:
        """The address of one region's flyd."""
        return f"{self.host(region).address}:{API_PORT}"

    def channel(self, region: str) -> grpc.Channel:
        """A channel to one region's flyd, with the certificate that `fly cluster up` made."""
        return open_channel(self.name, self.host(region).address)

    def host_credentials(self, region: str) -> Credentials:
        """What a region's host shows, to etcd for one."""
        return Credentials(self.local.root / self.host(region).name / "data" / "identity")

    def edge(self, region: str) -> str:
        """The URL of one region's edge."""
        return f"http://{self.host(region).address}:{HTTP_PORT}"

    def envoy_pid(self, region: str) -> int:
        """The pid of one region's Envoy."""
        found = processes.find_marked(self.local.mark(self.host(region)))
        (pid,) = [pid for pid, command in found.items() if command.split()[0].endswith("envoy")]
        return pid

    def machines(self, app: str, api: str | None = None) -> list[dict[str, Any]]:
        """An app's machines, by region."""
        listed = self.fly("machine", "list", "--app", app, "--json", api=api).json()
        return sorted(listed, key=lambda machine: (machine["region"], machine["id"]))

    def get(self, region: str, app: str, path: str = "/") -> httpx.Response:
        """One request through a region's edge."""
        return httpx.get(self.edge(region) + path, headers={"Host": app}, timeout=10)

    def wait_served(self, app: str, text: str, *regions: str) -> None:
        """Return once the edges (all, or these) answer so; they hear of a deploy a moment later."""
        for region in regions or REGIONS:
            wait_for(
                lambda region=region: self.get(region, app).text == text,
                f"{app} answers {text!r} in {region}",
                EDGE_S,
            )

    def folder(self, name: str) -> Path:
        """A new, empty folder."""
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.home))


TINY = """\
import os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

VERSION = {version!r}

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = VERSION.encode()
        self.send_response({status})
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

print("tiny", VERSION, "begins", flush=True)
{begin}
ThreadingHTTPServer((os.environ["FLY_PRIVATE_IP"], int(os.environ["PORT"])), Handler).serve_forever()
"""

TINY_TOML = """\
app = "{app}"
primary_region = "ams"
[processes]
  app = "python -u app.py"
[http_service]
  internal_port = 8000
  processes = ["app"]
  [[http_service.checks]]
    path = "/"
    interval = "1s"
    timeout = "1s"
    grace_period = "2s"
[[vm]]
  memory = "{memory}"
[deploy]
  wait_timeout = "5s"
"""


def tiny_app(
    folder: Path,
    app: str,
    *,
    version: str = "one",
    begin: str = "",
    status: int = 200,
    memory: str = "128mb",
    deploy: str = "",
) -> Path:
    """Write an application that answers every request with its version."""
    (folder / "app.py").write_text(TINY.format(version=version, begin=begin, status=status))
    (folder / "fly.toml").write_text(TINY_TOML.format(app=app, memory=memory) + deploy)
    return folder
