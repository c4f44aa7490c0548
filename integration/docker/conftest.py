"""One cluster of hosts in containers for all tests of this folder, with chat, notes and an app far away.

Images that are made once a machine (hosts, Python, Erlang) stay, as `docker build` leaves its cache;
nothing else does.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from integration.cluster import REGIONS, tiny_app, wait_for
from integration.docker.hosts import DATABASE, PYTHON_IMAGE, Hosts, prepare_python_image

FAR_REGION = "iad"


@dataclass
class World:
    """The cluster and what was deployed to it, as it was told."""

    hosts: Hosts
    chat: Path  # the folder it was deployed from
    first_deploy: Any  # fly deploy --json


def _why_not() -> str:
    """Why no cluster of containers can run here, "" if one can."""
    if shutil.which("docker") is None:
        return "there is no docker command on this machine"
    ran = subprocess.run(("docker", "version"), capture_output=True, text=True, check=False)
    return "" if ran.returncode == 0 else f"no Docker engine answers: {ran.stderr.strip()}"


@pytest.fixture(scope="session")
def world() -> Generator[World]:
    """Three hosts; chat on Postgres everywhere, notes on a volume in ams, `far` in iad alone."""
    if reason := _why_not():
        pytest.skip(reason)
    prepare_python_image()
    hosts = Hosts()
    try:
        yield _deployed(hosts)
    finally:
        hosts.destroy()


def _deployed(hosts: Hosts) -> World:
    fly = hosts.fly
    fly("postgres", "create", DATABASE, "--regions", ",".join(REGIONS))
    for app in ("chat", "notes", "far"):
        fly("apps", "create", app)
    fly("postgres", "attach", DATABASE, "--app", "chat")
    chat = hosts.example("chat")
    first = fly("deploy", "--json", cwd=chat).json()
    fly("deploy", cwd=hosts.example("notes"))
    far = tiny_app(hosts.folder("far"), "far")
    (far / "Dockerfile").write_text(f"FROM {PYTHON_IMAGE}\nWORKDIR /app\nCOPY app.py .\n")
    fly("deploy", "--regions", FAR_REGION, cwd=far)
    for region in REGIONS:
        for app, path in (("chat", "/healthz"), ("notes", "/-/versions.json"), ("far", "/")):
            wait_for(
                lambda region=region, app=app, path=path: hosts.serves(region, app, path),
                f"{app} is served in {region}",
            )
    return World(hosts, chat, first)
