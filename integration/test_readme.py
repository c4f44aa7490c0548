"""The README's promises: its tour is typed in as it stands, and its demo is run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

from flyd.cluster.local import LocalCluster
from flyd.errors import NotFound

ROOT = Path(__file__).parent.parent
TOUR_TIMEOUT_S = 150
DEMO_TIMEOUT_S = 240

pytestmark = pytest.mark.timeout(DEMO_TIMEOUT_S + 20)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Generator[Path]:
    """A home of its own, so that the clusters and settings of whoever runs this stay as they are."""
    with tempfile.TemporaryDirectory(prefix="flyd-readme-") as folder:
        Path(folder).chmod(0o755)
        monkeypatch.setenv("FLYD_HOME", f"{folder}/home")
        monkeypatch.setenv("XDG_CONFIG_HOME", f"{folder}/config")
        monkeypatch.delenv("FLY_API", raising=False)
        yield Path(folder)
        for name in ("local", "demo"):
            try:
                LocalCluster.load(name).down()
            except NotFound:
                continue


def tour() -> list[str]:
    """The commands of the README's second console block."""
    block = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    return [line[2:] for line in block.splitlines() if line.startswith("$ ")]


def typed(line: str) -> str:
    """The line as a person types it: who looks for the incident's report has seen the take-over."""
    if line.startswith("fly incidents report"):
        return f"until {line} >/dev/null 2>&1; do sleep 0.2; done; {line}"
    return line.replace("curl ", "curl --fail --max-time 10 ")


def test_the_tour_works_as_typed(home: Path) -> None:
    script = "set -eux\n" + "\n".join(typed(line) for line in tour())
    copy = home / "repository"  # `fly launch` may write into the example's folder
    copy.mkdir()
    (copy / ".venv").symlink_to(ROOT / ".venv")
    subprocess.run(["cp", "-r", str(ROOT / "examples"), str(copy)], check=True)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=copy,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=TOUR_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert '"messages"' in done.stdout
    assert "Traceback" not in done.stderr


def test_the_demo_shows_what_it_promises(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo"],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=DEMO_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert re.search(r"^lost +0$", done.stdout, re.MULTILINE)
    assert "Nothing was lost." in done.stdout
    gap = re.search(r"write gap +(\d+) ms", done.stdout)
    assert gap is not None
    assert int(gap[1]) <= 5000
