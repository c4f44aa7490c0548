"""Waiting for new machines without a deploy, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from flyd.deploy.appconfig import machine_config
from flyd.deploy.health import Readiness, Verdict
from flyd.deploy.readiness import watch_readiness
from flyd.machines.commands import set_desired
from flyd.model import Desired
from flyd.placement.placer import Placer
from flyd.placement.scheduler import Order
from flyd.ports import Delete
from flyd.store import keys
from flyd.store.memory import MemoryKV
from flyd.store.mirror import Mirror
from tests.simulation.loop import current
from tests.support.deployers import LoopClock, new_cluster, simulate
from tests.support.placing import CountedEntropy
from tests.support.rollouts import WORKER, Behaviour, make_config


class Watched:
    """One new machine in each region, and what is told of them."""

    def __init__(self, kv: MemoryKV) -> None:
        self.kv = kv
        self.mirror = Mirror(kv, (keys.ROOT,))
        self.told: list[tuple[Readiness, ...]] = []
        self.ids: list[str] = []

    async def begin(self) -> None:
        current().spawn("mirror", self.mirror.keep())
        await self.mirror.wait_synced()
        placer = Placer(self.kv, self.mirror, clock=LoopClock(), entropy=CountedEntropy())
        for region, group in (("ams", "app"), ("iad", "app"), ("ams", "worker")):
            config = machine_config(make_config(app=make_config().groups["app"], worker=WORKER), group, "i")
            placed = await placer.place(Order(app="chat", config=config, region=region))
            self.ids.append(placed.id)

    async def watch(self, timeout_s: float, ids: Sequence[str] = ()) -> None:
        clock = LoopClock()
        async for seen in watch_readiness(self.mirror, "chat", ids or self.ids, timeout_s, clock):
            self.told.append(seen)

    @property
    def verdicts(self) -> list[str]:
        return [one.verdict.value for one in self.told[-1]]


def told_of(behaviour: Behaviour, timeout_s: float) -> list[Watched]:
    """One for each seed."""
    found: list[Watched] = []

    async def main() -> None:
        watched = Watched(await new_cluster(behaviour, "chat"))
        await watched.begin()
        await watched.watch(timeout_s)
        found.append(watched)

    simulate(main, seeds=3)
    return found


def test_it_ends_once_all_have_passed_their_checks_or_run_for_a_moment() -> None:
    for watched in told_of(lambda _: "ok", 1e9):
        assert watched.verdicts == ["healthy"] * 3
        assert [one.verdict for one in watched.told[0]] == [Verdict.WAITING] * 3


def test_at_its_end_it_says_which_check_fails() -> None:
    for watched in told_of(lambda m: "sick" if m.region == "iad" else "ok", 30.0):
        assert watched.verdicts == ["healthy", "waiting", "healthy"]
        assert "check service-8080 critical: connection refused" in watched.told[-1][1].said
        assert watched.told[-1][1].host == "iad-1"


def test_what_can_never_become_well_is_not_waited_for() -> None:
    for watched in told_of(lambda m: "exits" if m.region == "iad" else "ok", 1e9):
        assert watched.verdicts == ["healthy", "failed", "healthy"]
        assert "exited with code 1" in watched.told[-1][1].said


def test_destroyed_lost_and_unheard_machines() -> None:
    async def main() -> None:
        watched = Watched(await new_cluster(lambda _: "silent", "chat"))
        await watched.begin()
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(watched.watch(1e9))
            await asyncio.sleep(1.0)
            assert watched.verdicts == ["waiting"] * 3
            await set_desired(watched.kv, "chat", watched.ids[0], Desired.DESTROYED)
            await watched.kv.txn((), (Delete(keys.alive("ams-1")), Delete(keys.alive("iad-1"))))
            await watching
        assert [one.said.partition(";")[0] for one in watched.told[-1]] == [
            "was destroyed by somebody else", "is on lost host iad-1", "is on lost host ams-1"
        ]  # fmt: skip
        await watched.watch(5.0, ["unheard"])
        assert watched.verdicts == ["waiting"]

    simulate(main, seeds=2)
