"""How long writes stop when a Postgres primary is lost in several ways, and whether any are lost.

    python bench/failover.py [--trials N] [--patroni BIN]

Three members on loopback, an etcd of three, no edge: this is the controller alone. For each fault N trials
(default 3) on one cluster:

    host        SIGKILL of everything on the primary's host, so its peers get resets
    frozen      SIGSTOP of the same, and SIGCONT once another has taken over
    postgres    SIGKILL of Postgres alone; its agent lives
    host+etcd   as `host`, together with etcd's leader
    switchover  no fault: the primary is asked to hand over

One client inserts numbered rows; it asks all members at once for one that takes writes, and leaves one
that has not answered for half a second. Another stays with the old primary whatever happens. The window is
the longest pause between two acknowledgements to the first. At the end everything acknowledged is looked for.

--patroni: the same with Patroni at its quickest settings, from an environment of its own (bench/patroni.py
says how to make one), with the same Postgres, etcd and client; ratios are printed. Exit code 1 if a row is
missing with ours, or an old primary of ours acknowledged one after its successor's first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import signal
import statistics
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import support
from bench.patroni import run_patroni
from bench.rig import Rig
from pgha.processes import kill_all
from pgha.requests import request_switchover
from tests.support.etcd import Member
from tests.support.pgha import PASSWORD, PgCluster, run_pgha

FAULTS = ("host", "frozen", "postgres", "host+etcd", "switchover")
TRIALS = 3
WARM_ACKS = 50
AFTER_ACKS = 50
WARM_S = 1.0
INSERT_S = 0.5  # the client leaves a member that takes longer
CONNECT_S = 1.0
RETRY_S = 0.005
FAILOVER_S = 90.0
WHOLE_S = 120.0

Connection = psycopg.AsyncConnection[tuple[object, ...]]


class PghaRig:
    """bench.rig.Rig over our own agents."""

    name = "pgha"
    password = PASSWORD

    def __init__(self, cluster: PgCluster) -> None:
        self._cluster = cluster
        self.lost_etcd: Member | None = None
        self.etcd = cluster.etcd
        self.addresses = {node.name: node.address for node in cluster.nodes}

    async def wait_whole(self) -> str:
        """The primary, once everybody streams from it."""
        return (await self._cluster.wait_whole(WHOLE_S)).node

    async def kill(self, node: str) -> None:
        """SIGKILL of all of it."""
        await self._cluster.node(node).kill()

    def signal(self, node: str, number: signal.Signals) -> None:
        """To all of it."""
        self._cluster.node(node).signal(number)

    async def kill_postgres(self, node: str) -> None:
        """SIGKILL of Postgres alone."""
        await kill_all(self._cluster.node(node).directory / "pgdata")

    async def switch_over(self, node: str) -> None:
        """Hand over as planned."""
        await request_switchover(self._cluster.kv, self._cluster.name, "", time.time())

    async def start(self, node: str) -> None:
        """Start it again."""
        await self._cluster.node(node).start()


class Ledger:
    """What was acknowledged, when, and by whom."""

    def __init__(self) -> None:
        self.numbers = 0
        self.acks: list[tuple[int, float, str]] = []  # to the client that goes where writes are taken
        self.stayed: list[tuple[int, float, str]] = []  # to those that stay with an old primary

    def next(self) -> int:
        """A number whose fate is unknown is not used again."""
        self.numbers += 1
        return self.numbers


async def connect(rig: Rig, node: str) -> Connection:
    """A session on one member."""
    host, _, port = rig.addresses[node].rpartition(":")
    return await psycopg.AsyncConnection.connect(
        f"host={host} port={port} user=postgres dbname=postgres", password=rig.password, autocommit=True
    )


async def connect_writable(rig: Rig) -> tuple[str, Connection]:
    """A session on the first member that is out of recovery; asks all at once."""

    async def attempt(node: str) -> tuple[str, Connection] | None:
        try:
            async with asyncio.timeout(CONNECT_S):
                connection = await connect(rig, node)
                row = await (await connection.execute("SELECT pg_is_in_recovery()")).fetchone()
        except (psycopg.Error, OSError, TimeoutError):
            return None
        if row == (False,):
            return node, connection
        await connection.close()
        return None

    tasks = [asyncio.ensure_future(attempt(node)) for node in sorted(rig.addresses)]
    try:
        for done in asyncio.as_completed(tasks):
            if (found := await done) is not None:
                return found
    finally:
        for task in tasks:
            task.cancel()
    raise TimeoutError("nobody takes writes")


async def write(rig: Rig, ledger: Ledger) -> None:
    """The client: rows without pause, for ever."""
    left: list[asyncio.Task[None]] = []  # inserts that nobody waits for: to cancel one would block
    while True:
        with contextlib.suppress(psycopg.Error, OSError, TimeoutError):
            node, connection = await connect_writable(rig)
            while True:
                insert = asyncio.create_task(insert_one(connection, ledger, node))
                if not (await asyncio.wait({insert}, timeout=INSERT_S))[0]:
                    left.append(insert)
                    insert.add_done_callback(forget)
                    break
                insert.result()
        await asyncio.sleep(RETRY_S)


def forget(insert: asyncio.Task[None]) -> None:
    """Nobody waits for it any more: its end is no news."""
    if not insert.cancelled():
        insert.exception()


async def insert_one(connection: Connection, ledger: Ledger, node: str) -> None:
    """One row, noted when it is acknowledged."""
    number = ledger.next()
    await connection.execute("INSERT INTO rows VALUES (%s)", (number,))
    ledger.acks.append((number, time.monotonic(), node))


async def stay(rig: Rig, ledger: Ledger, node: str) -> None:
    """The client that never leaves `node`."""
    with contextlib.suppress(psycopg.Error, OSError):
        connection = await connect(rig, node)
        async with connection:
            while True:
                number = ledger.next()
                await connection.execute("INSERT INTO rows VALUES (%s)", (number,))
                ledger.stayed.append((number, time.monotonic(), node))


@asynccontextmanager
async def running(*works: asyncio.Task[None]) -> AsyncGenerator[None]:
    """Tasks that end with the block."""
    try:
        yield
    finally:
        for work in works:
            work.cancel()
        await asyncio.wait(works)


async def hurt(rig: Rig, fault: str, node: str) -> None:
    """Break the primary."""
    if fault == "frozen":
        rig.signal(node, signal.SIGSTOP)
    elif fault == "postgres":
        await rig.kill_postgres(node)
    elif fault == "host":
        await rig.kill(node)
    elif fault == "switchover":
        await rig.switch_over(node)
    else:
        leader = await rig.etcd.leader()
        await asyncio.gather(leader.kill(), rig.kill(node))
        rig.lost_etcd = leader


async def repair(rig: Rig, fault: str, node: str) -> None:
    """Bring back what `hurt` took."""
    if fault == "frozen":
        rig.signal(node, signal.SIGCONT)
    elif fault.startswith("host"):
        if rig.lost_etcd is not None:
            await rig.lost_etcd.start()
            rig.lost_etcd = None
        await rig.start(node)


async def one_trial(rig: Rig, fault: str, ledger: Ledger) -> tuple[float, int]:
    """The window, and how many rows the old primary acknowledged after its successor's first."""
    old = await rig.wait_whole()
    began = len(ledger.acks)
    async with running(
        asyncio.create_task(write(rig, ledger)),
        asyncio.create_task(stay(rig, ledger, old)),
    ):
        await wait_acks(ledger, began + WARM_ACKS)
        await asyncio.sleep(WARM_S)
        asked_s = time.monotonic()
        await hurt(rig, fault, old)
        planned = fault == "switchover"  # the old primary goes on until it hands over
        hurt_s = asked_s if planned else time.monotonic()
        async with asyncio.timeout(FAILOVER_S):
            while not over(ledger.acks[-AFTER_ACKS:], hurt_s, old if planned else ""):
                await asyncio.sleep(0.01)
        await repair(rig, fault, old)
        await rig.wait_whole()
    times = [at_s for _, at_s, _ in ledger.acks[began:]]
    window_s, resumed_s = max((b - a, b) for a, b in itertools.pairwise(times) if b > hurt_s)
    late = sum(1 for _, at_s, node in ledger.stayed if node == old and at_s > resumed_s)
    changed = ledger.acks[-1][2] != old
    return window_s, late if changed else 0


