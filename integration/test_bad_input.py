"""What people do wrong: each is refused with what, where and what to do; nothing is half done."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import grpc
import pytest

from flyd.v1 import machines_pb2, machines_pb2_grpc
from integration.cluster import BASE, EXAMPLES, REGIONS, Cluster, Fly, ended, tiny_app, wait_for

pytestmark = pytest.mark.timeout(180)

INVALID, NOT_FOUND, CONFLICT, REFUSED, UNAVAILABLE, INTERRUPTED = 2, 3, 4, 5, 6, 130
TCP_SERVICE = """
[[services]]
  internal_port = 8000
  protocol = "tcp"
  processes = ["app"]
  [[services.ports]]
    port = {port}
"""
GATED_COMMAND = """
release_command = "sh -c 'until [ -e {gate} ]; do sleep 0.05; done'"
"""


def said(text: str, *parts: str) -> None:
    """All parts are in what the command said."""
    missing = [part for part in parts if part not in text]
    assert not missing, f"{missing} not in:\n{text}"


def created(cluster: Cluster, app: str) -> Path:
    """An app without releases, and a folder with a tiny application."""
    cluster.fly("apps", "create", app)
    return tiny_app(cluster.folder(app), app)


# --------------------------------------------------------------------------- fly.toml


def test_malformed_file(cluster: Cluster) -> None:
    folder = created(cluster, "malformed")
    (folder / "fly.toml").write_text('app = "malformed"\nprimary_region = "ams\n')
    said(cluster.fly.refused(INVALID, "deploy", cwd=folder), "fly.toml:2:22", 'primary_region = "ams', "^")
    ran = cluster.fly.run("config", "validate", cwd=folder)
    assert ran.code == INVALID
    said(ran.err, "fly.toml:2:22")
    said(cluster.fly.refused(INVALID, "status", cwd=folder), "line 2, column 22", "config validate")
    assert cluster.fly("releases", "-a", "malformed", "--json").json() == []


def test_wrong_values_are_named_with_their_lines(cluster: Cluster) -> None:
    folder = created(cluster, "wrong-values")
    text = (folder / "fly.toml").read_text().replace('"128mb"', '"lots"').replace("8000", "99999")
    (folder / "fly.toml").write_text(text)
    said(cluster.fly.refused(INVALID, "deploy", cwd=folder), "fly.toml:6", "99999", "fly.toml:14", "lots")


def test_huge_and_binary_files(cluster: Cluster) -> None:
    folder = created(cluster, "huge")
    (folder / "fly.toml").write_text('app = "huge"\n[env]\n' + f'A = "{"x" * 5_000_000}"\n')
    said(cluster.fly.refused(INVALID, "deploy", cwd=folder), "longer than")
    (folder / "fly.toml").write_bytes(b"\xff\xfe\x00")
    said(cluster.fly.refused(INVALID, "deploy", cwd=folder), "fly.toml", "UTF-8")
    assert cluster.fly("releases", "-a", "huge", "--json").json() == []


def test_no_file(cluster: Cluster) -> None:
    said(cluster.fly.refused(INVALID, "deploy", cwd=cluster.folder("empty")), "fly.toml", "fly launch")
    said(cluster.fly.refused(INVALID, "launch", "--yes", cwd=cluster.folder("empty")), "--command")
    said(cluster.fly.refused(INVALID, "status", cwd=cluster.folder("empty")), "which app", "--app")


# --------------------------------------------------------------------------- names


def test_unknown_region(cluster: Cluster) -> None:
    folder = created(cluster, "nowhere")
    known = "ams, iad, sin"
    said(cluster.fly.refused(INVALID, "deploy", "--regions", "ams,xyz", cwd=folder), "'xyz'", known)
    said(cluster.fly.refused(INVALID, "apps", "create", "nowhere-2", "--regions", "xyz"), "'xyz'", known)
    said(
        cluster.fly.refused(INVALID, "volumes", "create", "data", "-a", "nowhere", "-r", "xyz"),
        "'xyz'",
        known,
    )
    said(cluster.fly.refused(INVALID, "postgres", "create", "pg", "--regions", "ams,xyz"), "'xyz'", known)
    assert cluster.fly("releases", "-a", "nowhere", "--json").json() == []
    names = [app["name"] for app in cluster.fly("apps", "list", "--json").json()]
    assert "nowhere-2" not in names
    assert "pg" not in names


def test_launch_begins_nothing_that_it_can_not_finish(cluster: Cluster) -> None:
    folder = cluster.folder("launched")
    (folder / "Procfile").write_text("web: python -u app.py\n")
    words = ("launch", "--yes", "--name", "launched")
    said(cluster.fly.refused(INVALID, *words, "--regions", "ams", "--postgres", cwd=folder), "two regions")
    said(cluster.fly.refused(INVALID, *words, "--regions", "xyz", cwd=folder), "'xyz'")
    said(cluster.fly.refused(CONFLICT, "launch", "--yes", "--name", "chat", cwd=folder), "'chat'")
    assert [path.name for path in folder.iterdir()] == ["Procfile"]
    assert "launched" not in [app["name"] for app in cluster.fly("apps", "list", "--json").json()]


def test_app_names(cluster: Cluster) -> None:
    cluster.fly("apps", "create", "twice")
    said(cluster.fly.refused(CONFLICT, "apps", "create", "twice"), "'twice'", "fly apps list")
    said(cluster.fly.refused(INVALID, "apps", "create", "No_Name"), "No_Name", "lower-case")
    for words in (
        ("status",),
        ("machine", "list"),
        ("logs", "--no-tail"),
        ("releases",),
        ("volumes", "list"),
    ):
        said(cluster.fly.refused(NOT_FOUND, *words, "-a", "nobody"), "'nobody'", "twice")
    said(cluster.fly.refused(NOT_FOUND, "machine", "stop", "m-nobody"), "m-nobody", "machine list")
    said(cluster.fly.refused(INVALID, "postgres", "status", "-a", "chat"), "not a Postgres")
    said(cluster.fly.refused(REFUSED, "deploy", "-a", "chat-db", cwd=EXAMPLES / "notes"), "Postgres cluster")


def test_errors_are_json_with_json(cluster: Cluster) -> None:
    for words in (("--json", "status", "-a", "nobody"), ("status", "-a", "nobody", "--json")):
        ran = cluster.fly.run(*words)
        assert ran.code == NOT_FOUND
        assert ran.out == ""
        told = json.loads(ran.err)
        assert told["kind"] == "NotFound"
        assert told["hint"]


def test_wrong_addresses(cluster: Cluster) -> None:
    said(cluster.fly.refused(UNAVAILABLE, "status", "-a", "x", api="127.0.0.1:1"), "127.0.0.1:1", "FLY_API")
    said(cluster.fly.refused(INVALID, "apps", "list", api="garbage"), "'garbage'", "HOST:PORT")


# --------------------------------------------------------------------------- ports and places


def test_cluster_up_on_taken_ports(cluster: Cluster) -> None:
    home = cluster.folder("second")
    home.chmod(0o755)
    fly = Fly(home)
    text = fly.refused(REFUSED, "cluster", "up", "--name", "second", "--base", str(BASE))
    said(text, f"127.{BASE}.0.1:2379", "taken", "--base")
    assert not (home / "flyd").exists()
    assert not (home / "settings").exists()
    said(fly.refused(NOT_FOUND, "cluster", "down", "--name", "second"), "'second'", "cluster up")


def test_cluster_up_twice_or_where_postgres_can_not_read(cluster: Cluster) -> None:
    text = cluster.fly.refused(CONFLICT, "cluster", "up", "--name", cluster.name, "--base", str(BASE))
    said(text, "exists already", "cluster down")
    for name in ("", "../up", "a b"):
        said(cluster.fly.refused(INVALID, "cluster", "up", "--name", name, "--base", "90"), repr(name))
    if os.geteuid() == 0:
        closed = cluster.folder("closed")
        closed.chmod(0o700)
        said(Fly(closed).refused(REFUSED, "cluster", "up", "--base", "90"), str(closed), "chmod")


def test_two_apps_want_one_port(cluster: Cluster) -> None:
    first, second = created(cluster, "port-first"), created(cluster, "port-second")
    for folder in (first, second):
        with (folder / "fly.toml").open("a") as file:
            file.write(TCP_SERVICE.format(port=7007))
    cluster.fly("deploy", cwd=first)
    said(cluster.fly.refused(CONFLICT, "deploy", cwd=second), "port 7007", "port-first", "services.ports")
    assert cluster.fly("releases", "-a", "port-second", "--json").json() == []
    tiny_app(second, "port-second")
    with (second / "fly.toml").open("a") as file:
        file.write(TCP_SERVICE.format(port=5432))
    said(cluster.fly.refused(CONFLICT, "deploy", cwd=second), "port 5432", "chat-db")
    cluster.fly("apps", "destroy", "port-first", "--yes")
    tiny_app(second, "port-second")
    with (second / "fly.toml").open("a") as file:
        file.write(TCP_SERVICE.format(port=7007))
    cluster.fly("deploy", cwd=second)
    cluster.fly("apps", "destroy", "port-second", "--yes")


def test_no_capacity(cluster: Cluster) -> None:
    folder = tiny_app(created(cluster, "too-big"), "too-big", memory="64gb")
    text = cluster.fly.refused(REFUSED, "deploy", cwd=folder)
    said(text, "ams-1: needs 65536 MB memory", "iad-1: wrong region", "sin-1: wrong region")
    reasons = [line.strip() for line in text.partition("Error: ")[2].splitlines()]
    assert [line[:6] for line in reasons[1:4]] == ["ams-1:", "iad-1:", "sin-1:"]
    assert cluster.machines("too-big") == []
    assert [r["status"] for r in cluster.fly("releases", "-a", "too-big", "--json").json()] == ["failed"]


def test_volumes_of_impossible_size(cluster: Cluster) -> None:
    cluster.fly("apps", "create", "sizes")
    for size in ("0", "-1", "1000000000"):
        text = cluster.fly.refused(
            INVALID, "volumes", "create", "data", "-a", "sizes", "-r", "ams", "-s", size
        )
        said(text, f"{size} GB", "1 to 500")
    text = cluster.fly.refused(REFUSED, "volumes", "create", "data", "-a", "sizes", "-r", "ams", "-s", "400")
    said(text, "ams-1: needs 400 GB disk", "iad-1: wrong region", "fly hosts list")
    said(cluster.fly.refused(INVALID, "volumes", "create", "b ad", "-a", "sizes", "-r", "ams"), "'b ad'")
    assert cluster.fly("volumes", "list", "-a", "sizes", "--json").json() == []


def test_volume_in_another_region(cluster: Cluster) -> None:
    cluster.fly("apps", "create", "far")
    made = cluster.fly("volumes", "create", "data", "-a", "far", "-r", "ams", "--json").json()
    mount = machines_pb2.MachineMount(volume=made["id"], path="/data")
    config = machines_pb2.MachineConfig(cmd=["sleep", "60"], mounts=[mount])
    request = machines_pb2.CreateMachineRequest(app_name="far", region="iad", config=config)
    with cluster.channel("sin") as channel, pytest.raises(grpc.RpcError) as refused:
        machines_pb2_grpc.MachinesServiceStub(channel).CreateMachine(request, timeout=10)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    said(refused.value.details() or "", made["id"], "ams-1", "iad-1")
    assert cluster.machines("far") == []
    (volume,) = cluster.fly("volumes", "list", "-a", "far", "--json").json()
    assert volume["attached_machine_id"] == ""


# --------------------------------------------------------------------------- machines and apps in use


def test_what_is_in_use_is_not_destroyed(cluster: Cluster) -> None:
    (notes,) = cluster.machines("notes")
    said(cluster.fly.refused(REFUSED, "machine", "destroy", notes["id"]), "is started", "--force")
    said(cluster.fly.refused(REFUSED, "apps", "destroy", "notes", "--yes"), "volume", "--with-volumes")
    (volume,) = cluster.fly("volumes", "list", "-a", "notes", "--json").json()
    said(
        cluster.fly.refused(REFUSED, "volumes", "destroy", volume["id"], "-a", "notes", "--yes"),
        "attached",
        notes["id"],
    )
    assert cluster.machines("notes")[0]["pid"] == notes["pid"]


# --------------------------------------------------------------------------- deploys


def test_ctrl_c_and_a_second_deploy(cluster: Cluster, tmp_path: Path) -> None:
    gate = tmp_path / "open"  # the deploy can not end before we have interrupted the command
    deploy = GATED_COMMAND.format(gate=gate)
    folder = tiny_app(created(cluster, "interrupted"), "interrupted", deploy=deploy)
    first = cluster.fly.start("deploy", cwd=folder)
    wait_for(lambda: cluster.machines("interrupted"), "the deploy has begun")
    second = cluster.fly.refused(CONFLICT, "deploy", cwd=folder)
    said(second, "is being deployed", "version 1", "fly releases")
    first.send_signal(signal.SIGINT)
    ran = ended(first)
    assert ran.code == INTERRUPTED
    said(ran.err, "goes on without you", "fly deploy --watch ")
    gate.touch()
    words = ran.err.partition("watch it: fly ")[2].split("\n")[0].split()
    cluster.fly(*words)
    said(cluster.fly.refused(NOT_FOUND, "deploy", "--watch", "00000009-no", cwd=folder), "'00000009-no'")
    cluster.wait_served("interrupted", "one")
    assert [r["status"] for r in cluster.fly("releases", "-a", "interrupted", "--json").json()] == [
        "complete"
    ]
    cluster.fly("apps", "destroy", "interrupted", "--yes")


# --------------------------------------------------------------------------- etcd


def test_etcd_away(cluster: Cluster) -> None:
    """All three members frozen: commands end in time, applications serve on, and it passes."""
    (notes,) = cluster.machines("notes")
    cluster.fly("apps", "create", "frozen")
    members = [host.etcd_pid for host in cluster.local.status()]
    assert all(members)
    try:
        for pid in members:
            os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        commands = (
            ("apps", "create", "while-away"),
            ("machine", "stop", notes["id"]),
            ("volumes", "create", "data", "-a", "frozen", "-r", "ams"),
            ("secrets", "set", "A=b", "-a", "frozen"),
            ("deploy", "-a", "frozen", "-c", str(EXAMPLES / "notes/fly.toml")),
            ("postgres", "create", "away-db", "--regions", "ams,iad"),
        )
        for command in [cluster.fly.start(*words) for words in commands]:
            ran = ended(command)
            assert ran.code == UNAVAILABLE, ran.err
            said(ran.err, "Error: ", "etcd")
        assert time.monotonic() - began < 20
        ran = wait_for(
            lambda: ran if (ran := cluster.fly.run("status", "-a", "chat")).code == UNAVAILABLE else None,
            "what is shown is said to be old",
        )
        said(ran.err, "etcd does not answer", "may have changed")
        assert ran.out.count("started") == len(REGIONS)
        for region in REGIONS:
            assert cluster.get(region, "chat", "/healthz").text == "ok\n"
            assert cluster.get(region, "notes", "/notes/notes.json?_shape=array").status_code == 200
    finally:
        for pid in members:
            os.kill(pid, signal.SIGCONT)
    wait_for(lambda: cluster.fly.run("secrets", "set", "A=b", "-a", "frozen").code == 0, "etcd is back")
    wait_for(
        lambda: {h["state"] for h in cluster.fly("hosts", "list", "--json").json()} == {"up"},
        "all hosts have joined again",
    )
    wait_for(lambda: cluster.get("iad", "chat", "/api/messages").status_code == 200, "Postgres serves again")
    assert cluster.machines("notes")[0]["pid"] == notes["pid"]
    assert cluster.fly("volumes", "list", "-a", "frozen", "--json").json() == []
