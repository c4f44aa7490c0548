"""The deployer over the in-memory etcd in virtual time: crashed around every write, deposed, many apps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from flyd.deploy.appconfig import AppConfig
from flyd.deploy.releases import (
    Release,
    ReleaseStatus,
    RunState,
    list_releases,
    list_runs,
)
from flyd.deploy.requests import start_deploy
from flyd.errors import OutcomeUnknown, Unavailable
from flyd.model import App, Desired, Machine, Reservations, Volume, decode, encode
from flyd.ports import KV, Delete, Put, TxnResult, Unchanged
from flyd.store import keys
from flyd.store.memory import MemoryEtcd, MemoryKV
from tests.simulation.loop import current, run, stream
from tests.support.deployers import (
    LoopClock,
    all_well,
    deployer_process,
    machines_of,
    new_cluster,
    simulate,
    start,
    wait_ended,
)
from tests.support.placing import CountedEntropy
from tests.support.rollouts import STATEFUL, Behaviour, make_config, with_command


class CrashingKV(MemoryKV):
    """Crashes the deployer around its n-th transaction: before it, or after it."""

    def __init__(self, server: MemoryEtcd, at: int, after: bool, crash: Callable[[], Any]) -> None:
        super().__init__(server)
        self.txns = 0
        self._at, self._after_it, self._crash = at, after, crash

    async def txn(self, compares: Sequence[Unchanged], effects: Sequence[Put | Delete]) -> TxnResult:
        self.txns += 1
        if self.txns != self._at:
            return await super().txn(compares, effects)
        if self._after_it:
            await super().txn(compares, effects)
        self._crash()
        await asyncio.sleep(3600)  # a crashed process does not get here
        raise AssertionError


class FreezingKV(MemoryKV):
    """Freezes the deployer as it sends its n-th transaction; once awake it sends it all the same."""

    def __init__(self, server: MemoryEtcd, freeze: Callable[[], Any]) -> None:
        super().__init__(server)
        self.txns = 0
        self.at = 0
        self._freeze = freeze

    async def txn(self, compares: Sequence[Unchanged], effects: Sequence[Put | Delete]) -> TxnResult:
        self.txns += 1
        if self.txns == self.at:
            self._freeze()
        return await super().txn(compares, effects)


class LosingKV(MemoryKV):
    """Every third answer of a transaction is lost, every tenth read fails."""

    def __init__(self, server: MemoryEtcd) -> None:
        super().__init__(server)
        self.count = 0

    async def _before(self, op: str) -> None:
        await super()._before(op)
        self.count += 1
        if op in ("get", "list") and self.count % 10 == 0:
            raise Unavailable("etcd did not answer")

    async def _after(self, op: str) -> None:
        if op == "txn" and self.count % 3 == 0:
            raise OutcomeUnknown("the answer got lost")


async def leader(kv: KV) -> bytes:
    record = await kv.get(keys.leader("deployer"))
    return record.value if record else b""


async def check_books(kv: KV) -> None:
    """What is promised is what is claimed, after all has been freed."""
    machines = [m for app in ("chat", "shop") for m in await machines_of(kv, app)]
    claimed = {m.id for m in machines}
    promised = [decode(i.value, Reservations) for i in (await kv.list(keys.RESERVATIONS)).items]
    assert {machine_id for held in promised for machine_id in held.machines} == claimed
    volumes = [decode(item.value, Volume) for item in (await kv.list(keys.VOLUMES)).items]
    assert {v.attached_machine for v in volumes} <= claimed | {""}
    assert all(m.desired is Desired.STARTED and not m.cordoned for m in machines)


def sick_second(machine: Machine) -> str:
    return "sick" if (machine.release, machine.region) == (2, "iad") else "ok"


async def two_releases(
    config: AppConfig, behaviour: Behaviour, crash_at: int, after: bool
) -> tuple[str, list[tuple[str, int]], int]:
    """Release 1 by a sound deployer; release 2 by one that crashes, and its successor."""
    kv = await new_cluster(behaviour, "chat")
    loop = current()
    loop.spawn("first", deployer_process(MemoryKV(kv.server), "first"))
    await start(kv, "chat", 1, config)
    assert (await wait_ended(kv, "chat")).state is RunState.COMPLETE
    loop.crash("first")
    crashing = CrashingKV(kv.server, crash_at, after, lambda: loop.crash("second"))
    loop.spawn("second", deployer_process(crashing, "second"))
    while loop.alive("second") and await leader(kv) != b"second":
        await asyncio.sleep(0.1)
    loop.spawn("third", deployer_process(MemoryKV(kv.server), "third"))
    await start(kv, "chat", 2, config)
    ended = await wait_ended(kv, "chat")
    await asyncio.sleep(10)  # what is not waited for is gone as well
    await check_books(kv)
    releases = await list_releases(kv, "chat")
    assert releases[-1].status.value == ended.state.value
    left = sorted((m.region, m.release) for m in await machines_of(kv, "chat"))
    return ended.state.value, left, crashing.txns


def immediate(config: AppConfig) -> AppConfig:
    """All slots go through each step together."""
    return msgspec.structs.replace(
        config, deploy=msgspec.structs.replace(config.deploy, strategy="immediate")
    )


CASES = {
    "well": (make_config(), all_well, ("complete", [("ams", 2), ("iad", 2)])),
    "undone": (with_command(make_config()), sick_second, ("failed", [("ams", 1), ("iad", 1)])),
    "immediate": (immediate(make_config()), all_well, ("complete", [("ams", 2), ("iad", 2)])),
    "volumes": (make_config(app=STATEFUL), all_well, ("complete", [("ams", 2), ("iad", 2)])),
    "volumes undone": (make_config(app=STATEFUL), sick_second, ("failed", [("ams", 1), ("iad", 1)])),
}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("case", sorted(CASES))
def test_a_crash_around_any_write_changes_nothing_in_the_end(case: str, after: bool) -> None:
    config, behaviour, expected = CASES[case]
    at = 0
    while True:
        at += 1

        async def main(at: int = at) -> tuple[str, list[tuple[str, int]], int]:
            return await two_releases(config, behaviour, at, after)

        state, left, txns = run(at, main)
        assert (state, left) == expected, f"crash {'after' if after else 'before'} write {at}"
        if txns < at:
            break  # it was never reached: all of them have been tried
    assert at > 10


def test_lost_answers_and_failed_reads_change_nothing_in_the_end() -> None:
    async def main() -> None:
        kv = await new_cluster(all_well, "chat")
        current().spawn("only", deployer_process(LosingKV(kv.server), "only"))
        for version in (1, 2):
            await start(kv, "chat", version, with_command(make_config(app=STATEFUL)))
            assert (await wait_ended(kv, "chat")).state is RunState.COMPLETE
        await asyncio.sleep(10)
        await check_books(kv)
        assert len(await machines_of(kv, "chat")) == 2

    simulate(main)


async def frozen_at(
    config: AppConfig, behaviour: Behaviour, freeze_at: int
) -> tuple[str, list[tuple[str, int]], int]:
    """Release 2 by a deployer that freezes as it sends a write, and sends it long after it is deposed."""
    kv = await new_cluster(behaviour, "chat")
    loop = current()
    late = FreezingKV(kv.server, lambda: loop.pause("first"))
    loop.spawn("first", deployer_process(late, "first"))
    await start(kv, "chat", 1, config)
    await wait_ended(kv, "chat")
    late.txns, late.at = 0, freeze_at
    await start(kv, "chat", 2, config)
    await asyncio.sleep(5.0)
    loop.spawn("second", deployer_process(MemoryKV(kv.server), "second"))
    await asyncio.sleep(stream(loop.seed, "resume").uniform(6.0, 12.0))
    loop.resume("first")
    ended = await wait_ended(kv, "chat")
    await asyncio.sleep(10)
    await check_books(kv)
    return ended.state.value, sorted((m.region, m.release) for m in await machines_of(kv, "chat")), late.txns


@pytest.mark.parametrize("case", sorted(CASES))
def test_a_late_write_of_a_deposed_deployer_changes_nothing(case: str) -> None:
    config, behaviour, expected = CASES[case]
    for seed in range(3):
        at = 0
        while True:
            at += 1

            async def main(at: int = at) -> tuple[str, list[tuple[str, int]], int]:
                return await frozen_at(config, behaviour, at)

            state, left, txns = run(seed, main)
            assert (state, left) == expected, f"seed {seed}: late write {at}"
            if txns < at:
                break
        assert at > 10


def test_the_successor_takes_the_very_volume_of_the_old_machine() -> None:
    async def main() -> None:
        kv = await new_cluster(sick_second, "chat")
        current().spawn("only", deployer_process(MemoryKV(kv.server), "only"))
        await start(kv, "chat", 1, make_config(app=STATEFUL))
        await wait_ended(kv, "chat")
        held = sorted(m.config.mounts[0].volume for m in await machines_of(kv, "chat"))
        for region in ("ams", "iad"):  # free ones that come first by id
            free = Volume(
                id=f"vol_0{region}", name="data", app="chat", region=region, host=f"{region}-1", size_gb=1
            )
            await kv.put(keys.volume("chat", free.id), encode(free))
        for version, state in ((2, RunState.FAILED), (3, RunState.COMPLETE)):
            await start(kv, "chat", version, make_config(app=STATEFUL))
            assert (await wait_ended(kv, "chat")).state is state
            await asyncio.sleep(10)
            assert sorted(m.config.mounts[0].volume for m in await machines_of(kv, "chat")) == held
        await check_books(kv)

    simulate(main, seeds=2)


def test_apps_are_deployed_side_by_side() -> None:
    async def main() -> None:
        kv = await new_cluster(lambda m: "silent" if m.app == "chat" else "ok", "chat", "shop")
        current().spawn("only", deployer_process(MemoryKV(kv.server), "only"))
        await start(kv, "chat", 1, make_config())
        await start(kv, "shop", 1, make_config())
        assert (await wait_ended(kv, "shop")).state is RunState.COMPLETE
        assert (await list_runs(kv, "chat"))[-1].state is RunState.RUNNING
        assert (await wait_ended(kv, "chat")).state is RunState.FAILED

    simulate(main, seeds=2)


def test_a_failed_run_says_what_was_last_known() -> None:
    async def main() -> None:
        kv = await new_cluster(sick_second, "chat")
        current().spawn("only", deployer_process(MemoryKV(kv.server), "only"))
        for version in (1, 2):
            await start(kv, "chat", version, make_config())
            ended = await wait_ended(kv, "chat")
        assert "in iad on iad-1 was not healthy in 60 s" in ended.error
        assert "check service-8080 critical: connection refused" in ended.error
        assert "> boom on iad" in ended.error
        assert not ended.reasons
        texts = [line.text for line in ended.lines]
        assert texts[0] == "release 2: 2 machines in ams, iad"
        assert "walking back" in texts
        assert texts[-1] == "release 2 failed and was undone; release 1 is what runs"
        statuses = [r.status for r in await list_releases(kv, "chat")]
        assert statuses == [ReleaseStatus.COMPLETE, ReleaseStatus.FAILED]

    simulate(main, seeds=1)


@pytest.mark.parametrize("state", [RunState.FAILED, RunState.COMPLETE])
def test_an_undone_deploy_to_other_regions_leaves_the_app_its_regions(state: RunState) -> None:
    async def main() -> None:
        kv = await new_cluster(sick_second if state is RunState.FAILED else all_well, "chat")
        current().spawn("only", deployer_process(MemoryKV(kv.server), "only"))
        await start(kv, "chat", 1, make_config())
        await wait_ended(kv, "chat")
        await start_deploy(
            kv, "chat", "i", make_config(), clock=LoopClock(), entropy=CountedEntropy("2"), regions=("iad",)
        )
        assert (await wait_ended(kv, "chat")).state is state
        record = await kv.get(keys.app("chat"))
        assert record is not None
        wanted = ("ams", "iad") if state is RunState.FAILED else ("iad",)
        assert decode(record.value, App).regions == wanted

    simulate(main, seeds=2)


def test_a_release_that_is_gone_ends_its_run() -> None:
    async def main() -> None:
        kv = await new_cluster(all_well, "chat")
        started = await start(kv, "chat", 1, make_config())
        record = await kv.get(keys.release("chat", 1))
        assert record is not None
        assert decode(record.value, Release).run_id == started.id
        await kv.txn((), (Delete(record.key),))
        current().spawn("only", deployer_process(MemoryKV(kv.server), "only"))
        ended = await wait_ended(kv, "chat")
        assert msgspec.structs.replace(ended, updated_at_s=0).error == "release 1 is gone from etcd"

    simulate(main, seeds=1)
