"""How long writes stop when a Postgres primary is lost in several ways, and whether any are lost.

    python bench/failover.py [--trials N] [--faults NAME,NAME] [--patroni BIN]

Three members on loopback, an etcd of three, no edge: this is the controller alone. For each fault N trials
(default 3) on one cluster:

    host        SIGKILL of everything on the primary's host, so its peers get resets
    silent      its network is gone: packets from and to it vanish (bench/cables.py), until another leads
    frozen      SIGSTOP of all of it, and SIGCONT once another leads
    postgres    SIGKILL of Postgres alone; its agent lives
    host+etcd   as `host`, together with etcd's leader
    switchover  no fault: the primary is asked to hand over

One client inserts numbered rows where they are taken, another stays with the old primary whatever happens
(bench/clients.py). The window is the longest pause between two acknowledgements to the first. At the end
everything acknowledged is looked for.

Late is what an old primary acknowledged after its successor's first. Told apart is the one row for which the
client had asked before the fault: its answer may have been on its way, and arrives when the network is
mended or the host thaws. It is looked for like the others.

--patroni: the same with Patroni at its quickest settings, from an environment of its own
(scripts/patroni-env.sh makes one), with the same Postgres, etcd and client; ratios are printed. Exit code 1
if a row is missing with ours, or an old primary of ours acknowledged one after its successor's first.
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
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import cables, support
from bench.cables import Cables
from bench.clients import Ledger, connect_writable, stay, write
from bench.patroni import run_patroni
from bench.rig import Rig
from pgha.processes import kill_all
from pgha.requests import request_switchover
from tests.support.etcd import Member
from tests.support.pgha import PASSWORD, PgCluster, run_pgha

FAULTS = ("host", "silent", "frozen", "postgres", "host+etcd", "switchover")
TRIALS = 3
WARM_ACKS = 50
AFTER_ACKS = 50
WARM_S = 0.5
SPREAD_S = 1.0  # over the trials: a fault at each point between two renewals of a lease
FAILOVER_S = 90.0
WHOLE_S = 120.0


class PghaRig:
    """bench.rig.Rig over our own agents."""

    name = "pgha"
    password = PASSWORD

    def __init__(self, cluster: PgCluster) -> None:
        self._cluster = cluster
        self.lost_etcd: Member | None = None
        self.etcd = cluster.etcd
        self.addresses = {node.name: node.address for node in cluster.nodes}
        self.cables = Cables(self.addresses, cables.groups(self.addresses))

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


@dataclass(frozen=True)
class Found:
    """What one rig's trials showed."""

    windows: dict[str, list[float]]  # by fault, seconds
    lost: int  # acknowledged rows that are not there
    late: int  # acknowledged by an old primary after its successor's first
    under_way: int  # likewise, but asked for before the fault


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
    elif fault == "silent":
        rig.cables.cut(node)
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
    elif fault == "silent":
        rig.cables.mend()
    elif fault.startswith("host"):
        if rig.lost_etcd is not None:
            await rig.lost_etcd.start()
            rig.lost_etcd = None
        await rig.start(node)


async def one_trial(rig: Rig, fault: str, ledger: Ledger, warm_s: float) -> tuple[float, int, int]:
    """The window, and what of its old primary arrived after its successor's first: late, and under way."""
    old = await rig.wait_whole()
    began = len(ledger.acks)
    async with running(
        asyncio.create_task(write(rig, ledger)),
        asyncio.create_task(stay(rig, ledger, old)),
    ):
        await wait_acks(ledger, began + WARM_ACKS)
        await asyncio.sleep(warm_s)
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
    if ledger.acks[-1][2] == old:
        return window_s, 0, 0
    after = [asked_s for _, asked_s, at_s, node in ledger.stayed if node == old and at_s > resumed_s]
    under_way = sum(1 for asked_s in after if asked_s <= hurt_s)
    return window_s, len(after) - under_way, under_way


def over(acks: list[tuple[int, float, str]], since_s: float, without: str) -> bool:
    """Whether these are all newer, and none is of the node that hands over."""
    return len(acks) == AFTER_ACKS and all(at_s > since_s and node != without for _, at_s, node in acks)


async def wait_acks(ledger: Ledger, count: int) -> None:
    """That many acknowledgements in all."""
    async with asyncio.timeout(FAILOVER_S):
        while len(ledger.acks) < count:
            await asyncio.sleep(0.01)