def over(acks: list[tuple[int, float, str]], since_s: float, without: str) -> bool:
    """Whether these are all newer, and none is of the node that hands over."""
    return len(acks) == AFTER_ACKS and all(at_s > since_s and node != without for _, at_s, node in acks)


async def wait_acks(ledger: Ledger, count: int) -> None:
    """That many acknowledgements in all."""
    async with asyncio.timeout(FAILOVER_S):
        while len(ledger.acks) < count:
            await asyncio.sleep(0.01)


async def measure(rig: Rig, trials: int) -> tuple[dict[str, list[float]], int, int]:
    """Windows by fault, rows lost, late acknowledgements of old primaries."""
    ledger = Ledger()
    await rig.wait_whole()
    async with (await connect_writable(rig))[1] as connection:
        await connection.execute("CREATE TABLE rows (n bigint PRIMARY KEY)")
    windows: dict[str, list[float]] = {fault: [] for fault in FAULTS}
    late = 0
    for fault in FAULTS:
        for _ in range(trials):
            window_s, late_here = await one_trial(rig, fault, ledger)
            windows[fault].append(window_s)
            late += late_here
            print(f"{rig.name:8} {fault:10} window {window_s:6.2f} s", flush=True)
    await rig.wait_whole()
    async with (await connect_writable(rig))[1] as connection:
        rows = await (await connection.execute("SELECT n FROM rows")).fetchall()
    acknowledged = {number for number, _, _ in ledger.acks + ledger.stayed}
    return windows, len(acknowledged - {row[0] for row in rows}), late


