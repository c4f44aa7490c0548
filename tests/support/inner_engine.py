"""A Docker engine in a container, as a local cluster's hosts have: another computer's engine, to tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from tests.support.drivers import BASE_IMAGE
from tests.support.engine import engine

HOST_IMAGE = "flyd-host:dev"
HOST_FOLDER = Path(__file__).parents[2] / "flyd/cluster/host"
UP_TIMEOUT_S = 60.0


def docker(*arguments: str) -> str:
    """Run the docker command; what it prints."""
    done = subprocess.run(("docker", *arguments), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"docker {' '.join(arguments)}: {done.stderr}"
    return done.stdout.strip()


def ensure_host_image() -> None:
    """The image of a host in a container, made where it is missing."""
    engine()
    if subprocess.run(
        ("docker", "image", "inspect", HOST_IMAGE), capture_output=True, check=False
    ).returncode:
        folder = str(HOST_FOLDER)
        docker("build", "--network", "host", "--build-arg", f"BASE={BASE_IMAGE}", "-t", HOST_IMAGE, folder)


@contextmanager
def inner_engine(name: str) -> Generator[str]:
    """A running engine's URL; nothing of it is left afterwards."""
    ensure_host_image()
    run = Path(tempfile.mkdtemp(prefix="flyd-engine-"))
    container = f"flyd-test-{name}-{os.getpid()}"
    try:
        docker(
            "run", "--detach", "--name", container, "--network", "none",
            "--cap-add", "SYS_ADMIN", "--cap-add", "NET_ADMIN", "--cap-add", "SYS_PTRACE",
            "--security-opt", "seccomp=unconfined", "--security-opt", "apparmor=unconfined",
            "--volume", "/var/lib/docker", "--volume", f"{run}:/run",
            "--env", f"HOST_NAME={container}", "--env", "FLYD_PYTHON=false", HOST_IMAGE,
        )  # fmt: skip
        url = f"unix://{run}/docker.sock"
        _wait_up(url, container)
        yield url
    finally:
        subprocess.run(("docker", "rm", "--force", "--volumes", container), capture_output=True, check=False)
        shutil.rmtree(run, ignore_errors=True)


def _wait_up(url: str, container: str) -> None:
    deadline = time.monotonic() + UP_TIMEOUT_S
    while True:
        asked = subprocess.run(("docker", "--host", url, "version"), capture_output=True, check=False)
        if asked.returncode == 0:
            return
        assert time.monotonic() < deadline, f"no engine in {container}: {docker('logs', container)}"
        time.sleep(0.1)
