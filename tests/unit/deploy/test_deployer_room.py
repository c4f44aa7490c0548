"""What the deployer does when no host can take a machine: waits for lost hosts alone, says why of each."""

from __future__ import annotations

import asyncio

import pytest

from flyd.deploy.releases import DeployRun, RunState
from flyd.deploy.rollout import HOST_LOST_WAIT_S
from flyd.ports import Delete
from flyd.store import keys
from flyd.store.memory import MemoryKV
from tests.simulation.loop import current
from tests.support.deployers import (
    all_well,
    deployer_process,
    machines_of,
    new_cluster,
    simulate,
    start,
    wait_ended,
)
from tests.support.placing import join, make_host
from tests.support.rollouts import make_config


def test_no_room_is_said_with_each_hosts_reason() -> None:
    async def main() -> None:
        kv = await new_cluster(all_well, "chat")
        await join(kv, make_host("iad-1", memory_mb=100))
        current().spawn("only", deployer_process(MemoryKV(kv.server), "only"))
        await start(kv, "chat", 1, make_config())
        ended = await wait_ended(kv, "chat")
        assert ended.state is RunState.FAILED
        assert "ams-1: wrong region ams (iad wanted)" in ended.error
        assert "iad-1: needs 256 MB memory, 100 MB free of 100" in ended.error.splitlines()[2]
        assert ended.reasons == {
            "ams-1": "wrong region ams (iad wanted)",
            "iad-1": "needs 256 MB memory, 100 MB free of 100",
        }
        await asyncio.sleep(10)
        assert await machines_of(kv, "chat") == []

    simulate(main, seeds=1)


async def first_deploy_without(
    *lost: str, back_after_s: float = 1e6, memory_mb: int = 2048
) -> tuple[DeployRun, float]:
    """A first deploy while hosts have just lost their lease; how it ended, and when."""
    kv = await new_cluster(all_well, "chat")
    await join(kv, make_host("iad-1", memory_mb=memory_mb))
    for name in lost:
        await kv.txn((), (Delete(keys.alive(name)),))
    current().spawn("only", deployer_process(MemoryKV(kv.server), "only"))
    began_s = asyncio.get_running_loop().time()
    await start(kv, "chat", 1, make_config())

    async def come_back() -> None:
        await asyncio.sleep(back_after_s)
        for name in lost:
            await kv.put(keys.alive(name), b"true")

    current().spawn("hosts come back", come_back())
    return await wait_ended(kv, "chat"), asyncio.get_running_loop().time() - began_s


@pytest.mark.parametrize("lost", [("iad-1",), ("ams-1",), ("ams-1", "iad-1")])
def test_the_only_host_of_a_region_may_be_away_for_a_moment(lost: tuple[str, ...]) -> None:
    async def main() -> None:
        ended, _ = await first_deploy_without(*lost, back_after_s=20.0)
        assert ended.state is RunState.COMPLETE, ended.error

    simulate(main, seeds=2)


def test_a_lost_host_is_waited_for_no_longer_than_that() -> None:
    async def main() -> None:
        ended, took_s = await first_deploy_without("iad-1")
        assert "iad-1: lost" in ended.error
        assert HOST_LOST_WAIT_S <= took_s < HOST_LOST_WAIT_S + 10

    simulate(main, seeds=1)


@pytest.mark.parametrize("lost", [(), ("iad-1",)])
def test_what_no_waiting_mends_is_final_at_once(lost: tuple[str, ...]) -> None:
    async def main() -> None:
        ended, took_s = await first_deploy_without(*lost, memory_mb=100)
        assert ended.state is RunState.FAILED
        assert took_s < 10

    simulate(main, seeds=1)
