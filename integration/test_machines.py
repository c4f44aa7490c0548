"""Machines, volumes and Postgres by the command: what each verb does to the real thing."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from integration.cluster import REGIONS, Cluster, ended, tiny_app, wait_for

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def trio(cluster: Cluster) -> Generator[Path]:
    """A small application in all three regions."""
    cluster.fly("apps", "create", "trio", "--regions", ",".join(REGIONS))
    folder = tiny_app(cluster.folder("trio"), "trio")
    cluster.fly("deploy", cwd=folder)
    yield folder
    cluster.fly("apps", "destroy", "trio", "--yes")


def machine_of(cluster: Cluster, region: str, app: str = "trio") -> dict[str, Any]:
    return next(machine for machine in cluster.machines(app) if machine["region"] == region)


def test_stop_and_start(cluster: Cluster, trio: Path) -> None:
    machine = machine_of(cluster, "iad")
    cluster.fly("machine", "stop", machine["id"], cwd=trio)
    stopped = machine_of(cluster, "iad")
    assert (stopped["state"], stopped["pid"]) == ("stopped", 0)
    cluster.wait_served("trio", "one")  # the nearest that runs answers for it
    cluster.fly("machine", "start", machine["id"], api=cluster.api("sin"))
    started = machine_of(cluster, "iad")
    assert started["state"] == "started"
    assert started["pid"] not in (0, machine["pid"])
    shown = cluster.fly("machine", "status", machine["id"]).out
    assert [word for word in ("launch", "start", "stop") if word not in shown] == []


def test_a_crashed_process_is_started_again(cluster: Cluster, trio: Path) -> None:
    machine = machine_of(cluster, "sin")
    os.kill(machine["pid"], signal.SIGKILL)
    again = wait_for(
        lambda: (m := machine_of(cluster, "sin"))["state"] == "started" and m["pid"] != machine["pid"] and m,
        "it is restarted by its policy",
    )
    assert again["restarts"] == machine["restarts"] + 1
    exits = [event for event in again["events"] if event["type"] == "exit"]
    assert exits[-1]["exit_event"]["signal"] == signal.SIGKILL
    assert exits[-1]["exit_event"]["requested_stop"] is False
    cluster.wait_served("trio", "one")


def test_one_that_gave_up_is_started_by_hand(cluster: Cluster) -> None:
    cluster.fly("apps", "create", "once")
    folder = tiny_app(cluster.folder("once"), "once")
    with (folder / "fly.toml").open("a") as file:
        file.write('\n[[restart]]\n  policy = "never"\n')
    cluster.fly("deploy", cwd=folder)
    (machine,) = cluster.machines("once")
    os.kill(machine["pid"], signal.SIGKILL)
    wait_for(lambda: cluster.machines("once")[0]["state"] == "stopped", "it rests, as its policy says")
    cluster.fly("machine", "start", machine["id"])
    assert cluster.machines("once")[0]["state"] == "started"
    cluster.fly("apps", "destroy", "once", "--yes")


def test_exec_on_another_host(cluster: Cluster, trio: Path) -> None:
    machine = machine_of(cluster, "sin")
    script = 'echo "$FLY_REGION $FLY_APP_NAME $FLY_MACHINE_ID"; echo careful >&2; exit 7'
    ran = cluster.fly.run("machine", "exec", machine["id"], "--", "sh", "-c", script, api=cluster.api("ams"))
    assert ran.code == 7
    assert ran.out == f"sin trio {machine['id']}\n"
    assert ran.err == "careful\n"
    assert cluster.fly.run("machine", "exec", machine["id"], "no-such-program").code == 127


def test_logs_of_all_machines(cluster: Cluster, trio: Path) -> None:
    history = cluster.fly("logs", "--no-tail", cwd=trio).out
    assert [region for region in REGIONS if f" {region} [" not in history] == []
    machine = machine_of(cluster, "ams")
    only = cluster.fly("logs", "--no-tail", "--machine", machine["id"], "--json", cwd=trio).out
    lines = [json.loads(line) for line in only.splitlines()]
    assert {line["machine_id"] for line in lines} == {machine["id"]}
    assert "tiny one begins" in [line["message"] for line in lines]

    follow = cluster.fly.start("logs", "-n", "1", "--json", cwd=trio)
    assert follow.stdout is not None
    seen = {json.loads(follow.stdout.readline())["region"] for _ in REGIONS}
    assert seen == set(REGIONS)
    os.kill(machine["pid"], signal.SIGKILL)
    while "begins" not in (line := json.loads(follow.stdout.readline()))["message"]:
        assert line["region"] == "ams"
    follow.send_signal(signal.SIGINT)
    assert ended(follow).code == 130
    wait_for(lambda: machine_of(cluster, "ams")["state"] == "started", "it is back")


def test_lists_and_status(cluster: Cluster, trio: Path) -> None:
    status = cluster.fly("status", "--json", cwd=trio).json()
    assert status["app"]["machine_count"] == 3
    assert {m["region"] for m in status["machines"]} == set(REGIONS)
    assert all(m["restarts"] >= 0 and m["config"]["guest"]["memory_mb"] == 128 for m in status["machines"])
    for words in (("status",), ("machine", "list"), ("checks", "list"), ("releases",)):
        assert cluster.fly(*words, cwd=trio).out.count("\n") >= 2
    hosts = {h["region"]: h for h in cluster.fly("hosts", "list", "--json").json()}
    assert {region: host["state"] for region, host in hosts.items()} == dict.fromkeys(REGIONS, "up")
    assert all(host["memory_mb_used"] >= 128 for host in hosts.values())
    version = cluster.fly("version", "--json").json()
    assert version["fly"] == version["flyd"]


def test_destroy(cluster: Cluster) -> None:
    cluster.fly("apps", "create", "short")
    folder = tiny_app(cluster.folder("short"), "short")
    cluster.fly("deploy", cwd=folder)
    (machine,) = cluster.machines("short")
    cluster.fly("machine", "destroy", machine["id"], "--force")
    wait_for(lambda: not cluster.machines("short"), "it is gone")
    wait_for(lambda: not os.path.exists(f"/proc/{machine['pid']}"), "its process is gone")
    said = cluster.fly.refused(3, "machine", "status", machine["id"])
    assert machine["id"] in said
    cluster.fly("apps", "destroy", "short", "--yes")
    assert "short" not in [app["name"] for app in cluster.fly("apps", "list", "--json").json()]


def test_volumes(cluster: Cluster, trio: Path) -> None:
    made = cluster.fly("volumes", "create", "data", "-r", "sin", "-s", "2", "--json", cwd=trio).json()
    assert (made["host"], made["size_gb"], made["attached_machine_id"]) == ("sin-1", 2, "")
    assert made["id"] in cluster.fly("volumes", "list", cwd=trio).out
    cluster.fly("volumes", "destroy", made["id"], "--yes", cwd=trio)
    assert cluster.fly("volumes", "list", "--json", cwd=trio).json() == []


def test_secrets(cluster: Cluster, trio: Path) -> None:
    cluster.fly("secrets", "set", "TOKEN=s3cret", "OTHER=x", cwd=trio)
    assert "TOKEN" not in cluster.fly("secrets", "unset", "TOKEN", cwd=trio).err.partition(":")[2]
    machine = machine_of(cluster, "iad")
    cluster.fly("machine", "stop", machine["id"], cwd=trio)
    cluster.fly("machine", "start", machine["id"], cwd=trio)
    env = cluster.fly("machine", "exec", machine["id"], "env").out
    assert "OTHER=x\n" in env
    assert "TOKEN" not in env


def test_postgres(cluster: Cluster) -> None:
    before = cluster.fly("postgres", "status", "-a", "chat-db", "--json").json()
    assert before["serving"]
    assert len(before["members"]) == len(REGIONS)
    target = next(m["node"] for m in before["members"] if m["node"] != before["primary"])
    moved = cluster.fly("postgres", "failover", "-a", "chat-db", "--target", target, "--json").json()
    assert moved["primary"] == target
    assert int(moved["epoch"]) > int(before["epoch"])
    for region in REGIONS:
        ran = cluster.fly(
            *("postgres", "connect", "-a", "chat-db", "--", "-tAc", "select pg_is_in_recovery()"),
            api=cluster.api(region),
        )
        assert ran.out == "f\n"
    assert target in cluster.fly("postgres", "status", "-a", "chat-db").out
    assert "postgres.promoted" in cluster.fly("incidents", "list", "-a", "chat-db").out
    said = cluster.fly.refused(3, "postgres", "failover", "-a", "chat-db", "--target", "nobody")
    assert "chat-db-1" in said
