"""A primary that is only slow stays primary: its host's CPU is taken by others, and nobody succeeds it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Generator

import pytest

from tests.support.pgha import run_pgha, writing

LAST_IN_LINE = 10  # niceness: a twentieth of a core where everybody else spins
BUSY_S = 20.0

pytestmark = [pytest.mark.timeout(180), pytest.mark.soak]


@contextlib.contextmanager
def spinning(count: int) -> Generator[None]:
    """So many processes that do nothing but use the CPU."""
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


async def test_a_primary_that_hardly_gets_the_cpu_is_not_succeeded() -> None:
    async with run_pgha(etcd_members=3) as cluster:
        before = await cluster.wait_whole()
        async with writing(cluster) as writer:
            for pid in cluster.node(before.node).pids():
                for thread in os.listdir(f"/proc/{pid}/task"):
                    os.setpriority(os.PRIO_PROCESS, int(thread), LAST_IN_LINE)
            with spinning(2 * (os.cpu_count() or 1)):
                await asyncio.sleep(BUSY_S)
            acknowledged = len(writer.acks)
        after = await cluster.wait_whole()
        print(f"\nbusy: {acknowledged} acknowledged in {BUSY_S:g} s, window {writer.window_s():.2f} s")
        assert acknowledged
        assert (after.node, after.epoch) == (before.node, before.epoch)
        assert await writer.lost() == set()
