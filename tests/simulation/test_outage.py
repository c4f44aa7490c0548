"""etcd goes away for everybody: the primary stays, rows go on, and nothing is lost when it comes back."""

from __future__ import annotations

import asyncio

import pytest

from pgha.model import TTL_S
from tests.simulation import planted
from tests.simulation.loop import current
from tests.simulation.network import ETCD
from tests.simulation.postgres_world import HEAL_S, NODES, PostgresWorld
from tests.simulation.runner import simulate

OUTAGE_S = 30.0


class Outage(PostgresWorld):
    """No fault but this one: nobody reaches etcd; then it is there again, for each at another time."""

    async def run(self) -> str:
        loop = current()
        for name in NODES:
            self.start_agent(name)
        loop.spawn("client/endpoint", self.write_through_endpoint())
        await self.wait("the cluster forms", lambda: self.primary() is not None, HEAL_S)
        await self.wait("all stream", self.all_stream, HEAL_S)
        await asyncio.sleep(self.chance.uniform(2 * TTL_S, 3 * TTL_S))
        before = self.leader
        assert before is not None
        for name in NODES:
            self.network.cut(name, ETCD)
        longest_s = await self._longest_pause_s(OUTAGE_S)
        self.network.heal()
        late = self.chance.choice(NODES)  # comes back after the others, the primary as well as any
        self.network.cut(late, ETCD)
        longest_s = max(longest_s, await self._longest_pause_s(1.0))
        self.network.heal()
        longest_s = max(longest_s, await self._longest_pause_s(3 * TTL_S))
        if self.leader is None or self.leader.epoch != before.epoch:
            loop.fail(f"needless: {before.node} of epoch {before.epoch} was succeeded by {self.leader}")
        if longest_s > 1.0:
            loop.fail(f"gap: no row for {longest_s:.2f} s")
        self._power_cut(before.node)
        await self.heal()
        return f"{len(self.ledger.acknowledged)} rows"

    async def _longest_pause_s(self, for_s: float) -> float:
        """Between two acknowledged rows, while this goes on."""
        loop, rows = current(), len(self.ledger.acknowledged)
        end, since, longest_s = loop.time() + for_s, loop.time(), 0.0
        while loop.time() < end:
            await asyncio.sleep(0.01)
            if len(self.ledger.acknowledged) > rows:
                rows, since = len(self.ledger.acknowledged), loop.time()
            longest_s = max(longest_s, loop.time() - since)
        return longest_s


async def _outage() -> str:
    return await Outage().run()


@pytest.mark.parametrize("seed", range(1, 9))
def test_the_primary_stays_without_etcd(seed: int) -> None:
    finished = simulate(_outage, seed)
    assert not finished.failures, finished.failures


def test_a_voter_that_breaks_its_word_is_found() -> None:
    with planted.voter_that_breaks_its_word():
        for seed in range(1, 21):
            if any("stale primary:" in failure for failure in simulate(_outage, seed).failures):
                return
    pytest.fail("not found in 20 seeds")