async def measure(rig: Rig, faults: tuple[str, ...], trials: int) -> Found:
    """All trials of each fault."""
    ledger = Ledger()
    await rig.wait_whole()
    async with (await connect_writable(rig))[1] as connection:
        await connection.execute("CREATE TABLE rows (n bigint PRIMARY KEY)")
    windows: dict[str, list[float]] = {fault: [] for fault in faults}
    late = under_way = 0
    with cables.laid(rig.cables) if "silent" in faults else contextlib.nullcontext():
        for fault in faults:
            for number in range(trials):
                warm_s = WARM_S + SPREAD_S * number / trials
                window_s, late_here, under_way_here = await one_trial(rig, fault, ledger, warm_s)
                windows[fault].append(window_s)
                late, under_way = late + late_here, under_way + under_way_here
                print(f"{rig.name:8} {fault:10} window {window_s:6.2f} s", flush=True)
    await rig.wait_whole()
    async with (await connect_writable(rig))[1] as connection:
        rows = await (await connection.execute("SELECT n FROM rows")).fetchall()
    acknowledged = {ack[0] for ack in ledger.acks} | {ack[0] for ack in ledger.stayed}
    return Found(windows, len(acknowledged - {row[0] for row in rows}), late, under_way)


async def run(faults: tuple[str, ...], trials: int, patroni: str) -> int:
    """Measure ours, then theirs."""
    load, began_s = os.getloadavg()[0], time.monotonic()
    found: dict[str, Found] = {}
    first_group = cables.FIRST_GROUP if "silent" in faults else None
    async with run_pgha(etcd_members=3, first_group=first_group) as cluster:
        found["pgha"] = await measure(PghaRig(cluster), faults, trials)
    if patroni:
        async with run_patroni(Path(patroni), first_group) as rig:
            found["patroni"] = await measure(rig, faults, trials)
    figures = tell(found)
    took_s = time.monotonic() - began_s
    print(f"took {took_s:.0f} s; load of the machine: {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    support.report("failover", figures, trials=trials, load=round(load, 1), took_s=round(took_s))
    return 1 if found["pgha"].lost or found["pgha"].late else 0


def tell(found: dict[str, Found]) -> dict[str, object]:
    """Print what was found; the figures of it."""
    figures: dict[str, object] = {}
    for name, this in found.items():
        print(f"\n{name}: {this.lost} acknowledged rows lost")
        print(f"  {this.late} acknowledged by an old primary after its successor's first")
        print(f"  {this.under_way} answers that were under way at the fault and arrived after it")
        figures |= {f"{name}_lost": this.lost, f"{name}_late": this.late, f"{name}_under_way": this.under_way}
        for fault, seconds in this.windows.items():
            middle, most = statistics.median(seconds), max(seconds)
            ours = found["pgha"].windows[fault]
            ratio = f"  {middle / statistics.median(ours):5.1f} x pgha's" * (name != "pgha")
            print(f"  {fault:10} p50 {middle:6.2f} s  max {most:6.2f} s  of {len(seconds)}{ratio}")
            figures |= {f"{name}_{fault}_p50_s": round(middle, 2), f"{name}_{fault}_max_s": round(most, 2)}
    return figures


def chosen(text: str) -> tuple[str, ...]:
    """Faults by name, in the order of the list above."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in FAULTS:
            raise argparse.ArgumentTypeError(f"no fault {name}; there are {', '.join(FAULTS)}")
    return tuple(fault for fault in FAULTS if fault in names)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=TRIALS, help=f"of each fault; default {TRIALS}")
    parser.add_argument("--faults", type=chosen, default=FAULTS, metavar="NAME,NAME", help="only these")
    parser.add_argument("--patroni", default="", metavar="BIN", help="the patroni program, to compare with")
    arguments = parser.parse_args()
    if "silent" in arguments.faults and (reason := cables.why_not()):
        others = ",".join(fault for fault in FAULTS if fault != "silent")
        sys.exit(f"the fault `silent` cannot be made here: {reason}. Without it: --faults {others}")
    return asyncio.run(run(arguments.faults, arguments.trials, arguments.patroni))


if __name__ == "__main__":
    sys.exit(main())
