"""How long writes stop when the primary's region is killed, and whether any are lost.

    python bench/failover_edge.py

Five times on one cluster of three regions: a writer inserts numbered rows without pause
through the edge of a region that survives; everything of the primary's region gets SIGKILL
(flyd, Envoy, its etcd member, all machines). The window is from the last acknowledgement before
the gap to the first after it, by the writer's monotonic clock. Then the region is brought back
and the next round begins once its Postgres streams again. At the end all acknowledged rows
are looked for on the primary. Exit code 1 if one is missing.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import support
from flyd.cluster.local import LocalCluster

BASE = 128
KILLS = 5
WARM_S = 3.0  # of writes before each kill
AFTER_S = 1.0  # of writes after the gap
GAP_S = 0.3  # a pause in acknowledgements this long is the take-over
RETRY_S = 0.01
FAILOVER_TIMEOUT_S = 30.0
REJOIN_TIMEOUT_S = 90.0
CONNECT_TIMEOUT_S = 2


class Writer:
    """Inserts rows without pause in a thread; remembers what was acknowledged, and when."""

    def __init__(self, uri: str, first: int) -> None:
        self.next = first
        self.acknowledged: list[tuple[int, float]] = []
        self._uri = uri
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.is_set():
            try:
                with psycopg.connect(
                    self._uri, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S
                ) as connection:
                    self._write(connection)
            except psycopg.Error:
                time.sleep(RETRY_S)

    def _write(self, connection: psycopg.Connection) -> None:
        while not self._done.is_set():
            number, self.next = self.next, self.next + 1  # a number whose fate is unknown is not used again
            connection.execute("INSERT INTO bench_rows VALUES (%s)", [number])
            self.acknowledged.append((number, time.monotonic()))

    def window_s(self, killed_s: float) -> float | None:
        """The longest pause around or after the kill; None while there is none, or not long enough ago."""
        times = [at_s for _, at_s in list(self.acknowledged)]
        pauses = [(b - a, b) for a, b in itertools.pairwise(times) if b > killed_s]
        if not pauses:
            return None
        pause_s, resumed_s = max(pauses)
        return pause_s if pause_s > GAP_S and times[-1] - resumed_s > AFTER_S else None


def one_kill(cluster: LocalCluster, first: int) -> tuple[float, list[int], int]:
    """Kill the primary's region, bring it back: the window, what was acknowledged, the next number."""
    members = {m["node"]: m["region"] for m in support.postgres_status()["members"]}
    victim = cluster.plan.host(members[support.postgres_status()["primary"]])
    witness = next(host.region for host in reversed(cluster.plan.hosts) if host != victim)
    with Writer(support.connection_uri(cluster, witness), first) as writer:
        time.sleep(WARM_S)
        killed_s = time.monotonic()
        cluster.kill_host(victim)
        support.wait_for(
            f"writes after the loss of {victim.region}",
            lambda: writer.window_s(killed_s) is not None,
            FAILOVER_TIMEOUT_S,
        )
        window_s = writer.window_s(killed_s) or 0.0
    cluster.start_host(victim)
    rejoined_s = support.wait_for(f"{victim.region} streams again", all_stream, REJOIN_TIMEOUT_S)
    print(
        f"{victim.region} killed: window {window_s * 1000:.0f} ms, {len(writer.acknowledged)} writes "
        f"acknowledged through {witness}; streams again {rejoined_s:.1f} s after its flyd serves",
        flush=True,
    )
    return window_s, [number for number, _ in writer.acknowledged], writer.next


def all_stream() -> bool:
    """A primary serves, and every other member streams from it in its epoch."""
    status = support.postgres_status()
    replicas = [m for m in status["members"] if m["node"] != status["primary"]]
    return bool(status["serving"]) and all(
        m["streaming"] and m["role"] == "replica" and m["epoch"] == status["epoch"] for m in replicas
    )


def main() -> int:
    windows_ms: list[float] = []
    acknowledged: list[int] = []
    with support.local_cluster(BASE) as cluster:
        regions = ",".join(support.REGIONS)
        support.fly("postgres", "create", "chat-db", "--regions", regions)
        support.wait_for("all members stream", all_stream, REJOIN_TIMEOUT_S)
        uri = support.connection_uri(cluster, support.REGIONS[0])
        with psycopg.connect(uri, autocommit=True) as connection:
            connection.execute("CREATE TABLE bench_rows (number bigint PRIMARY KEY)")
        following = 1
        for _ in range(KILLS):
            window_s, numbers, following = one_kill(cluster, following)
            windows_ms.append(window_s * 1000)
            acknowledged += numbers
        with psycopg.connect(uri, autocommit=True) as connection:
            surviving = {row[0] for row in connection.execute("SELECT number FROM bench_rows")}
    lost = len(set(acknowledged) - surviving)
    least, middle, most = min(windows_ms), statistics.median(windows_ms), max(windows_ms)
    print(f"\nwindow min / median / max: {least:.0f} / {middle:.0f} / {most:.0f} ms; lost {lost}\n")
    figures = {
        "window_min_ms": round(least),
        "window_median_ms": round(middle),
        "window_max_ms": round(most),
        "acknowledged": len(acknowledged),
        "lost": lost,
    }
    support.report("failover_edge", figures, kills=KILLS, fault="SIGKILL of the primary's whole region")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
