"""Machines, volumes and Postgres by the command: what each verb does to the real thing."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from flyd.postgres.clusters import FIRST_PORT
from flyd.v1 import postgres_pb2, postgres_pb2_grpc
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


def test_an_update_is_of_one_version_and_keeps_the_place(cluster: Cluster, trio: Path) -> None:
    before = machine_of(cluster, "iad")
    cluster.fly("machine", "update", before["id"], "--env", "MODE=fast", "--memory", "160", cwd=trio)
    after = machine_of(cluster, "iad")
    assert after["instance_id"] != before["instance_id"]
    assert (after["host"], after["private_ip"]) == (before["host"], before["private_ip"])
    assert (after["state"], after["config"]["guest"]["memory_mb"]) == ("started", 160)
    assert after["config"]["services"] == before["config"]["services"]
    assert "MODE=fast\n" in cluster.fly("machine", "exec", after["id"], "env").out
    stale = ("machine", "update", before["id"], "--if-version", before["instance_id"], "--memory", "128")
    assert after["instance_id"] in cluster.fly.refused(4, *stale, cwd=trio)
    cluster.fly("machine", "update", before["id"], "--memory", "128", cwd=trio)  # as the others are
    assert machine_of(cluster, "iad")["state"] == "started"
    assert "fly machine stop" in cluster.fly.refused(5, "machine", "suspend", before["id"], cwd=trio)
    cluster.wait_served("trio", "one")


def test_a_cordoned_machine_gets_no_traffic(cluster: Cluster, trio: Path) -> None:
    """The region's own edge sends its requests to another region, and back again."""
    machine = machine_of(cluster, "sin")
    log = ("logs", "--no-tail", "--machine", machine["id"], "--json")
    lines = len(cluster.fly(*log, cwd=trio).out.splitlines())
    cluster.fly("machine", "cordon", machine["id"], api=cluster.api("ams"))
    assert "no traffic" in cluster.fly("machine", "status", machine["id"]).out
    os.kill(machine["pid"], signal.SIGSTOP)  # what reaches it now gets no answer
    try:
        cluster.wait_served("trio", "one", "sin")
    finally:
        os.kill(machine["pid"], signal.SIGCONT)
    cluster.fly("machine", "uncordon", machine["id"])
    assert len(cluster.fly(*log, cwd=trio).out.splitlines()) == lines, "it was not restarted"
    cluster.wait_served("trio", "one")


def test_lists_leases_and_metadata_from_any_host(cluster: Cluster, trio: Path) -> None:
    machine = machine_of(cluster, "sin")
    cluster.fly("machine", "metadata", "set", machine["id"], "role=far", api=cluster.api("ams"))
    listed = cluster.fly("machine", "list", "--metadata", "role=far", "--json", cwd=trio).json()
    assert [m["id"] for m in listed] == [machine["id"]]
    assert cluster.fly("machine", "list", "-r", "sin", "--state", "stopped", "--json", cwd=trio).json() == []
    lease = cluster.fly("machine", "lease", "acquire", machine["id"], "--owner", "ada", "--json").json()
    assert "leased by ada" in cluster.fly.refused(4, "machine", "stop", machine["id"])
    assert "leased by ada" in cluster.fly.refused(4, "machine", "signal", machine["id"], "SIGHUP")
    cluster.fly("machine", "lease", "release", machine["id"], "--nonce", lease["nonce"])
    cluster.fly.refused(3, "machine", "lease", "view", machine["id"])


def test_ps_and_signal_on_another_host(cluster: Cluster, trio: Path) -> None:
    machine = machine_of(cluster, "ams")
    shown = cluster.fly("machine", "ps", machine["id"], "--json", api=cluster.api("sin")).json()
    sockets = [s for process in shown["processes"] for s in process["listen_sockets"]]
    assert [(s["address"], s["port"]) for s in sockets] == [(machine["private_ip"], 8000)]
    assert shown["warnings"] == []
    cluster.fly("machine", "signal", machine["id"], "SIGKILL", api=cluster.api("iad"))
    again = wait_for(
        lambda: (m := machine_of(cluster, "ams"))["state"] == "started" and m["pid"] != machine["pid"] and m,
        "its policy starts it again",
    )
    assert "signal 9" in cluster.fly("machine", "status", again["id"]).out


