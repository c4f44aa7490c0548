"""The recorder over the fake etcd, in virtual time: hosts come and go, history stays bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from flyd.errors import OutcomeUnknown
from flyd.incidents.recorder import (
    CLUSTER,
    EVENTS_KEPT_S,
    EVENTS_MAX,
    HostNews,
    Recorder,
    host_news,
    outdated,
)
from flyd.model import Event, Host, Resources, decode, encode
from flyd.ports import Delete, Put, Unchanged
from flyd.store import keys
from flyd.store.leader import CONTROLLER, Leadership, lead
from flyd.store.memory import MemoryEtcd, MemoryKV
from flyd.store.mirror import Mirror
from tests.simulation.loop import run

NOW_S = 1_000_000.0


class LoopClock:
    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()

    def wall_s(self) -> float:
        return NOW_S + asyncio.get_running_loop().time()


class ForgetfulKV(MemoryKV):
    """Loses the answer to its next transaction that writes an event."""

    lose_next_txn = False

    async def _after(self, op: str) -> None:
        if op == "txn" and self.lose_next_txn:
            self.lose_next_txn = False
            raise OutcomeUnknown("answer lost")


def host(name: str) -> Host:
    return Host(
        name=name,
        region=name[:3],
        api_address="",
        address="",
        subnet="",
        capacity=Resources(),
        driver="process",
        version="0",
    )


def described(name: str) -> list[Put | Delete]:
    return [Put(keys.host(name), encode(host(name)))]


def joined(name: str) -> list[Put | Delete]:
    return [*described(name), Put(keys.alive(name), b"true")]


def gone(name: str) -> list[Put | Delete]:
    return [Delete(keys.alive(name))]


def history(etcd: MemoryEtcd) -> list[tuple[str, str]]:
    events = [decode(item.value, Event) for item in etcd.list(f"{keys.EVENTS}{CLUSTER}/").items]
    return [(event.source, event.kind) for event in events]


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not what():
            await asyncio.sleep(0.05)


async def recording(etcd: MemoryEtcd, name: str, kv: MemoryKV) -> None:
    """What flyd's composition root does with a recorder."""
    mirror = Mirror(kv, (keys.HOSTS, keys.ALIVE))
    kept = Recorder(kv, mirror, clock=LoopClock())

    async def work(held: Leadership) -> None:
        await kept.keep_recording(held.guard)

    async with asyncio.TaskGroup() as group:
        group.create_task(mirror.keep())
        await mirror.wait_synced()
        group.create_task(lead(kv, CONTROLLER, name, work))


def test_loss_and_return_are_told_once_each() -> None:
    async def scenario() -> None:
        etcd = MemoryEtcd()
        kv = MemoryKV(etcd)
        await kv.txn([], [*joined("ams-1"), *joined("iad-1")])
        task = asyncio.get_running_loop().create_task(recording(etcd, "iad-1", kv))
        await kv.txn([], gone("ams-1"))
        await until(lambda: len(history(etcd)) == 1)
        await kv.txn([], joined("ams-1"))
        await until(lambda: len(history(etcd)) == 2)
        await asyncio.sleep(30)
        assert history(etcd) == [("ams-1", "host.lost"), ("ams-1", "host.back")]
        task.cancel()

    run(1, scenario)


def test_the_next_recorder_goes_on_where_the_last_one_stopped() -> None:
    async def scenario() -> None:
        etcd = MemoryEtcd()
        kv = MemoryKV(etcd)
        await kv.txn([], [*described("ams-1"), *joined("iad-1")])
        first = asyncio.get_running_loop().create_task(recording(etcd, "iad-1", kv))
        await until(lambda: len(history(etcd)) == 1)
        first.cancel()
        await asyncio.sleep(10)
        await kv.txn([], [*joined("ams-1"), *gone("iad-1")])
        second = asyncio.get_running_loop().create_task(recording(etcd, "ams-1", MemoryKV(etcd)))
        await until(lambda: len(history(etcd)) == 3)
        assert sorted(history(etcd)) == sorted(
            [("ams-1", "host.lost"), ("iad-1", "host.lost"), ("ams-1", "host.back")]
        )
        second.cancel()

    run(1, scenario)


def test_a_lost_answer_is_read_back_not_told_twice() -> None:
    async def scenario() -> None:
        etcd = MemoryEtcd()
        kv = ForgetfulKV(etcd)
        await kv.txn([], [*joined("ams-1"), *joined("iad-1")])
        task = asyncio.get_running_loop().create_task(recording(etcd, "iad-1", kv))
        await until(lambda: etcd.get(keys.leader(CONTROLLER)) is not None)
        await asyncio.sleep(1)
        kv.lose_next_txn = True
        await MemoryKV(etcd).txn([], gone("ams-1"))
        await asyncio.sleep(30)
        assert not kv.lose_next_txn
        assert history(etcd) == [("ams-1", "host.lost")]
        task.cancel()

    run(1, scenario)


def test_a_deposed_recorder_writes_nothing() -> None:
    async def scenario() -> None:
        etcd = MemoryEtcd()
        kv = MemoryKV(etcd)
        await kv.txn([], described("ams-1"))
        mirror = Mirror(kv, (keys.HOSTS, keys.ALIVE))
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(mirror.keep())]
        await mirror.wait_synced()
        old_term = Unchanged(keys.leader(CONTROLLER), 99)
        deposed = Recorder(kv, mirror, clock=LoopClock())
        tasks.append(loop.create_task(deposed.keep_recording(old_term)))
        await asyncio.sleep(30)
        assert history(etcd) == []
        for task in tasks:
            task.cancel()

    run(1, scenario)


def test_old_history_is_pruned() -> None:
    async def scenario() -> None:
        etcd = MemoryEtcd()
        kv = MemoryKV(etcd)
        for age_s in (EVENTS_KEPT_S + 60, EVENTS_KEPT_S / 2, 0.0):
            await kv.put(keys.event("chat-db", NOW_S - age_s, "chat-db-1-serving"), b"{}")
        task = asyncio.get_running_loop().create_task(recording(etcd, "iad-1", kv))
        await until(lambda: len(etcd.list(keys.EVENTS).items) == 2)
        task.cancel()

    run(1, scenario)


def test_beyond_the_limit_the_oldest_of_each_app_go() -> None:
    many = [keys.event("busy", NOW_S + i, "x") for i in range(EVENTS_MAX + 3)]
    few = [keys.event("calm", NOW_S + i, "x") for i in range(3)]
    assert outdated([*many, *few], NOW_S) == tuple(many[:3])


@pytest.mark.parametrize(
    ("alive", "told", "expected"),
    [
        (["a", "b"], [], HostNews(lost=(), back=())),
        (["b"], [], HostNews(lost=("a",), back=())),
        (["b"], ["a"], HostNews(lost=(), back=())),
        (["a", "b"], ["a"], HostNews(lost=(), back=("a",))),
        ([], ["b"], HostNews(lost=("a",), back=())),
        (["a", "b", "unknown"], ["forgotten"], HostNews(lost=(), back=())),
    ],
)
def test_news(alive: list[str], told: list[str], expected: HostNews) -> None:
    assert host_news(["b", "a"], alive, told) == expected
