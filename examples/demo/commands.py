"""The `fly` command as the demo uses it: what a person would type, shown and run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from flyd.identity.folder import CERTIFICATE, KEY

PIPE_WIDTH = 140  # a log of the demo is not folded at 80 columns

console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


class DemoFailed(Exception):
    """The demo did not show what it promises."""


class Fly:
    """Runs `fly` against one cluster, with settings of its own so that yours stay as they are."""

    def __init__(self, settings: Path) -> None:
        self.program = str(Path(sys.executable).parent / "fly")
        self._env = {**os.environ, "XDG_CONFIG_HOME": str(settings)}

    def show(self, *words: str, cwd: Path | None = None) -> None:
        """Show the command, run it, let its output through."""
        console.print(f"[bold cyan]$ fly {escape(' '.join(words))}[/]")
        result = subprocess.run([self.program, *words], env=self._env, cwd=cwd, check=False)
        if result.returncode != 0:
            raise DemoFailed(f"`fly {' '.join(words)}` ended with exit code {result.returncode}")

    def ask(self, *words: str) -> Any:
        """The command's JSON."""
        command = [self.program, *words, "--json"]
        result = subprocess.run(command, env=self._env, check=False, capture_output=True, text=True)
        if result.returncode != 0:
            raise DemoFailed(f"`fly {' '.join(words)}` failed: {result.stderr.strip()}")
        return json.loads(result.stdout)


def move_etcd_leader(endpoints: list[str], host: str, identity: Path) -> None:
    """Make the host's etcd member the leader of etcd, so that both leaders die together; as that host."""
    etcdctl = [
        *(str(Path(sys.executable).parent / "etcdctl"), "--endpoints", ",".join(endpoints)),
        *("--cacert", str(identity / "hosts.pem")),
        *("--cert", str(identity / CERTIFICATE), "--key", str(identity / KEY)),
    ]
    listed = subprocess.run(
        [*etcdctl, "member", "list", "-w", "json"], check=True, capture_output=True, text=True
    )
    member = next(m for m in json.loads(listed.stdout)["members"] if m["name"] == host)
    wanted = f"{member['ID']:x}"
    if any(s["Status"]["leader"] == member["ID"] for s in _status(etcdctl)):
        return
    subprocess.run([*etcdctl, "move-leader", wanted], check=True, capture_output=True)
    if not all(s["Status"]["leader"] == member["ID"] for s in _status(etcdctl)):
        raise DemoFailed(f"etcd's leader did not move to {host}")


def _status(etcdctl: list[str]) -> list[dict[str, Any]]:
    result = subprocess.run(
        [*etcdctl, "endpoint", "status", "-w", "json"], check=True, capture_output=True, text=True
    )
    return json.loads(result.stdout)
