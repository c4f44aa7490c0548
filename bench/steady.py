"""What the way through the endpoint costs a database that works, and what the agents need when it rests.

    python bench/steady.py [--rounds N] [--seconds N] [--base N]

Three regions on loopback with one Postgres cluster, all real. First REST_S seconds without traffic: the CPU
of each member's agent (with its killer). Then pgbench, TPC-B, CLIENTS clients, in rounds: once through the
endpoint that an app's DATABASE_URL names (Envoy of the primary's region) and once straight to the same
primary, same tables, same settings, every commit waiting for a replica. Who goes first changes with each
round. Printed are both rates and the median of the rounds' ratios.

Exit code 1 if the ratio is below LEAST_RATIO or an agent needs more than MAX_CPU_PERCENT of a core at rest.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import support
from flyd.cluster.local import LocalCluster
from pgha.binaries import find_binaries
from pgha.processes import unprivileged

BASE = 134
CLIENTS = 8
SCALE = 10  # more branches than clients: not a measure of row locks
ROUNDS = 8
SECONDS = 6
WARM_S = 5
SETTLE_S = 10.0
REST_S = 20.0
WHOLE_S = 90.0
LEAST_RATIO = 0.93
MAX_CPU_PERCENT = 1.0
RATE = re.compile(r"^tps = ([0-9.]+)", re.MULTILINE)
FAILED = re.compile(r"^number of failed transactions: (\d+)", re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"of each run; default {SECONDS}")
    parser.add_argument("--base", type=int, default=BASE, help=f"of the addresses; default {BASE}")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="flyd-bench-pg-") as room:
        Path(room).chmod(0o755)
        pgbench = str(find_binaries("", unprivileged(), Path(room)) / "pgbench")
        with support.local_cluster(arguments.base) as cluster:
            support.fly("postgres", "create", "chat-db", "--regions", ",".join(support.REGIONS))
            support.wait_for("all members stream", all_stream, WHOLE_S)
            cpu = agents_cpu(cluster)
            rates = compare(cluster, pgbench, arguments.rounds, arguments.seconds)
    return tell(cpu, rates, load)


def all_stream() -> bool:
    """A primary serves and every other member streams from it."""
    status = support.postgres_status()
    others = [m for m in status["members"] if m["node"] != status["primary"]]
    return bool(status["serving"]) and len(others) == 2 and all(m["streaming"] for m in others)


def agents_cpu(cluster: LocalCluster) -> dict[str, float]:
    """Percent of a core by member, at rest. The servers themselves are not counted."""
    time.sleep(SETTLE_S)
    agents = {pid: name for pid, name in support.parts(cluster).items() if name.startswith("pgha ")}
    before, began_s = {pid: support.cpu_s(pid) for pid in agents}, time.monotonic()
    time.sleep(REST_S)
    rest_s = time.monotonic() - began_s
    used = dict.fromkeys(sorted(agents.values()), 0.0)
    for pid, name in agents.items():
        used[name] += (support.cpu_s(pid) - before[pid]) / rest_s * 100
    return used


def compare(cluster: LocalCluster, pgbench: str, rounds: int, seconds: int) -> dict[str, list[float]]:
    """Transactions a second by way, a figure a round."""
    status = support.postgres_status()
    primary = next(m for m in status["members"] if m["node"] == status["primary"])
    endpoint = support.connection_uri(cluster, primary["region"])
    parts = urlsplit(endpoint)
    straight = parts._replace(netloc=f"{parts.username}:{parts.password}@{primary['address']}").geturl()
    ways = {"endpoint": endpoint, "straight": straight}
    run(pgbench, straight, "-i", "-q", "-s", str(SCALE))
    for uri in ways.values():
        transactions(pgbench, uri, WARM_S)
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in sorted(ways, reverse=bool(number % 2)):
            rates[way].append(transactions(pgbench, ways[way], seconds))
        print(
            f"round {number + 1}: " + ", ".join(f"{way} {rates[way][-1]:.0f}/s" for way in ways), flush=True
        )
    after = support.postgres_status()
    if (after["primary"], after["epoch"]) != (status["primary"], status["epoch"]):
        sys.exit("the primary changed meanwhile: nothing was measured")
    return rates


def transactions(pgbench: str, uri: str, seconds: int) -> float:
    """A second, of TPC-B; none may fail."""
    said = run(pgbench, uri, "-n", "-c", str(CLIENTS), "-j", "1", "-T", str(seconds))
    rate, failed = RATE.search(said), FAILED.search(said)
    if rate is None or failed is None or int(failed.group(1)):
        sys.exit(f"pgbench did not measure:\n{said}")
    return float(rate.group(1))


def run(pgbench: str, uri: str, *arguments: str) -> str:
    """What pgbench printed."""
    done = subprocess.run([pgbench, *arguments, uri], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"pgbench {' '.join(arguments)} failed ({done.returncode}):\n{done.stderr}{done.stdout}")
    return done.stdout


def tell(cpu: dict[str, float], rates: dict[str, list[float]], load: float) -> int:
    """Print the figures; the exit code."""
    print(f"\nAt rest, over {REST_S:g} s, CPU of one core:")
    for name, percent in cpu.items():
        print(f"  {name:<14}{percent:6.2f} %")
    ratios = [through / plain for through, plain in zip(rates["endpoint"], rates["straight"], strict=True)]
    ratio = statistics.median(ratios)
    print(f"\npgbench TPC-B, {CLIENTS} clients, transactions a second (median of {len(ratios)}):")
    for way, found in rates.items():
        print(f"  {way:<14}{statistics.median(found):8.0f}   {min(found):.0f} to {max(found):.0f}")
    print(f"  ratio         {ratio:8.3f}   {min(ratios):.3f} to {max(ratios):.3f}, at least {LEAST_RATIO}\n")
    figures = {
        "ratio": round(ratio, 3),
        **{f"{way}_tps": round(statistics.median(found)) for way, found in rates.items()},
        **{f"{name.replace(' ', '_')}_cpu_percent": round(percent, 2) for name, percent in cpu.items()},
    }
    support.report(
        "steady", figures, clients=CLIENTS, scale=SCALE, rounds=len(ratios), load=round(load, 1),
        least_ratio=LEAST_RATIO, max_cpu_percent=MAX_CPU_PERCENT,
    )  # fmt: skip
    return 1 if ratio < LEAST_RATIO or max(cpu.values()) > MAX_CPU_PERCENT else 0


if __name__ == "__main__":
    sys.exit(main())
