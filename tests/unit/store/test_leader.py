"""Leadership over the fake etcd, in virtual time."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyd.errors import OutcomeUnknown, Unavailable
from flyd.ports import Put
from flyd.store import keys
from flyd.store.leader import LEADER_TTL_S, RETRY_S, Leadership, lead
from flyd.store.memory import MemoryEtcd, MemoryKV
from tests.simulation.loop import current, run


class FaultyKV(MemoryKV):
    """A client that can be cut off, and that can lose the answer to its next transaction."""

    cut = False
    lose_next_txn = False

    async def _before(self, op: str) -> None:
        await super()._before(op)
        if self.cut:
            raise Unavailable("cut off")

    async def _after(self, op: str) -> None:
        if op == "txn" and self.lose_next_txn:
            self.lose_next_txn = False
            raise OutcomeUnknown("answer lost")


def test_one_that_stood_still_while_it_campaigned_goes_on() -> None:
    """Its lease has ended before it was used: that ends no flyd."""

    class Frozen(MemoryKV):
        still = True

        async def _before(self, op: str) -> None:
            await super()._before(op)
            if op == "txn" and self.still:
                self.still = False
                await asyncio.sleep(LEADER_TTL_S + 1)

    async def main() -> None:
        stage = Stage()
        current().spawn("a", lead(Frozen(MemoryEtcd()), "deployer", "a", stage.work))
        await asyncio.sleep(3 * LEADER_TTL_S)
        assert stage.inside == ["a"]

    run(1, main)


class Stage:
    """Who is inside the scope, now and ever."""

    def __init__(self) -> None:
        self.inside: list[str] = []
        self.terms: list[Leadership] = []
        self.left_s: list[float] = []

    async def work(self, leadership: Leadership) -> None:
        self.inside.append(leadership.name)
        self.terms.append(leadership)
        assert len(self.inside) == 1, f"inside together: {self.inside}"
        try:
            await asyncio.Event().wait()
        finally:
            self.inside.remove(leadership.name)
            self.left_s.append(current().time())


steps = st.tuples(
    st.sampled_from(["cut", "heal", "lose"]),
    st.sampled_from(["a", "b", "c"]),
    st.floats(0.05, 6.0),
)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**16), st.lists(steps, max_size=25))
def test_never_two_inside_and_in_the_end_one(seed: int, history: list[tuple[str, str, float]]) -> None:
    async def main() -> None:
        server = MemoryEtcd()
        stage = Stage()
        clients = {name: FaultyKV(server) for name in "abc"}
        for name, kv in clients.items():
            current().spawn(name, lead(kv, "deployer", name, stage.work))
        for step, name, pause_s in history:
            kv = clients[name]
            if step == "lose":
                kv.lose_next_txn = True
            else:
                kv.cut = step == "cut"
            await asyncio.sleep(pause_s)
        for kv in clients.values():
            kv.cut = False
        await asyncio.sleep(3 * LEADER_TTL_S)
        held = server.get(keys.leader("deployer"))
        assert held is not None
        assert stage.inside == [held.value.decode()]
        assert stage.terms[-1].mod_revision == held.mod_revision
        revisions = [term.mod_revision for term in stage.terms]
        assert revisions == sorted(set(revisions)), "no two terms share a revision"

    run(seed, main)


def test_cut_off_leader_leaves_before_its_lease_ends() -> None:
    async def main() -> None:
        server = MemoryEtcd()
        stage = Stage()
        kv = FaultyKV(server)
        current().spawn("a", lead(kv, "deployer", "a", stage.work))
        await asyncio.sleep(20)
        assert stage.inside == ["a"]
        kv.cut = True
        while server.get(keys.leader("deployer")) is not None:
            await asyncio.sleep(0.01)
        assert stage.inside == []
        assert 0 < current().time() - stage.left_s[-1] < 1.0

    run(1, main)


def test_revoked_lease_ends_the_scope_at_the_next_renewal() -> None:
    async def main() -> None:
        server = MemoryEtcd()
        stage = Stage()
        current().spawn("a", lead(MemoryKV(server), "deployer", "a", stage.work))
        await asyncio.sleep(1)
        held = server.get(keys.leader("deployer"))
        assert held is not None
        server.lease_revoke(held.lease)
        await asyncio.sleep(LEADER_TTL_S / 2)
        assert len(stage.left_s) == 1
        assert stage.inside == ["a"], "and it campaigns again"

    run(1, main)


def test_frozen_leader_is_refused_by_its_guard() -> None:
    async def main() -> None:
        server = MemoryEtcd()
        results: list[tuple[str, bool]] = []

        async def work(leadership: Leadership) -> None:
            kv = MemoryKV(server)
            while True:
                put = Put("/effect", leadership.name.encode())
                results.append((leadership.name, (await kv.txn([leadership.guard], [put])).succeeded))
                await asyncio.sleep(0.1)

        current().spawn("a", lead(MemoryKV(server), "deployer", "a", work))
        await asyncio.sleep(1)
        current().spawn("b", lead(MemoryKV(server), "deployer", "b", work))
        current().pause("a")
        await asyncio.sleep(2 * LEADER_TTL_S)
        current().resume("a")
        await asyncio.sleep(2 * LEADER_TTL_S)
        first_b = results.index(("b", True))
        assert ("a", True) in results[:first_b]
        assert ("a", True) not in results[first_b:]
        assert ("b", False) not in results

    for seed in range(20):
        run(seed, main)


def test_crash_hands_over_within_a_ttl_and_leaving_at_once() -> None:
    async def main() -> tuple[float, float]:
        server = MemoryEtcd()
        stage = Stage()
        current().spawn("a", lead(MemoryKV(server), "deployer", "a", stage.work))
        await asyncio.sleep(10)
        async with asyncio.TaskGroup() as tasks:
            b = tasks.create_task(lead(MemoryKV(server), "deployer", "b", stage.work))
            await asyncio.sleep(1)
            current().crash("a")
            stage.inside.clear()
            crashed_s = current().time()
            while stage.inside != ["b"]:
                await asyncio.sleep(0.01)
            after_crash_s = current().time() - crashed_s
            current().spawn("c", lead(MemoryKV(server), "deployer", "c", stage.work))
            await asyncio.sleep(1)
            b.cancel()
            left_s = current().time()
            while stage.inside != ["c"]:
                await asyncio.sleep(0.01)
            return after_crash_s, current().time() - left_s

    after_crash_s, after_leaving_s = run(1, main)
    assert after_crash_s <= LEADER_TTL_S + 0.1
    assert after_leaving_s <= 0.1


def test_lost_answer_to_the_winning_transaction_is_read_back() -> None:
    async def main() -> None:
        server = MemoryEtcd()
        stage = Stage()
        kv = FaultyKV(server)
        kv.lose_next_txn = True
        current().spawn("a", lead(kv, "deployer", "a", stage.work))
        await asyncio.sleep(1)
        assert stage.inside == ["a"]
        assert len(stage.terms) == 1

    run(1, main)


def test_work_that_ends_resigns_and_work_that_raises_ends_lead() -> None:
    async def main() -> None:
        terms: list[Leadership] = []

        async def work(leadership: Leadership) -> None:
            terms.append(leadership)
            if len(terms) == 3:
                raise LookupError("a bug")

        started_s = current().time()
        server = MemoryEtcd()
        with pytest.raises(ExceptionGroup) as raised:
            await lead(MemoryKV(server), "deployer", "a", work)
        assert raised.group_contains(LookupError)
        assert current().time() - started_s >= 2 * RETRY_S
        assert server.get(keys.leader("deployer")) is None

    run(1, main)
