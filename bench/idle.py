"""How much a quiet cluster costs: CPU and memory of each part, over 30 s without traffic.

    python bench/idle.py

Three regions on loopback with the chat and its Postgres deployed. CPU is user + system time
from /proc as a share of one core, memory is VmRSS at the end. Exit code 1 if a flyd needs
more than 1 % of a core or 90 MB.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import support

BASE = 121
SETTLE_S = 10.0
WINDOW_S = 30.0
MAX_CPU_PERCENT = 1.0
MAX_RSS_MB = 90.0


def main() -> int:
    with support.local_cluster(BASE) as cluster:
        support.deploy_chat()
        time.sleep(SETTLE_S)  # checks settle, Envoy has its routes, Postgres has checkpointed
        names = support.parts(cluster)
        before = {pid: support.cpu_s(pid) for pid in names}
        began_s = time.monotonic()
        time.sleep(WINDOW_S)
        window_s = time.monotonic() - began_s
        cpu: defaultdict[str, float] = defaultdict(float)
        rss: defaultdict[str, float] = defaultdict(float)
        for pid, name in sorted(names.items()):
            cpu[name] += (support.cpu_s(pid) - before[pid]) / window_s * 100
            rss[name] += support.rss_mb(pid)
    print(f"Measured over {window_s:.1f} s of rest, {SETTLE_S:g} s after the deploy; CPU of one core.\n")
    print(f"{'PART':<22}{'CPU %':>8}{'RSS MB':>9}   (all its processes)")
    for name in sorted(cpu):
        print(f"{name:<22}{cpu[name]:>8.2f}{rss[name]:>9.1f}")
    flyds = [name for name in sorted(cpu) if name.startswith("flyd ")]
    figures = {
        name: {"cpu_percent": round(cpu[name], 2), "rss_mb": round(rss[name], 1)} for name in sorted(cpu)
    }
    over = [n for n in flyds if cpu[n] > MAX_CPU_PERCENT or rss[n] > MAX_RSS_MB]
    print(f"\nflyd: {'over its limits on ' + ', '.join(over) if over else 'within its limits'}.\n")
    support.report(
        "idle", figures, window_s=round(window_s, 1), max_cpu_percent=MAX_CPU_PERCENT, max_rss_mb=MAX_RSS_MB
    )
    return 1 if over or len(flyds) != len(support.REGIONS) else 0


if __name__ == "__main__":
    sys.exit(main())
