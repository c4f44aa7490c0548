"""How a deploy begins: versions, regions, and one run at a time."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from flyd.deploy.appconfig import AppConfig
from flyd.deploy.releases import (
    DeployRun,
    Phase,
    Release,
    ReleaseStatus,
    RunState,
    list_releases,
    list_runs,
)
from flyd.deploy.requests import KEPT_RUNS, start_deploy
from flyd.errors import Conflict, FlydError, InvalidInput, NotFound, OutcomeUnknown, Refused
from flyd.model import App, AppKind, decode, encode
from flyd.ports import KV
from flyd.store import keys
from flyd.store.memory import MemoryKV
from tests.support.placing import CountedEntropy, FixedClock

CLOCK = FixedClock()


async def make_app(kv: KV, **changes: object) -> None:
    app = msgspec.structs.replace(App(name="chat", regions=("ams", "iad")), **changes)
    await kv.put(keys.app("chat"), encode(app))


async def deploy(
    kv: KV,
    *,
    config: AppConfig | None = None,
    regions: tuple[str, ...] = (),
    seed: str = "",
    by: str = "ams-1",
) -> DeployRun:
    return await start_deploy(
        kv,
        "chat",
        "host:",
        config or AppConfig(app="chat"),
        clock=CLOCK,
        entropy=CountedEntropy(seed),
        regions=regions,
        requested_by=by,
    )


async def end(kv: KV, run: DeployRun, status: ReleaseStatus) -> None:
    ended = msgspec.structs.replace(run, state=RunState(status.value), phase=Phase.ENDED)
    await kv.put(keys.run(run.app, run.id), encode(ended))
    record = await kv.get(keys.release(run.app, run.version))
    assert record is not None
    release = msgspec.structs.replace(decode(record.value, Release), status=status)
    await kv.put(record.key, encode(release))


async def test_versions_grow_and_the_previous_one_is_the_newest_that_was_complete() -> None:
    kv = MemoryKV()
    await make_app(kv)
    seen: list[tuple[int, int]] = []
    for number, status in enumerate((ReleaseStatus.COMPLETE, ReleaseStatus.FAILED, ReleaseStatus.COMPLETE)):
        run = await deploy(kv, seed=str(number))
        seen.append((run.version, run.previous_version))
        await end(kv, run, status)
    assert seen == [(1, 0), (2, 1), (3, 1)]
    assert [r.version for r in await list_releases(kv, "chat")] == [1, 2, 3]
    assert [r.version for r in await list_runs(kv, "chat")] == [1, 2, 3]


async def test_a_second_deploy_is_refused_with_who_and_when() -> None:
    kv = MemoryKV()
    await make_app(kv)
    await deploy(kv, by="lena on iad-1", seed="1")
    with pytest.raises(Conflict, match=r"version 1, begun by lena on iad-1 at 22:13:20 UTC, now planning"):
        await deploy(kv, seed="2")


async def test_of_many_at_once_one_begins() -> None:
    kv = MemoryKV()
    await make_app(kv)
    outcomes = await asyncio.gather(*(deploy(kv, seed=str(n)) for n in range(8)), return_exceptions=True)
    assert sum(isinstance(o, DeployRun) for o in outcomes) == 1
    assert sum(isinstance(o, Conflict) for o in outcomes) == 7
    assert len(await list_releases(kv, "chat")) == len(await list_runs(kv, "chat")) == 1


async def test_a_lost_answer_begins_one_run() -> None:
    class LostOnce(MemoryKV):
        lost = False

        async def _after(self, op: str) -> None:
            if op == "txn" and not self.lost:
                self.lost = True
                raise OutcomeUnknown("the answer got lost")

    kv = LostOnce()
    await make_app(kv)
    run = await deploy(kv)
    assert await list_runs(kv, "chat") == (run,)


@pytest.mark.parametrize(
    ("of_app", "of_file", "primary", "asked", "chosen"),
    [
        (("ams", "iad"), ("sin",), "", (), ("ams", "iad")),
        ((), ("sin", "ams"), "sin", (), ("sin", "ams")),
        (("ams", "iad"), ("iad",), "iad", (), ("iad", "ams")),
        (("ams", "iad"), ("iad",), "iad", ("sin", "ams", "sin"), ("sin", "ams")),
        (("ams",), (), "fra", (), ("ams",)),
    ],
)
async def test_regions(
    of_app: tuple[str, ...],
    of_file: tuple[str, ...],
    primary: str,
    asked: tuple[str, ...],
    chosen: tuple[str, ...],
) -> None:
    kv = MemoryKV()
    await make_app(kv, regions=of_app)
    config = AppConfig(app="chat", regions=of_file, primary_region=primary)
    run = await deploy(kv, config=config, regions=asked)
    record = await kv.get(keys.app("chat"))
    assert record is not None
    assert run.regions == decode(record.value, App).regions == chosen


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (None, NotFound, "no app is called 'chat'"),
        ({"regions": ()}, InvalidInput, "no region to run in"),
        ({"kind": AppKind.POSTGRES}, Refused, "is a Postgres cluster"),
    ],
)
async def test_refusals(changes: dict[str, object] | None, error: type[FlydError], words: str) -> None:
    kv = MemoryKV()
    if changes is not None:
        await make_app(kv, **changes)
    with pytest.raises(error, match=words):
        await deploy(kv)
    assert await list_releases(kv, "chat") == ()


async def test_old_runs_go() -> None:
    kv = MemoryKV()
    await make_app(kv)
    for number in range(KEPT_RUNS + 3):
        await end(kv, await deploy(kv, seed=str(number)), ReleaseStatus.COMPLETE)
    assert len(await list_runs(kv, "chat")) == KEPT_RUNS + 1
    assert len(await list_releases(kv, "chat")) == KEPT_RUNS + 3
