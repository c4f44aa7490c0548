"""This host's figures for Prometheus, at http://127.0.0.1:<metrics_port>/metrics.

    flyd_etcd_silence_seconds           since etcd was last heard of
    flyd_machines{state}                this host's machines
    flyd_dns_questions_total{outcome}   where this host answers names
    flyd_dns_stale_seconds              names come from the last known state for so long; 0: from etcd's

and those of the process (process_cpu_seconds_total, process_resident_memory_bytes, ...). On loopback: a
scraper runs on the host. Figures are read on the event loop, where what they tell of lives; the HTTP server
is the library's, in a thread of its own. Run `serve` in flyd/daemon.py's TaskGroup. Decides nothing.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from flyd.errors import Refused
from flyd.model import Host, MachineStatus
from flyd.store import keys
from flyd.store.mirror import Mirror

if TYPE_CHECKING:
    from flyd.network.dns import DnsFigures  # loads dnspython, which hosts without names do without

ADDRESS = "127.0.0.1"
READ_TIMEOUT_S = 5.0  # a loop that is busy for longer has no figures to tell

Dns = Callable[[], "DnsFigures"]


class Figures(Collector):
    """What is told, gathered anew for each scrape."""

    def __init__(self, host: Host, mirror: Mirror, dns: Dns | None, loop: asyncio.AbstractEventLoop) -> None:
        self._host = host
        self._mirror = mirror
        self._dns = dns
        self._loop = loop

    def collect(self) -> Iterable[Metric]:
        """For the library, in its thread."""
        return asyncio.run_coroutine_threadsafe(self._gathered(), self._loop).result(READ_TIMEOUT_S)

    async def _gathered(self) -> list[Metric]:
        host = self._host
        told = {"host": host.name, "region": host.region, "version": host.version}
        found: list[Metric] = [
            InfoMetricFamily("flyd", "This flyd", told),
            GaugeMetricFamily(
                "flyd_etcd_silence_seconds", "Since etcd was last heard of", self._mirror.stale_s()
            ),
        ]
        machines = GaugeMetricFamily("flyd_machines", "This host's machines", labels=["state"])
        statuses = [versioned.value for versioned in self._mirror.list(keys.STATUS, MachineStatus)]
        states = Counter(status.state.value for status in statuses if status.host == host.name)
        for state, count in sorted(states.items()):
            machines.add_metric([state], count)
        return [*found, machines, *(_names(self._dns()) if self._dns is not None else ())]


def _names(figures: DnsFigures) -> Iterable[Metric]:
    asked = CounterMetricFamily("flyd_dns_questions", "Questions by what became of them", labels=["outcome"])
    for outcome in ("answered", "no_such_name", "forwarded", "failed", "malformed", "refused"):
        asked.add_metric([outcome], getattr(figures, outcome))
    yield asked
    yield GaugeMetricFamily(
        "flyd_dns_stale_seconds", "Names are answered from the last known state since", figures.stale_s
    )


async def serve(host: Host, mirror: Mirror, port: int, dns: Dns | None) -> None:
    """Answer scrapes for ever; Refused if the port can not be had."""
    registry = prometheus.CollectorRegistry()
    registry.register(Figures(host, mirror, dns, asyncio.get_running_loop()))
    prometheus.ProcessCollector(registry=registry)
    try:
        server, thread = prometheus.start_http_server(port, ADDRESS, registry)
    except OSError as error:
        raise Refused(
            f"metrics can not be served at {ADDRESS}:{port}: {error.strerror}",
            hint=f"`ss -lntp 'sport = :{port}'` shows what listens there; metrics_port in flyd.toml is ours.",
        ) from error
    try:
        await asyncio.Event().wait()
    finally:
        server.shutdown()
        server.server_close()
        await asyncio.to_thread(thread.join)
