"""The simulator's fakes keep the contracts that tests/conformance asks of the real adapters.

Those suites use real files, processes and clients; here are their claims in virtual time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from flyd.errors import Compacted, Conflict, InvariantBroken, NotFound, OutcomeUnknown, Refused, Unavailable
from flyd.model import MachineSpec
from flyd.ports import Put, Unchanged
from pgha.model import DataState
from tests.simulation.disk import SimulatedVolumes
from tests.simulation.driver import Hardware, SimulatedDriver, Temper
from tests.simulation.ledger import Ledger
from tests.simulation.loop import run
from tests.simulation.network import ETCD, Network, SimulatedKV, Store, Weather
from tests.simulation.postgres import PostgresHost, SimulatedPostgres


def simulated(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run an async test in the simulator, with three seeds."""

    def in_simulation() -> None:
        for seed in (1, 2, 3):
            run(seed, test)

    in_simulation.__name__ = test.__name__
    return in_simulation


def spec(instance_id: str = "i1") -> MachineSpec:
    return MachineSpec(
        machine_id="m1",
        app="web",
        instance_id=instance_id,
        command=("serve",),
        env={},
        private_ip="127.1.0.2",
    )


# --------------------------------------------------------------------------- network and store


@simulated
async def test_a_lost_answer_leaves_the_effect():
    network, store = Network(), Store()
    network.weather = Weather(unanswered=1.0)
    kv = SimulatedKV(network, store, "ams")
    with pytest.raises(OutcomeUnknown):
        await kv.txn([Unchanged("k", 0)], [Put("k", b"1")])
    assert store.get("k") is not None


@simulated
async def test_a_late_request_takes_effect_after_its_sender_gave_up():
    network, store = Network(), Store()
    network.weather = Weather(late=1.0, latency_s=(2.0, 2.0))
    kv = SimulatedKV(network, store, "ams")
    with pytest.raises(OutcomeUnknown):
        await kv.put("k", b"1")
    assert store.get("k") is None
    await asyncio.sleep(10)
    assert store.get("k") is not None


@simulated
async def test_a_watch_skips_nothing_over_a_partition_and_says_when_history_is_gone():
    network, store = Network(), Store()
    kv = SimulatedKV(network, store, "ams")
    seen: list[str] = []

    async def follow() -> None:
        async for batch in kv.watch("k/", 1):
            seen.extend(change.key for change in batch.changes)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(follow())
        for n in range(20):
            if n == 5:
                network.cut("ams", ETCD)
            store.txn((), (Put(f"k/{n:02}", b""),))
            await asyncio.sleep(0.1)
        network.heal()
        await asyncio.sleep(5)
        task.cancel()
    assert seen == [f"k/{n:02}" for n in range(20)]
    store.compact(store.revision)
    with pytest.raises(Compacted):
        async for _ in kv.watch("k/", 2):
            pass


# --------------------------------------------------------------------------- hardware


@simulated
async def test_a_driver_is_idempotent_and_machines_outlive_it():
    hardware = Hardware("ams")
    driver = SimulatedDriver(hardware)
    with pytest.raises(NotFound):
        await driver.start(spec())
    await driver.create(spec())
    first = await driver.start(spec())
    assert (await driver.start(spec())).pid == first.pid
    with pytest.raises(Conflict):
        await driver.start(spec("i2"))
    assert (await SimulatedDriver(hardware).observe())["m1"].pid == first.pid
    assert await driver.stop("m1", "SIGINT", 1.0) is not None
    assert await driver.stop("m1", "SIGINT", 1.0) is None
    await driver.destroy("m1")
    await driver.destroy("m1")
    assert await driver.observe() == {}


@simulated
async def test_a_stop_waits_no_longer_than_for_the_end():
    hardware = Hardware("ams")
    hardware.temper = Temper(ignores_signals=1.0, exits_by_itself=1.0)
    driver = SimulatedDriver(hardware)
    await driver.create(spec())
    await driver.start(spec())
    ended = await driver.stop("m1", "SIGINT", 3600.0)
    assert ended is not None
    assert not ended.requested
    assert asyncio.get_running_loop().time() < 3600.0


def volumes_of(hardware: Hardware) -> SimulatedVolumes:
    return SimulatedVolumes(hardware.volumes, hardware.purged, hardware.work)


@simulated
async def test_volumes_are_fenced_by_epoch():
    volumes = volumes_of(Hardware("ams"))
    with pytest.raises(NotFound):
        await volumes.attach("v", "m1", 1)
    await volumes.detach("v", "m1", 1)
    await volumes.create("v", 1)
    path = await volumes.attach("v", "m1", 1)
    assert await volumes.attach("v", "m1", 1) == path
    for _ in range(2):
        with pytest.raises(Refused):
            await volumes.attach("v", "m2", 1)  # an epoch is one machine's, also after it let go
        await volumes.detach("v", "m1", 1)
    await volumes.attach("v", "m2", 2)
    await volumes.detach("v", "m1", 1)
    with pytest.raises(Refused):
        await volumes.attach("v", "m1", 1)
    with pytest.raises(Refused):
        await volumes.destroy("v", 1.0)