async def run(trials: int, patroni: str) -> int:
    """Measure ours, then theirs."""
    load = os.getloadavg()[0]
    found: dict[str, tuple[dict[str, list[float]], int, int]] = {}
    async with run_pgha(etcd_members=3) as cluster:
        found["pgha"] = await measure(PghaRig(cluster), trials)
    if patroni:
        async with run_patroni(Path(patroni)) as rig:
            found["patroni"] = await measure(rig, trials)
    figures: dict[str, object] = {}
    bad = 0
    for name, (windows, lost, late) in found.items():
        bad += (lost + late) if name == "pgha" else 0
        print(f"\n{name}: {lost} acknowledged rows lost, {late} acknowledged by an old primary too late")
        figures |= {f"{name}_lost": lost, f"{name}_late": late}
        for fault, seconds in windows.items():
            middle, most = statistics.median(seconds), max(seconds)
            ratio = f"  {middle / statistics.median(found['pgha'][0][fault]):.1f} x pgha's" * (name != "pgha")
            print(f"  {fault:10} p50 {middle:6.2f} s  max {most:6.2f} s  of {len(seconds)}{ratio}")
            figures |= {f"{name}_{fault}_p50_s": round(middle, 2), f"{name}_{fault}_max_s": round(most, 2)}
    print(f"load of the machine: {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    support.report("failover", figures, trials=trials, load=round(load, 1))
    return 1 if bad else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=TRIALS, help=f"of each fault; default {TRIALS}")
    parser.add_argument("--patroni", default="", metavar="BIN", help="the patroni program, to compare with")
    arguments = parser.parse_args()
    return asyncio.run(run(arguments.trials, arguments.patroni))


if __name__ == "__main__":
    sys.exit(main())
