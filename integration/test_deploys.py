"""Deploys of real applications: they finish or undo themselves, and nobody's request pays for it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from flyd.store import keys
from flyd.store.etcd import EtcdKV
from flyd.store.leader import CONTROLLER
from integration.cluster import EXAMPLES, REGIONS, Cluster, ended, tiny_app, wait_for
from integration.traffic import traffic

pytestmark = pytest.mark.timeout(180)

FAILED = 1
REFUSED = 5
STEADY = ("id", "pid", "started_at", "release_version", "cordoned")


@pytest.fixture(scope="module")
def tiny(cluster: Cluster) -> Generator[Path]:
    """A small application in one region, deployed once."""
    cluster.fly("apps", "create", "tiny")
    folder = tiny_app(cluster.folder("tiny"), "tiny")
    cluster.fly("deploy", cwd=folder)
    cluster.wait_served("tiny", "one")
    yield folder
    cluster.fly("apps", "destroy", "tiny", "--yes")


def steady(cluster: Cluster, app: str) -> list[dict[str, Any]]:
    """What a deploy that was undone may not have changed."""
    return [{name: machine[name] for name in STEADY} for machine in cluster.machines(app)]


def newest_release(cluster: Cluster, app: str) -> dict[str, Any]:
    return cluster.fly("releases", "-a", app, "--json").json()[0]


async def deploy_leader(cluster: Cluster) -> str:
    """The region whose flyd walks the deploys."""
    kv = EtcdKV(cluster.local.plan.etcd, cluster.host_credentials("ams"))
    try:
        held = await kv.get(keys.leader(CONTROLLER))
    finally:
        await kv.close()
    if held is None:
        return ""
    name = held.value.decode().strip('"')
    return next(host.region for host in cluster.local.plan.hosts if host.name == name)


def test_a_first_deploy_is_served_once_it_is_complete(cluster: Cluster) -> None:
    cluster.fly("apps", "create", "at-once")
    cluster.fly("deploy", cwd=tiny_app(cluster.folder("at-once"), "at-once"))
    assert [cluster.get(region, "at-once").text for region in REGIONS] == ["one"] * len(REGIONS)
    cluster.fly("apps", "destroy", "at-once", "--yes")


async def test_chat_rolls_without_a_failed_request(cluster: Cluster) -> None:
    folder = cluster.folder("chat") / "chat"
    shutil.copytree(EXAMPLES / "chat", folder)
    with (folder / "page.html").open("a") as page:
        page.write("<!-- one line more -->\n")
    before = cluster.machines("chat")
    async with traffic(cluster, "chat") as seen:
        await asyncio.to_thread(cluster.fly, "deploy", cwd=folder)
        await seen.wait_more(8)
        assert not seen.failures
    after = cluster.machines("chat")
    assert [machine["region"] for machine in after] == sorted(REGIONS)
    assert not {m["id"] for m in before} & {m["id"] for m in after}
    for region in REGIONS:
        assert "one line more" in cluster.get(region, "chat").text
    assert newest_release(cluster, "chat")["status"] == "complete"


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ({"begin": "sys.exit('no such table: users')"}, ("no such table: users", "exited with code 1")),
        ({"status": 500}, ("500", "was not healthy in 5 s")),
        (
            {"deploy": "release_command = \"sh -c 'echo bad migration; exit 3'\"\n"},
            ("bad migration", "code 3"),
        ),
    ],
    ids=["crashes", "fails its check", "release command fails"],
)
def test_a_bad_release_undoes_itself(
    cluster: Cluster, tiny: Path, how: dict[str, Any], wanted: tuple[str, ...]
) -> None:
    before = steady(cluster, "tiny")
    bad = tiny_app(cluster.folder("bad"), "tiny", version="bad", **how)
    ran = cluster.fly.run("deploy", cwd=bad)
    assert ran.code == FAILED
    for part in wanted:
        assert part in ran.err.partition("Error: ")[2], ran.err
    assert newest_release(cluster, "tiny")["status"] == "failed"
    assert steady(cluster, "tiny") == before
    cluster.wait_served("tiny", "one")


def test_scaling_ends_once_new_machines_pass_their_checks(cluster: Cluster, tiny: Path) -> None:
    (before,) = cluster.machines("tiny")
    made = cluster.fly("scale", "count", "2", "-a", "tiny", "--yes", "--json").json()["created_ids"]
    (new,) = [machine for machine in cluster.machines("tiny") if machine["id"] != before["id"]]
    assert made == [new["id"]]
    assert new["checks"]
    assert all(check["status"] == "passing" for check in new["checks"])
    cluster.fly("scale", "count", "1", "-a", "tiny", "--yes")
    wait_for(lambda: len(cluster.machines("tiny")) == 1, "the newer one is gone")
    assert [machine["id"] for machine in cluster.machines("tiny")] == [before["id"]]


async def test_the_deployer_dies_in_the_middle(cluster: Cluster) -> None:
    leader = await deploy_leader(cluster)
    others = [region for region in REGIONS if region != leader]
    await asyncio.to_thread(cluster.fly, "apps", "create", "carried-on")
    folder = tiny_app(
        cluster.folder("carried-on"), "carried-on", deploy='release_command = "sleep 2"\n', version="done"
    )
    asked = ",".join(cluster.api(region) for region in (leader, *others))  # its watch dies with it
    deploy = cluster.fly.start("deploy", "--regions", ",".join(others), cwd=folder, api=asked)
    await asyncio.to_thread(
        wait_for, lambda: cluster.machines("carried-on", asked), "the release command is placed"
    )
    os.kill(cluster.local.flyd_pid(cluster.host(leader)), signal.SIGKILL)
    ran = await asyncio.to_thread(ended, deploy)
    assert ran.code == 0, ran.err
    assert await deploy_leader(cluster) in others
    cluster.local.start_flyd(cluster.host(leader))
    cluster.local.wait_ready((cluster.host(leader),))
    machines = cluster.machines("carried-on")
    assert [machine["region"] for machine in machines] == sorted(others)
    cluster.wait_served("carried-on", "done")
    cluster.fly("apps", "destroy", "carried-on", "--yes")


def test_a_region_s_only_host_may_be_away_for_a_moment(cluster: Cluster) -> None:
    cluster.fly("apps", "create", "patient")
    folder = tiny_app(cluster.folder("patient"), "patient")
    host, asked = cluster.host("ams"), ",".join(cluster.api(region) for region in ("iad", "sin"))

    def lost() -> bool:
        hosts = cluster.fly("hosts", "list", "--json", api=asked).json()
        return [h["state"] for h in hosts if h["region"] == "ams"] == ["lost"]

    os.kill(cluster.local.flyd_pid(host), signal.SIGKILL)
    wait_for(lost, "ams is lost")
    deploy = cluster.fly.start("deploy", cwd=folder, api=asked)
    wait_for(
        lambda: cluster.fly("releases", "-a", "patient", "--json", api=asked).json(), "the deploy has begun"
    )
    cluster.local.start_flyd(host)
    ran = ended(deploy)
    assert ran.code == 0, ran.err
    cluster.local.wait_ready((host,))
    cluster.wait_served("patient", "one")
    cluster.fly("apps", "destroy", "patient", "--yes")


def test_a_volume_stays_with_its_app(cluster: Cluster) -> None:
    def starts() -> list[dict[str, Any]]:
        answer = cluster.get("iad", "notes", "/notes/starts.json?_shape=array")
        return answer.json() if answer.status_code == 200 else []

    before = starts()
    (volume,) = cluster.fly("volumes", "list", "-a", "notes", "--json").json()
    cluster.fly("deploy", cwd=EXAMPLES / "notes")
    after = wait_for(starts, "notes answers")
    assert after[: len(before)] == before
    assert len(after) == len(before) + 1
    (kept,) = cluster.fly("volumes", "list", "-a", "notes", "--json").json()
    assert kept["id"] == volume["id"]
    assert kept["epoch"] > volume["epoch"]
    (machine,) = cluster.machines("notes")
    assert kept["attached_machine_id"] == machine["id"]


def test_data_is_not_left_behind_in_another_region(cluster: Cluster) -> None:
    (volume,) = cluster.fly("volumes", "list", "-a", "notes", "--json").json()
    (before,) = steady(cluster, "notes")
    other = next(region for region in REGIONS if region != volume["region"])
    said = cluster.fly.refused(REFUSED, "deploy", "--regions", other, cwd=EXAMPLES / "notes")
    assert f"{volume['id']} in {volume['region']}" in said
    assert f"fly volumes create {volume['name']} --region {other} -a notes" in said
    assert cluster.fly("volumes", "list", "-a", "notes", "--json").json() == [volume]
    assert steady(cluster, "notes") == [before]