@simulated
async def test_a_destroyed_volume_is_kept_until_it_is_purged():
    hardware = Hardware("ams")
    volumes = volumes_of(hardware)
    await volumes.destroy("v", 1.0)
    with pytest.raises(NotFound):
        await volumes.undestroy("v")
    await volumes.create("v", 1)
    await volumes.destroy("v", 10.0)
    await volumes.destroy("v", 20.0)
    for asked in (volumes.create("v", 1), volumes.attach("v", "m1", 1), volumes.extend("v", 2)):
        with pytest.raises(NotFound):
            await asked
    assert await volumes.purge(19.0) == ()
    await volumes.undestroy("v")
    assert await volumes.purge(99.0) == ()
    await volumes.destroy("v", 20.0)
    assert await volumes.purge(20.0) == ("v",) == tuple(hardware.purged)
    with pytest.raises(NotFound):
        await volumes.undestroy("v")


# --------------------------------------------------------------------------- Postgres


class Pair:
    def __init__(self) -> None:
        hosts: dict[str, PostgresHost] = {}
        network, self.ledger = Network(), Ledger()
        for name in ("a", "b", "c"):
            hosts[name] = PostgresHost(name, network, self.ledger, hosts)
            hosts[name].founders = ("a", "b", "c")
        self.hosts = hosts
        self.a, self.b = SimulatedPostgres(hosts["a"]), SimulatedPostgres(hosts["b"])

    async def ready(self, postgres: SimulatedPostgres) -> None:
        await postgres.start()
        while not (await postgres.status()).ready:
            await asyncio.sleep(0.01)

    async def replicate(self) -> None:
        """`a` is primary on timeline 2, `b` streams from it."""
        await self.a.initialise()
        await self.ready(self.a)
        await self.a.promote(2)
        await self.b.copy("a:5432")
        await self.ready(self.b)
        await self.b.follow("a:5432")
        await asyncio.sleep(1)

    def insert(self, name: str) -> list[bool]:
        answers: list[bool] = []
        server = self.hosts[name].server
        assert server is not None
        row = self.ledger.send()
        server.inbox.put_nowait(lambda: server.insert(row, answers.append))
        return answers


@simulated
async def test_postgres_starts_fenced_once_and_dies_whole():
    pair = Pair()
    assert (await pair.a.data()).state is DataState.EMPTY
    await pair.a.initialise()
    with pytest.raises(Refused):
        await pair.a.initialise()
    await pair.a.save_promise(17)
    assert (await pair.a.data()).promised == 17
    await pair.ready(pair.a)
    server = pair.hosts["a"].server
    await pair.a.start()
    assert pair.hosts["a"].server is server
    status = await pair.a.status()
    assert (status.in_recovery, status.timeline, status.upstream) == (True, 1, "")
    with pytest.raises(Unavailable):
        await pair.a.copy("b:5432")
    assert (await pair.a.data()).state is DataState.READY
    await pair.a.kill()
    assert not (await pair.a.status()).running
    with pytest.raises(Unavailable):
        await pair.a.fence()


@simulated
async def test_a_commit_waits_for_a_replica_that_is_not_fenced():
    pair = Pair()
    await pair.replicate()
    assert [r.name for r in await pair.a.replicas()] == ["b"]
    first = pair.insert("a")
    await asyncio.sleep(1)
    assert first == [True]
    position = await pair.b.fence()
    waiting = pair.insert("a")
    await asyncio.sleep(5)
    assert waiting == []
    assert await pair.b.fence() == position
    with pytest.raises(InvariantBroken):
        await pair.b.promote(2)
    await pair.a.kill()
    assert await pair.b.promote(3) == position.lsn
    assert await pair.b.promote(3) == position.lsn


@simulated
async def test_an_old_primary_streams_again_only_after_a_rewind():
    pair = Pair()
    await pair.replicate()
    await pair.b.fence()
    pair.insert("a")
    await asyncio.sleep(1)
    await pair.a.kill()
    await pair.b.promote(3)
    await pair.ready(pair.a)
    await pair.a.follow("b:5432")
    await asyncio.sleep(5)
    assert not (await pair.a.status()).streaming
    while not await pair.a.rewind("b:5432"):
        pass
    await pair.ready(pair.a)
    await pair.a.follow("b:5432")
    await asyncio.sleep(5)
    assert (await pair.a.status()).streaming
    assert (await pair.a.status()).timeline == 3


@simulated
async def test_a_fast_stop_gives_everything_to_the_replica():
    pair = Pair()
    await pair.replicate()
    for _ in range(30):
        pair.insert("a")
    assert await pair.a.stop(10.0)
    assert pair.hosts["b"].disk.wal == pair.hosts["a"].disk.wal
