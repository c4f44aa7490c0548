"""The examples' fly.toml say what their READMEs promise, without a warning."""

from __future__ import annotations

from pathlib import Path

import pytest

from flyd.deploy.appconfig import AppConfig, machine_config, parse, process_groups
from flyd.model import Check, Guest, Mount, ServicePort

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def example(name: str) -> AppConfig:
    return parse((EXAMPLES / name / "fly.toml").read_text(), f"examples/{name}/fly.toml")


@pytest.mark.parametrize("name", sorted(path.parent.name for path in EXAMPLES.glob("*/fly.toml")))
def test_every_example_loads_without_a_warning_and_has_its_files(name: str) -> None:
    config = example(name)
    assert config.warnings == ()
    assert config.app == name
    for file in ("README.md", "Dockerfile", "requirements.txt"):
        assert (EXAMPLES / name / file).is_file()


def test_chat_runs_in_three_regions_and_migrates_first() -> None:
    config = example("chat")
    assert config.regions == ("ams", "iad", "sin")
    assert config.deploy.release_command == ("python", "migrate.py")
    assert process_groups(config) == ("app",)
    machine = machine_config(config, "app", "source:sha256:0")
    assert machine.cmd[:6] == ("uvicorn", "app:app", "--host", "$FLY_PRIVATE_IP", "--port", "$PORT")
    assert machine.guest == Guest(cpus=1, memory_mb=256)
    (service,) = machine.services
    assert service.ports == (
        ServicePort(port=80, handlers=("http",)),
        ServicePort(port=443, handlers=("tls", "http")),
    )
    assert service.checks == (
        Check(kind="http", port=8080, interval_s=2, timeout_s=1, grace_period_s=1, path="/healthz"),
    )


def test_notes_keeps_its_file_on_a_volume() -> None:
    config = example("notes")
    assert config.regions == ("ams",)
    machine = machine_config(config, "app", "source:sha256:0")
    assert machine.mounts == (Mount(path="/data", name="notes_data", size_gb=1),)
    assert machine.env["NOTES_DB"].startswith(machine.mounts[0].path + "/")
    assert machine.cmd == ("python", "start.py")
