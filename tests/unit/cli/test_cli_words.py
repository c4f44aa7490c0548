"""Where the command learns which app and which cluster is meant, and fly launch's questions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flyd.cli import apps, connection, deploy, hosts, launch, postgres
from flyd.cli.main import COMMANDS, fly
from flyd.deploy import appconfig
from flyd.errors import InvalidInput, Unavailable
from flyd.v1 import apps_pb2, hosts_pb2, postgres_pb2


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, without a cluster."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    monkeypatch.delenv("FLY_API", raising=False)
    return tmp_path


def test_every_verb_has_help() -> None:
    for verb in COMMANDS:
        assert CliRunner().invoke(fly, [verb, "--help"]).exit_code == 0, verb


# --------------------------------------------------------------------------- which app


def test_app_is_the_one_given_or_the_one_in_the_file(folder: Path) -> None:
    (folder / "fly.toml").write_text('app = "here"\n')
    assert connection.app_name("given") == "given"
    assert connection.app_name(None) == "here"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "which app"),
        (b"[env]\n", "which app"),
        (b"app = 7\n", "which app"),
        (b'app = "x\n', "line 1"),
        (b"\xff\xfe", "can not be read"),
    ],
)
def test_no_app_is_said(folder: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (folder / "fly.toml").write_bytes(content)
    with pytest.raises(InvalidInput, match=said):
        connection.app_name(None)


# --------------------------------------------------------------------------- which cluster


def test_fly_api_wins_over_the_remembered_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no cluster"):
        connection.addresses()
    connection.save_context(("127.0.0.1:1", "127.0.0.2:1"), tmp_path)
    assert connection.addresses() == ("127.0.0.1:1", "127.0.0.2:1")
    monkeypatch.setenv("FLY_API", "one:1, two:2")
    assert connection.addresses() == ("one:1", "two:2")
    connection.forget_context(("another:1",))
    assert connection.remembered()
    connection.forget_context(("127.0.0.1:1", "127.0.0.2:1"))
    assert connection.remembered() == ()


@pytest.mark.parametrize("address", ["nonsense", "host:", ":4280", "host:port"])
def test_addresses_are_checked(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLY_API", address)
    with pytest.raises(InvalidInput, match="not an address"):
        connection.addresses()


def test_a_name_becomes_a_number() -> None:
    assert connection.resolved("localhost:4280") == "127.0.0.1:4280"
    with pytest.raises(Unavailable, match="can not be found"):
        connection.resolved("no-such-host.invalid:4280")


# --------------------------------------------------------------------------- fly launch


class Asked:
    """A cluster of two regions that remembers what it is asked for."""

    def __init__(self) -> None:
        self.created: list[tuple[str, list[str]]] = []
        self.databases: list[str] = []
        self.deployed: list[tuple[str, str]] = []

    def ListHosts(self, _: Any) -> Any:  # noqa: N802
        return hosts_pb2.ListHostsResponse(hosts=[hosts_pb2.Host(region=r) for r in ("ams", "ams", "iad")])

    def CreateApp(self, request: apps_pb2.CreateAppRequest) -> Any:  # noqa: N802
        self.created.append((request.app_name, list(request.regions)))

    def CreateCluster(self, request: postgres_pb2.CreateClusterRequest) -> Any:  # noqa: N802
        self.databases.append(request.cluster_name)

    def AttachApp(self, request: postgres_pb2.AttachAppRequest) -> Any:  # noqa: N802
        self.databases.append(f"{request.cluster_name} to {request.app_name}")

    def begin(self, app: str, config: str, *_: Any) -> None:
        self.deployed.append((app, config))


def call(method: Callable[[Any], Any], request: Any, timeout_s: float = 0) -> Any:
    return method(request)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    cluster = Asked()
    for verbs in (apps, hosts, postgres):
        monkeypatch.setattr(verbs, "stub", lambda: cluster)
    monkeypatch.setattr(deploy, "begin", cluster.begin)
    monkeypatch.setattr(launch, "call", call)
    return cluster


def launched(*words: str, typed: str = "") -> Result:
    return CliRunner().invoke(launch.launch, words, input=typed)


def test_launch_asks_four_questions(asked: Asked, folder: Path) -> None:
    (folder / "Procfile").write_text("worker: no\nweb: python app.py\n")
    ran = launched(typed="shop\niad,ams\ny\nn\n")
    assert ran.exit_code == 0, ran.output
    assert ran.stderr.count("?") == 2
    assert asked.created == [("shop", ["iad", "ams"])]
    assert asked.databases == ["shop-db", "shop-db to shop"]
    assert asked.deployed == []
    config = appconfig.parse((folder / "fly.toml").read_text(), "fly.toml")
    assert (config.app, config.primary_region, config.regions) == ("shop", "iad", ("iad", "ams"))


def test_launch_yes_takes_the_defaults(asked: Asked, folder: Path) -> None:
    ran = launched("--yes", "--command", "python app.py", "--name", "shop")
    assert ran.exit_code == 0, ran.output
    assert asked.created == [("shop", ["ams", "iad"])]
    assert asked.databases == []
    assert [app for app, _ in asked.deployed] == ["shop"]


def test_launch_keeps_a_file_that_is_there(asked: Asked, folder: Path) -> None:
    text = launch.new_config("shop", ["iad"], "run")
    (folder / "fly.toml").write_text(text)
    ran = launched("--yes", "--name", "other")
    assert ran.exit_code == 0, ran.output
    assert asked.created == [("other", ["iad"])]
    assert (folder / "fly.toml").read_text() == text
    assert 'app = "other"' in ran.stderr


def test_launch_with_postgres_needs_two_regions_before_anything_is_made(asked: Asked, folder: Path) -> None:
    ran = launched("--yes", "--command", "run", "--regions", "ams", "--postgres")
    assert isinstance(ran.exception, InvalidInput)
    assert asked.created == []
    assert not (folder / "fly.toml").exists()


@pytest.mark.parametrize(
    ("files", "command"),
    [
        ({"Procfile": "web: bundle exec puma\n"}, "bundle exec puma"),
        ({"Procfile": "release: x\n", "go.mod": ""}, "go run ."),
        ({"package.json": '{"scripts": {"start": "node ."}}'}, "npm start"),
        ({"package.json": "[]", "mix.exs": ""}, "mix phx.server"),
        ({"manage.py": ""}, "python manage.py runserver $FLY_PRIVATE_IP:$PORT"),
    ],
)
def test_start_command(folder: Path, files: dict[str, str], command: str) -> None:
    for name, content in files.items():
        (folder / name).write_text(content)
    assert launch.start_command(folder) == command


@pytest.mark.parametrize("files", [{}, {"package.json": "{"}])
def test_no_start_command(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(InvalidInput) as refused:
        launch.start_command(folder)
    assert "--command" in refused.value.hint


# --------------------------------------------------------------------------- fly deploy, watched


def test_an_interrupted_watch_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(deploy, "stub", lambda: SimpleNamespace(WatchDeploy=None))
    monkeypatch.setattr(deploy, "stream", interrupted)
    ran = CliRunner().invoke(deploy.deploy, ["--watch", "00000001-ab", "-a", "shop"])
    assert ran.exit_code == 130
    assert "fly deploy --watch 00000001-ab -a shop" in ran.stderr
