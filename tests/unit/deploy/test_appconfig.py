"""What a fly.toml comes to: values, machines, and the corpus of real files."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from flyd.deploy.appconfig import (
    AppConfig,
    inspect,
    machine_config,
    parse,
    process_groups,
    release_machine_config,
    remark_text,
)
from flyd.errors import NotFound
from flyd.model import (
    Check,
    Concurrency,
    Guest,
    Mount,
    RestartPolicy,
    Service,
    ServicePort,
    StopConfig,
    decode,
    encode,
)

CORPUS = Path(__file__).parent / "corpus"
FILES = sorted(CORPUS.glob("*.toml"))
UNKNOWN = {row["file"]: row["unknown_keys"].split() for row in csv.DictReader((CORPUS / "index.csv").open())}

WHOLE = """
app = "shop"
primary_region = "iad"
kill_signal = "SIGTERM"
kill_timeout = 30

[flyd]
  regions = ["ams", "iad"]

[build]
  dockerfile = "Dockerfile"

[deploy]
  strategy = "rolling"
  release_command = "bin/migrate --note 'two words'"
  release_command_timeout = "2m"
  wait_timeout = 90
  max_unavailable = 2

[env]
  PORT = 8080
  DEBUG = true
  RATE = 0.5
  NAME = "x"

[processes]
  web = "serve --port $PORT"
  app = ""
  jobs = "work"

[http_service]
  internal_port = "8080"
  force_https = true
  processes = ["web"]
  [http_service.concurrency]
    type = "requests"
    soft_limit = 200
    hard_limit = 250
  [[http_service.checks]]
    interval = "10s"
    timeout = 1500
    grace_period = "0s"
    method = "head"
    path = "/up"
    headers = { X-Forwarded-Proto = "https" }

[checks.alive]
  type = "tcp"
  interval = 15000
  timeout = "1m"

[[mounts]]
  source = "data"
  destination = "/data/"
  initial_size = "10gb"
  processes = ["jobs"]

[[vm]]
  size = "shared-cpu-2x"

[[vm]]
  memory = "1gb"
  cpus = 2
  cpu_kind = "performance"
  processes = ["jobs"]

[[restart]]
  policy = "never"
  processes = ["jobs"]