def test_a_clone_in_another_region_and_a_brief_machine(cluster: Cluster, trio: Path) -> None:
    machine = machine_of(cluster, "ams")
    words = ("machine", "clone", machine["id"], "-r", "iad", "--idempotency-key", "twin", "--json")
    twin = cluster.fly(*words).json()
    assert cluster.fly(*words).json()["id"] == twin["id"], "a retry makes no second one"
    assert (twin["region"], twin["release_version"]) == ("iad", machine["release_version"])
    cluster.fly("machine", "destroy", twin["id"], "--force")
    wait_for(lambda: twin["id"] not in [m["id"] for m in cluster.machines("trio")], "the clone is gone")
    brief = cluster.fly(
        *("machine", "run", "host:", "--command", "true", "--rm", "--restart", "no", "--json"), cwd=trio
    ).json()
    wait_for(
        lambda: brief["id"] not in [m["id"] for m in cluster.machines("trio")], "it goes once it is done"
    )


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
    assert [m["config"]["guest"]["memory_mb"] for m in status["machines"]] == [128, 128, 128]
    assert [m["state"] for m in status["machines"]] == ["started", "started", "started"]
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


def nearest_members(cluster: Cluster) -> dict[str, bool]:
    """By region: whether the port for reads leads to that region's own member."""
    addresses = {machine["region"]: machine["private_ip"] for machine in cluster.machines("chat-db")}
    found: dict[str, bool] = {}
    for region in REGIONS:
        service = postgres_pb2_grpc.PostgresServiceStub(cluster.channel(region))
        uri = service.GetConnection(postgres_pb2.GetConnectionRequest(cluster_name="chat-db")).uri
        endpoint = f":{FIRST_PORT}/"
        assert endpoint in uri
        with psycopg.connect(uri.replace(endpoint, f":{FIRST_PORT + 1}/")) as session:
            where = session.execute("SELECT host(inet_server_addr())").fetchone()
        found[region] = where == (addresses[region],)
    return found


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
    wait_for(lambda: nearest_members(cluster) == dict.fromkeys(REGIONS, True), "reads stay in the region")
    assert target in cluster.fly("postgres", "status", "-a", "chat-db").out
    assert "postgres.promoted" in cluster.fly("incidents", "list", "-a", "chat-db").out
    said = cluster.fly.refused(3, "postgres", "failover", "-a", "chat-db", "--target", "nobody")
    assert "chat-db-1" in said


def test_a_database_is_imported_whole_or_not_at_all(cluster: Cluster) -> None:
    def count(app: str) -> str:
        words = ("-tAc", f"\\c {app}", "-tAc", "select count(*) from messages")
        return cluster.fly("postgres", "connect", "-a", "chat-db", "--", *words).out.splitlines()[-1]

    cluster.fly("apps", "create", "imported")
    cluster.fly("postgres", "attach", "chat-db", "--app", "imported")
    service = postgres_pb2_grpc.PostgresServiceStub(cluster.channel("ams"))
    uri = service.GetConnection(postgres_pb2.GetConnectionRequest(cluster_name="chat-db")).uri
    source, words = uri.removesuffix("postgres") + "chat", ("-a", "chat-db", "--into", "imported")
    made = cluster.fly("postgres", "import", source, *words, "--json").json()
    assert made["dump_bytes"] > 0
    assert count("imported") == count("chat")
    assert "already exists" in cluster.fly.refused(5, "postgres", "import", source, *words)
    assert count("imported") == count("chat")
    said = cluster.fly.refused(5, "postgres", "import", source + "-gone", *words)
    assert "nothing was imported" in said
    assert "chat-gone" in said
    cluster.fly.refused(2, "postgres", "import", "chat", *words)
    cluster.fly("apps", "destroy", "imported", "--yes")
