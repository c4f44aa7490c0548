"""Where images meet the rest of flyd: a machine's CREATE, the end of a deploy, the command's choice."""

from __future__ import annotations

import asyncio
import dataclasses

import msgspec
import pytest

from flyd.cli.images import figures, megabytes, runs_containers
from flyd.deploy.appconfig import parse
from flyd.deploy.releases import DeployRun, Release, ReleaseStatus, RunState
from flyd.errors import Refused
from flyd.images.layers import ORPHAN_AGE_S
from flyd.images.prune import keep_images_pruned
from flyd.machines.decide import CREATE
from flyd.machines.environment import Assignment
from flyd.machines.operations import Job, Tools, begin, execute
from flyd.model import MachineConfig
from flyd.model.image import IMAGE_PREFIX
from flyd.ports import ImageStore
from flyd.store import keys
from flyd.store.mirror import Mirror
from flyd.v1 import hosts_pb2, images_pb2
from tests.support.host_world import LoopClock, World, machine
from tests.support.images import FakeImages

IMAGES = [f"{n:064x}" for n in range(6)]
PORT: type[ImageStore] = FakeImages  # pyright proves that the fake has the port's shape


def tools_with(world: World, images: ImageStore | None) -> Tools:
    return dataclasses.replace(world.tools(), images=images)


async def created(tools: Tools) -> str:
    """What creating a machine from an image ends with."""
    claim = machine(config=MachineConfig(image=IMAGE_PREFIX + IMAGES[0]))
    assignment = Assignment(claim=claim, primary_region="fra")
    begin(tools, "r1", Job(operation=CREATE, assignment=assignment))
    await execute(tools, "r1")
    record = tools.records.get("m1")
    return record.detail if record else ""


async def test_create_brings_the_image_first() -> None:
    world, images = World(), FakeImages(IMAGES[0])
    assert await created(tools_with(world, images)) == ""
    assert await images.has(IMAGES[0])
    assert world.driver.specs["m1"].image == IMAGE_PREFIX + IMAGES[0]


async def test_create_without_the_image_fails_and_says_why() -> None:
    world, images = World(), FakeImages()
    assert "is on no host" in await created(tools_with(world, images))
    assert world.driver.specs == {}


async def test_a_host_of_processes_takes_no_image() -> None:
    world = World()
    assert "runs no container images" in await created(tools_with(world, None))


class Cluster:
    """etcd with releases, one host that prunes."""

    def __init__(self) -> None:
        self.world = World()
        self.images = FakeImages()
        self.images.here = dict.fromkeys(IMAGES, ORPHAN_AGE_S * 9)

    def release(self, version: int, state: RunState = RunState.COMPLETE) -> None:
        config = parse('app = "web"', "fly.toml")
        run = DeployRun(id=f"{version:08d}-x", app="web", version=version, regions=("fra",), state=state)
        release = Release(
            version=version,
            app="web",
            image=IMAGE_PREFIX + IMAGES[version],
            config=config,
            status=ReleaseStatus.COMPLETE if state is RunState.COMPLETE else ReleaseStatus.RUNNING,
        )
        self.world.put(keys.release("web", version), release)
        self.world.put(keys.run("web", run.id), run)

    async def prune_until(self, *gone: int) -> None:
        mirror = Mirror(self.world.kv, (keys.ROOT,))
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(mirror.keep()),
                group.create_task(keep_images_pruned(mirror, self.images, LoopClock())),
            ]
            await self.world.until(lambda: self.images.tidied)
            seen = len(self.images.tidied)
            self.release(5)
            await self.world.until(lambda: len(self.images.tidied) > seen)
            assert self.images.removed == [IMAGES[n] for n in gone]
            for task in tasks:
                task.cancel()


async def test_the_end_of_a_deploy_prunes() -> None:
    cluster = Cluster()
    for version in (1, 2, 3):
        cluster.release(version)
    cluster.release(4, RunState.RUNNING)
    claim = machine(config=MachineConfig(image=IMAGE_PREFIX + IMAGES[1]))
    cluster.world.claim(msgspec.structs.replace(claim, host="h2"))
    await cluster.prune_until(2)  # 1 has a machine, 3 to 5 are the last three, 0 is of no release and young


async def test_a_prune_that_fails_is_done_at_the_next_end() -> None:
    cluster = Cluster()
    cluster.images.fails = 1
    for version in (1, 2, 3, 4):
        cluster.release(version)
    mirror = Mirror(cluster.world.kv, (keys.ROOT,))
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(mirror.keep()),
            group.create_task(keep_images_pruned(mirror, cluster.images, LoopClock())),
        ]
        await cluster.world.until(lambda: not cluster.images.fails)
        cluster.release(5)
        await cluster.world.until(lambda: cluster.images.removed == IMAGES[1:3])
        for task in tasks:
            task.cancel()


def host(driver: str, state: str = "up") -> hosts_pb2.Host:
    return hosts_pb2.Host(name=driver, driver=driver, state=state)


def test_what_is_deployed_is_what_the_living_hosts_run() -> None:
    assert runs_containers([host("docker"), host("docker"), host("process", "lost")])
    assert not runs_containers([host("process")])
    assert not runs_containers([])
    with pytest.raises(Refused, match="docker, process"):
        runs_containers([host("docker"), host("process")])


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [(0, "0.0 KB"), (4036, "4.0 KB"), (312_000, "0.3 MB"), (9_940_000, "9.9 MB"), (212_400_000, "212 MB")],
)
def test_sizes(size_bytes: int, shown: str) -> None:
    assert megabytes(size_bytes) == shown


def test_figures_are_numbers() -> None:
    move = images_pb2.ImageMove(host="ams-1", image_bytes=10, moved_bytes=2)
    assert figures([move]) == [{"host": "ams-1", "image_bytes": 10, "moved_bytes": 2, "error": ""}]
