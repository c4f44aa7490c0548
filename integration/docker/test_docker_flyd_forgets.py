"""flyd's own database is deleted and flyd killed: its machines run on, and it finds them."""

from __future__ import annotations

import pytest

from integration.cluster import wait_for
from integration.docker.conftest import World
from integration.docker.hosts import Hosts

pytestmark = pytest.mark.timeout(600)

FORGETS = "sin"
DATA_FOLDER = "/var/lib/flyd"


def _flyd_pid(hosts: Hosts) -> int:
    rows = hosts.fly("cluster", "status", "--name", hosts.name, "--json").json()
    return next(int(row["flyd_pid"]) for row in rows if row["region"] == FORGETS)


def test_machines_outlive_flyds_memory_of_them(world: World) -> None:
    hosts = world.hosts
    api = hosts.api(FORGETS)
    mine = {i: m for i, m in hosts.machines("").items() if m["region"] == FORGETS}
    containers = hosts.containers(FORGETS)
    pid = _flyd_pid(hosts)
    assert {f"flyd-{i}": m["pid"] for i, m in mine.items()} == {n: p for n, (_, p) in containers.items()}
    assert "runs.sqlite" in hosts.run(FORGETS, "ls", DATA_FOLDER)

    hosts.run(FORGETS, "sh", "-c", f"rm {DATA_FOLDER}/runs.sqlite*")
    hosts.chaos("kill-flyd", FORGETS)
    wait_for(lambda: _flyd_pid(hosts) not in (0, pid), "a new flyd runs")

    def looked_again() -> bool:
        """The new flyd serves and has told of every machine by a look of its own."""
        if hosts.fly.run("machine", "list", "--all", api=api).code != 0:
            return False
        now = hosts.machines("", api)
        return all(_checked_at(now[i]) > _checked_at(m) for i, m in mine.items())

    wait_for(looked_again, "the new flyd knows every machine of its host")
    now = {i: m for i, m in hosts.machines("", api).items() if m["region"] == FORGETS}
    told = {i: (m["state"], m["pid"], m["started_at"]) for i, m in now.items()}
    assert told == {i: ("started", m["pid"], m["started_at"]) for i, m in mine.items()}
    assert hosts.containers(FORGETS) == containers

    chat = next(i for i, m in mine.items() if m["app_name"] == "chat")
    hosts.fly("machine", "stop", chat, "--app", "chat")
    hosts.fly("machine", "start", chat, "--app", "chat")
    others = {n: c for n, c in containers.items() if n != f"flyd-{chat}"}
    after = hosts.containers(FORGETS)
    assert after.pop(f"flyd-{chat}") != containers[f"flyd-{chat}"], "it is in charge again"
    assert after == others
    print(f"\n{len(mine)} machines of {FORGETS} kept their pids: {sorted(m['pid'] for m in mine.values())}")


def _checked_at(machine: dict[str, list[dict[str, float]]]) -> float:
    return min(check["updated_at"] for check in machine["checks"])