"""


def test_a_whole_file() -> None:
    config = parse(WHOLE, "fly.toml")
    assert (config.app, config.primary_region, config.regions) == ("shop", "iad", ("iad", "ams"))
    assert config.env == {"PORT": "8080", "DEBUG": "true", "RATE": "0.5", "NAME": "x"}
    assert config.build == {"dockerfile": "Dockerfile"}
    assert config.deploy.release_command == ("bin/migrate", "--note", "two words")
    assert (config.deploy.release_command_timeout_s, config.deploy.wait_timeout_s) == (120, 90)
    assert config.deploy.max_unavailable == 2
    assert config.stop == StopConfig(signal="SIGTERM", timeout_s=30)
    assert [w.key for w in config.warnings] == ["http_service.force_https"]
    assert process_groups(config) == ("app", "jobs", "web")


def test_machines_of_each_group() -> None:
    config = parse(WHOLE, "fly.toml")
    web = machine_config(config, "web", "source:sha256:1")
    assert web.image == "source:sha256:1"
    assert web.cmd == ("serve", "--port", "$PORT")
    assert web.process_group == web.metadata["fly_process_group"] == "web"
    assert web.services == (
        Service(
            internal_port=8080,
            ports=(
                ServicePort(port=80, handlers=("http",), force_https=True),
                ServicePort(port=443, handlers=("tls", "http")),
            ),
            checks=(
                Check(
                    kind="http",
                    port=8080,
                    interval_s=10,
                    timeout_s=1.5,
                    grace_period_s=0,
                    method="HEAD",
                    path="/up",
                    headers={"X-Forwarded-Proto": "https"},
                ),
            ),
            concurrency=Concurrency(type="requests", soft_limit=200, hard_limit=250),
        ),
    )
    assert (web.guest, web.mounts, web.checks) == (Guest(cpus=2, memory_mb=512), (), {})

    jobs = machine_config(config, "jobs", "i")
    assert jobs.mounts == (Mount(path="/data", name="data", size_gb=10),)
    assert jobs.guest == Guest(cpus=2, memory_mb=1024, cpu_kind="performance")
    assert (jobs.restart, jobs.services) == (RestartPolicy(policy="no"), ())

    app = machine_config(config, "app", "i")
    assert app.cmd == ()
    assert app.checks == {"alive": Check(kind="tcp", port=8080, interval_s=15, timeout_s=60)}
    with pytest.raises(NotFound, match="no process group 'other'"):
        machine_config(config, "other", "i")


def test_the_release_machine_has_no_services_and_ends() -> None:
    machine = release_machine_config(parse(WHOLE, "fly.toml"), "i")
    assert machine.cmd[0] == "bin/migrate"
    assert machine.env["RELEASE_COMMAND"] == "1"
    assert (machine.auto_destroy, machine.restart.policy) == (True, "no")
    assert (machine.services, machine.mounts, machine.checks) == ((), (), {})


def test_a_release_can_store_it() -> None:
    config = parse(WHOLE, "fly.toml")
    assert decode(encode(config), AppConfig) == config
    assert decode(encode(AppConfig()), AppConfig) == AppConfig() == parse("", "fly.toml")


LEGACY: list[tuple[str, str, dict[str, str]]] = [
    ("aliases", '[mount]\nsource="d"\ndestination="/d"\n[compute]\nmemory=512\n', {}),
    ("arrays", '[[mounts]]\nsource="d"\ndestination="/d"\n[[vm]]\nmemory_mb=512\n', {}),
    ("memory wins", '[mounts]\nsource="d"\ndestination="/d"\n[vm]\nmemory="1gb"\nmemory_mb=512\n', {}),
    ("empty list", 'processes=[]\n[mount]\nsource="d"\ndestination="/d"\n[computes]\nmemory="512mb"', {}),
    ("env list", "[[env]]\nA=1\nB=1\n[[env]]\nB=2\n", {"A": "1", "B": "2"}),
]


@pytest.mark.parametrize(("text", "env"), [row[1:] for row in LEGACY], ids=[row[0] for row in LEGACY])
def test_legacy_forms(text: str, env: dict[str, str]) -> None:
    config = parse(text, "fly.toml")
    if env:
        assert config.env == env
        return
    group = config.groups["app"]
    assert group.mounts == (Mount(path="/d", name="d"),)
    assert group.guest == Guest(memory_mb=512)


def test_legacy_service() -> None:
    text = """
    [[processes]]
      name = "web"
      command = "serve"
    [experimental]
      kill_timeout = 10
    [[services]]
      internal_port = "8080"
      processes = ["web"]
      concurrency = "20,25"
      [[services.ports]]
        port = "80"
        handlers = ["http"]
      [[services.http_checks]]
        interval = 10000
        headers = [{ name = "Host", value = "x" }]
    """
    config = parse(text, "fly.toml")
    service = config.groups["web"].services[0]
    assert config.groups["web"].command == ("serve",)
    assert config.stop.timeout_s == 10
    assert service.concurrency == Concurrency(type="requests", soft_limit=20, hard_limit=25)
    assert service.ports == (ServicePort(port=80, handlers=("http",)),)
    assert service.checks == (Check(kind="http", port=8080, interval_s=10, headers={"Host": "x"}),)


@pytest.mark.parametrize("checks", ["[checks.alive]\n{}", '[[checks]]\nname = "alive"\n{}'])
def test_a_check_that_restarts_its_machine(checks: str) -> None:
    text = checks.format('type = "tcp"\nport = 80\n') + "[flyd.liveness]\nalive = 3"
    config = parse(text, "fly.toml")
    assert config.warnings == ()
    assert machine_config(config, "app", "i").checks == {
        "alive": Check(kind="tcp", port=80, restart_limit=3),
    }


def test_labels_that_hosts_must_have_are_all_groups_or_one_groups() -> None:
    text = """
    [processes]
      app = "x"
      worker = "y"
    [deploy]
      release_command = "migrate"
    [flyd.require]
      disk = "nvme"
      worker = { gpu = "a100", disk = "hdd" }
    """
    config = parse(text, "fly.toml")
    assert config.warnings == ()
    assert machine_config(config, "app", "i").host_labels == {"disk": "nvme"}
    assert machine_config(config, "worker", "i").host_labels == {"disk": "hdd", "gpu": "a100"}
    assert release_machine_config(config, "i").host_labels == {"disk": "nvme"}


COMMANDS: list[tuple[str, tuple[str, ...]]] = [
    ('[experimental]\ncmd = "a b"', ("a b",)),
    ('[experimental]\ncmd = ["a", "b"]\nentrypoint = "run"', ("run", "a", "b")),
    ('[processes]\napp = "x y"\n[experimental]\ncmd = "a"\nentrypoint = ["run"]', ("run", "x", "y")),
    ('[processes]\napp = "x"\n[experimental]\nexec = ["e"]', ("e",)),
]


@pytest.mark.parametrize(("text", "command"), COMMANDS)
def test_commands(text: str, command: tuple[str, ...]) -> None:
    assert parse(text, "fly.toml").groups["app"].command == command


REGIONS: list[tuple[str, tuple[str, ...]]] = [
    ("", ()),
    ('primary_region = "ams"', ("ams",)),
    ('[flyd]\nregions = ["iad", "ams"]', ("iad", "ams")),
    ('primary_region = "ams"\n[flyd]\nregions = ["iad", "ams"]', ("ams", "iad")),
]


@pytest.mark.parametrize(("text", "regions"), REGIONS)
def test_regions(text: str, regions: tuple[str, ...]) -> None:
    config = parse(text, "fly.toml")
    assert config.regions == regions
    assert config.primary_region == (regions[0] if regions else "")


@pytest.mark.parametrize("file", FILES, ids=[f.stem for f in FILES])
def test_every_real_file_loads_and_its_unknown_keys_are_named(file: Path) -> None:
    report = inspect(file.read_text(), file.name)
    assert [remark_text(file.name, error) for error in report.errors] == []
    assert report.config is not None
    assert decode(encode(report.config), AppConfig) == report.config
    unknown = {w.key.replace("[0]", "[]") for w in report.warnings if w.message.startswith("unknown key")}
    for key in UNKNOWN[file.name]:
        assert any(_alike(found, key) for found in unknown), f"{key} is not among {sorted(unknown)}"


def _alike(found: str, listed: str) -> bool:
    """index.csv writes any index as []."""
    return "".join(c for c in found if not c.isdigit()) == listed or found.split("[")[0] == listed


def test_there_is_a_corpus() -> None:
    assert len(FILES) == len(UNKNOWN) == 58
