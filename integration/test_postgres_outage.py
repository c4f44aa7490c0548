"""etcd is away for a while: a real Postgres cluster goes on, and loses nothing afterwards."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest

from tests.support.pgha import Writer, connect, run_pgha

pytestmark = pytest.mark.timeout(180)
OUTAGE_S = 6.0  # four times what a holder has without the voters' word
AFTER_S = 5.0  # then no voter is bound by its word any more
BUSY_S = 3.0  # a pause that a busy machine explains; without the voters' word there are no writes at all


class OpenSession:
    """Writes over one connection, as a client does that is connected when etcd goes away."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.acks: list[tuple[int, float]] = []

    async def run(self) -> None:
        async with await connect(self._address) as session:
            number = 1_000_000
            while True:
                number += 1
                await session.execute("INSERT INTO acks VALUES (%s)", (number,))
                self.acks.append((number, time.monotonic()))
                await asyncio.sleep(0.005)

    def window_s(self) -> float:
        """The longest time without an acknowledgement, until now."""
        times = [at for _, at in self.acks] + [time.monotonic()]
        return max(b - a for a, b in itertools.pairwise(times))


async def test_writes_go_on_without_etcd_and_survive_the_primary() -> None:
    async with run_pgha() as cluster:
        before = await cluster.wait_whole()
        writer = Writer(cluster)
        await writer.prepare()
        session = OpenSession(before.address)
        etcd = cluster.etcd.members[0]
        task = asyncio.ensure_future(session.run())
        try:
            etcd.freeze()
            began_s = time.monotonic()
            while time.monotonic() - began_s < OUTAGE_S and not task.done():
                await asyncio.wait({task}, timeout=1.0)
            assert not task.done(), "the session was cut"
            etcd.thaw()
            # The primary is still the same once everybody has spoken to etcd again.
            after = await cluster.wait_whole()
            while time.monotonic() - began_s < OUTAGE_S + AFTER_S and not task.done():
                await asyncio.wait({task}, timeout=1.0)
            after = await cluster.wait_whole()
            window_s = session.window_s()
            assert not task.done(), "the session was cut when etcd came back"
            await cluster.node(before.node).kill()
            await cluster.wait_leader(lambda leader: leader.epoch > before.epoch)
        finally:
            task.cancel()
            await asyncio.wait({task})
        writer.acks = [(number, at, before.address) for number, at in session.acks]
        lost = await writer.lost()
    print(
        f"\netcd frozen {OUTAGE_S:.0f} s: longest pause {window_s:.2f} s, {len(session.acks)} acks, {lost=}"
    )
    assert (after.node, after.epoch) == (before.node, before.epoch)
    assert lost == set()
    assert window_s < BUSY_S
