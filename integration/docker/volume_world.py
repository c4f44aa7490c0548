"""An application on a volume in a cluster of hosts in containers: for tests, and the benchmark of moves."""

from __future__ import annotations

import time
from typing import Any

import httpx

from integration.cluster import REGIONS, wait_for
from integration.docker.hosts import PYTHON_IMAGE, Hosts
from integration.volume_app import volume_app

APP = "keeper"


class VolumeWorld:
    """The hosts, and the application `keeper` with one volume."""

    def __init__(self, hosts: Hosts, region: str, *, beats: bool = False) -> None:
        self.hosts = hosts
        folder = volume_app(hosts.folder(APP), APP, region)
        (folder / "Dockerfile").write_text(f"FROM {PYTHON_IMAGE}\nWORKDIR /app\nCOPY app.py .\n")
        config = folder / "fly.toml"
        if beats:
            config.write_text(config.read_text().replace("[env]\n", '[env]\n  BEATS = "1"\n'))
        hosts.fly("apps", "create", APP, "--regions", region)
        hosts.fly("deploy", cwd=folder)
        wait_for(lambda: self.ask("/") == "ok", "the application answers")

    def ask(self, path: str, region: str = "", timeout_s: float = 2.0) -> str:
        """One request through a region's edge, or any; "" where nothing good comes back."""
        for at in (region,) if region else REGIONS:
            try:
                answer = self.hosts.get(at, APP, path, timeout_s)
            except httpx.HTTPError:
                continue
            if answer.status_code == 200:
                return answer.text
        return ""

    def keep(self, line: str) -> bool:
        """Whether the application has flushed the line."""
        return self.ask(f"/keep?line={line}") == "ok"

    def volume(self) -> dict[str, Any]:
        """The application's volume, as it is now."""
        listed = self.hosts.fly("volumes", "list", "--app", APP, "--json").json()
        return next(v for v in listed if v.get("attached_machine_id"))

    def wait_copied(self, after_s: float) -> None:
        """Until a copy is on another host whose data is from after then."""
        wait_for(lambda: (self.volume().get("newest_copy_at") or 0.0) > after_s, "there is a copy", 120.0)

    def move(self, host: str) -> dict[str, Any]:
        """Move the volume; what the command told."""
        words = ("volumes", "move", self.volume()["id"], "--to", host, "--app", APP, "--json")
        return self.hosts.fly(*words).json()

    def lines(self, volume: dict[str, Any]) -> list[str]:
        """The application's lines, as its volume's disk has them."""
        return self.on_disk(volume, "lines")

    def on_disk(self, volume: dict[str, Any], name: str) -> list[str]:
        """The lines of a file on a volume."""
        path = f"/var/lib/flyd/volumes/{volume['id']}/data/{name}"
        return self.hosts.run(volume["region"], "cat", path).splitlines()

    def destroy(self) -> None:
        """Nothing of it stays."""
        self.hosts.fly("apps", "destroy", APP, "--with-volumes", "--yes")


def settled(world: VolumeWorld, seconds: float = 5.0) -> None:
    """Until the application has answered for a while."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if not world.ask("/"):
            wait_for(lambda: world.ask("/"), "the application answers", 120.0)
            began = time.monotonic()
        time.sleep(0.2)
