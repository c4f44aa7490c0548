"""A cluster of processes whose hosts keep volumes on btrfs, with an app on a volume. Black box."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import httpx

from flyd.cluster import local, processes
from flyd.cluster.layout import HTTP_PORT
from integration.cluster import Fly, wait_for
from integration.volume_app import volume_app

APP = "keeper"
BASE = 131
DISK_GB = 9  # of each host, laid aside at once


class Pools:
    """Three hosts of processes, each with a pool; an app with a volume in the first region."""

    def __init__(self, disk_gb: int = DISK_GB) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="flyd-pools-"))
        self.home.chmod(0o755)
        self.name = self.home.name
        self.fly = Fly(self.home)
        self._home_before = os.environ.get("FLYD_HOME")
        os.environ["FLYD_HOME"] = self.fly.env["FLYD_HOME"]  # for LocalCluster
        try:
            shape = ("--base", str(BASE), "--volumes", "btrfs", "--disk", str(disk_gb))
            self.fly("cluster", "up", "--name", self.name, *shape)
        except BaseException:
            self._forget_home()
            raise
        self.local = local.LocalCluster.load(self.name)

    def deploy(self) -> None:
        """The app on its volume."""
        folder = self.home / APP
        folder.mkdir()
        self.fly("apps", "create", APP, "--regions", "ams")
        self.fly("deploy", cwd=volume_app(folder, APP, "ams"))
        wait_for(lambda: self.ask("/") == "ok", "the app answers")

    def destroy(self) -> None:
        """End it as a user would: no mount, no loop device, no file is left."""
        try:
            self.fly("cluster", "down", "--name", self.name)
            with open("/proc/self/mounts") as mounts:
                assert self.name not in mounts.read()
        finally:
            processes.kill_marked(self.local.mark())
            self._forget_home()

    def _forget_home(self) -> None:
        shutil.rmtree(self.home)
        if self._home_before is None:
            del os.environ["FLYD_HOME"]
        else:
            os.environ["FLYD_HOME"] = self._home_before

    def ask(self, path: str, region: str = "ams", app: str = APP) -> str:
        """One request through a region's edge; "" where nothing good comes back."""
        url = f"http://{self.local.plan.host(region).address}:{HTTP_PORT}{path}"
        try:
            answer = httpx.get(url, headers={"Host": app}, timeout=60)
        except httpx.HTTPError:
            return ""
        return answer.text if answer.status_code == 200 else ""

    def volumes(self, app: str = APP) -> list[dict[str, Any]]:
        """An app's volumes."""
        return self.fly("volumes", "list", "--app", app, "--json").json()

    def lines_of(self, volume: dict[str, Any]) -> list[str]:
        """What is on a volume's disk."""
        root = self.local.root / volume["host"] / "data" / "volumes"
        return (root / volume["id"] / "data" / "lines").read_text().split()
