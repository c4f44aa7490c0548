"""What the demo does, step by step, and what must hold at the end."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.markup import escape
from rich.table import Table

from examples.demo.clients import HOST, Ledger, keep_listening, keep_writing, notes_starts, stored_keys
from examples.demo.commands import DemoFailed, Fly, console, move_etcd_leader
from flyd.cluster.registry import folder

CLUSTER = "demo"
REGIONS = ("ams", "iad", "sin")
BASES = {"process": 31, "docker": 231}  # beside the cluster of `fly cluster up`
PYTHON_IMAGE = "flyd-python:bookworm"
DATABASE = "chat-db"
EXAMPLES = Path(__file__).parent.parent

BEFORE_S = 3.0  # traffic before the loss
AFTER_S = 4.0  # traffic after the first write that follows it
RECOVERY_TIMEOUT_S = 20.0
REJOIN_TIMEOUT_S = 60.0
MAX_GAP_S = 5.0


@dataclass
class Verdict:
    """The figures that decide whether the demo shows what it promises."""

    acknowledged: int
    lost: int
    gap_s: float
    old_primary: str
    new_primary: str

    def problems(self) -> list[str]:
        """What does not hold."""
        found: list[str] = []
        if self.lost:
            found.append(f"{self.lost} acknowledged writes are lost")
        if self.gap_s > MAX_GAP_S:
            found.append(f"writes stood still for {self.gap_s:.1f} s, more than {MAX_GAP_S:.0f} s")
        if self.old_primary == self.new_primary:
            found.append(f"{self.old_primary} is still the primary")
        return found


def heading(text: str) -> None:
    """A step begins."""
    console.print(f"\n[bold]── {escape(text)}[/]")


def copy_example(name: str, work: Path) -> None:
    """A copy of an example to deploy from, so that the repository stays as it is."""
    shutil.copytree(EXAMPLES / name, work / name, ignore=shutil.ignore_patterns("__pycache__"))


def prepare_images(work: Path) -> None:
    """Let the examples' Dockerfiles begin at a Python image that is there also without a registry."""
    subprocess.run([str(EXAMPLES.parent / "scripts" / "python-image.sh")], check=True)
    for config in work.glob("*/fly.toml"):
        text = config.read_text()
        config.write_text(text + f'\n[build.args]\n  BASE = "{PYTHON_IMAGE}"\n')


def build(fly: Fly, work: Path, provider: str) -> None:
    """The cluster, the chat with its Postgres in three regions, and datasette with a volume."""
    for name in ("chat", "notes"):
        copy_example(name, work)
    if provider == "docker":
        heading("Three hosts in containers, each with an engine and a disk of its own, meshed by WireGuard")
        prepare_images(work)
    else:
        heading("Three regions on this machine: real etcd, flyd and Envoy in each")
    regions, base = ",".join(REGIONS), str(BASES[provider])
    up = ("cluster", "up", "--name", CLUSTER, "--regions", regions, "--base", base)
    fly.show(*up, "--provider", provider)
    heading("A WebSocket chat with Postgres: primary in ams, replicas in iad and sin")
    fly.show("launch", "--yes", "--postgres", cwd=work / "chat")
    heading("datasette, which nobody here wrote, with a SQLite file on a volume")
    fly.show("launch", "--yes", cwd=work / "notes")


def edges(fly: Fly) -> dict[str, str]:
    """Each region's public HTTP address."""
    hosts: list[dict[str, Any]] = fly.ask("hosts", "list")
    return {h["region"]: f"{h['api_address'].rpartition(':')[0]}:{h['http_port']}" for h in hosts}


def nearest_first(region: str, all_edges: dict[str, str]) -> dict[str, str]:
    """The edges as a client near `region` tries them."""
    return {region: all_edges[region], **all_edges}


async def wait_until(what: str, timeout_s: float, reached: Callable[[], bool]) -> None:
    """Wait for a condition of the outside world that only asking tells."""
    deadline = time.monotonic() + timeout_s
    while not reached():
        if time.monotonic() > deadline:
            raise DemoFailed(f"{what}: not within {timeout_s:.0f} s")
        await asyncio.sleep(0.05)


@asynccontextmanager
async def traffic(all_edges: dict[str, str], ledger: Ledger) -> AsyncGenerator[None]:
    """A writer and a listener near each region, for as long as the block runs."""
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        listeners: list[asyncio.Task[None]] = []
        for region in REGIONS:
            near = nearest_first(region, all_edges)
            group.create_task(keep_writing(region, near, ledger, stop))
            listeners.append(group.create_task(keep_listening(region, near, ledger, stop)))
        try:
            yield
        finally:
            stop.set()
            for listener in listeners:
                listener.cancel()


def primary_of(fly: Fly) -> str:
    """The region of the serving primary, empty while there is none."""
    status = fly.ask("postgres", "status", "-a", DATABASE)
    if not status["serving"]:
        return ""
    return next((m["region"] for m in status["members"] if m["node"] == status["primary"]), "")


async def lose_the_primary(fly: Fly, with_etcd_leader: bool) -> tuple[Verdict, Ledger, str]:
    """Traffic in every region; the primary's region dies; traffic goes on."""
    all_edges = edges(fly)
    ledger = Ledger()
    victim = primary_of(fly)
    async with traffic(all_edges, ledger):
        heading("Traffic: a client near each region writes and listens")
        await wait_until("every client is served near by", RECOVERY_TIMEOUT_S, lambda: _all_near(ledger))
        await asyncio.sleep(BEFORE_S)
        show_traffic(ledger)
        fly.show("postgres", "status", "-a", DATABASE)
        if with_etcd_leader:
            endpoints = [f"https://{address.rpartition(':')[0]}:2379" for address in all_edges.values()]
            host = f"{victim}-1"
            identity = folder(CLUSTER) / host / "data" / "identity"
            await asyncio.to_thread(move_etcd_leader, endpoints, host, identity)
            console.print(f"etcd's own leader is in {victim}, too")
        heading(f"{victim}, with the primary, dies: SIGKILL to its flyd, Envoy, etcd and all machines")
        killed_at_s = time.time()
        await asyncio.to_thread(fly.show, "chaos", "kill-host", "--name", CLUSTER, victim)
        await wait_until(
            "a write is acknowledged again", RECOVERY_TIMEOUT_S, lambda: _recovered(ledger, killed_at_s)
        )
        await asyncio.sleep(AFTER_S)
    last_ack_s, first_ack_s = ledger.longest_pause(killed_at_s)
    survivor = next(region for region in REGIONS if region != victim)
    await show_timeline(fly, last_ack_s, first_ack_s)
    stored = await stored_keys(all_edges[survivor])
    lost = sorted({ack.key for ack in ledger.acks} - stored)
    verdict = Verdict(
        acknowledged=len(ledger.acks),
        lost=len(lost),
        gap_s=first_ack_s - last_ack_s,
        old_primary=victim,
        new_primary=primary_of(fly),
    )
    show_verdict(verdict, ledger, len(stored))
    heading("What flyd itself says of it")
    fly.show("incidents", "report", "-a", DATABASE)
    heading("The state now")
    fly.show("hosts", "list")
    fly.show("postgres", "status", "-a", DATABASE)
    fly.show("status", "-a", HOST)
    return verdict, ledger, victim


def _recovered(ledger: Ledger, killed_at_s: float) -> bool:
    """Whether the clients go on: a second of steady acknowledgements after the longest pause."""
    ended_s = ledger.longest_pause(killed_at_s)[1]
    return ended_s > killed_at_s and ledger.acks[-1].at_s > max(ended_s, killed_at_s + 2.0) + 1.0


def _all_near(ledger: Ledger) -> bool:
    return all(
        ledger.served[region, region] > 10 and ledger.sockets.get(region) == region for region in REGIONS
    )


def show_traffic(ledger: Ledger) -> None:
    """Who was served where, and that every socket hears every region."""
    table = Table("client near", "writes served in", "acknowledged", "socket in", "heard from", box=None)
    for region in REGIONS:
        served = {where: n for (edge, where), n in ledger.served.items() if edge == region}
        heard = sorted({author for (near, author) in ledger.heard if near == region})
        table.add_row(
            region,
            ", ".join(served),
            str(sum(served.values())),
            ledger.sockets.get(region, "-"),
            ", ".join(heard),
        )
    console.print(table)


async def show_timeline(fly: Fly, last_ack_s: float, first_ack_s: float) -> None:
    """What the cluster wrote down, by the clock, from the last acknowledged write on."""
    heading("What happened, by the clock")
    events = fly.ask("incidents", "list", "-a", DATABASE, "--since", f"{last_ack_s:.6f}")
    lines = [(e["timestamp"], e["source"], e["kind"], e["message"]) for e in events]
    lines.append((last_ack_s, "a client", "last write", "acknowledged by the old primary"))
    lines.append((first_ack_s, "a client", "first write", "acknowledged by the new primary"))
    table = Table("after", "who", "what", "", box=None)
    for at_s, who, kind, message in sorted(lines):
        table.add_row(f"{(at_s - last_ack_s) * 1000:7.0f} ms", who, kind, escape(message))
    console.print(table)


def show_verdict(verdict: Verdict, ledger: Ledger, stored: int) -> None:
    """The figures."""
    heading("The figures")
    console.print(
        f"write gap     [bold]{verdict.gap_s * 1000:.0f} ms[/] without an acknowledged write, all clients"
    )
    console.print(f"acknowledged  {verdict.acknowledged} writes; the chat has {stored} messages")
    colour = "green" if verdict.lost == 0 else "red"
    console.print(f"lost          [bold {colour}]{verdict.lost}[/]")
    console.print(f"primary       {verdict.old_primary} → {verdict.new_primary or 'none'}")
    for what, count in sorted(ledger.failures.items()):
        console.print(f"[dim]clients tried again {count} times: {escape(what)}[/]")


async def bring_back(fly: Fly, region: str) -> None:
    """The lost region returns: its old primary follows the new one, and its volume has its data."""
    far = next(address for name, address in edges(fly).items() if name != region)
    starts = await notes_starts(far)
    console.print(
        f"notes has its volume in {region}: it is {'up' if starts else 'down'} until {region} is back"
    )
    heading(f"{region} comes back")
    fly.show("cluster", "start-host", "--name", CLUSTER, region)
    began = time.monotonic()

    def rejoined() -> bool:
        members = fly.ask("postgres", "status", "-a", DATABASE)["members"]
        return any(m["region"] == region and m["role"] == "replica" and m["streaming"] for m in members)

    await wait_until(f"the old primary in {region} streams as a replica", REJOIN_TIMEOUT_S, rejoined)
    console.print(f"the old primary follows the new one, {time.monotonic() - began:.1f} s after flyd was up")
    fly.show("postgres", "status", "-a", DATABASE)
    await wait_until("notes serves from its volume", REJOIN_TIMEOUT_S, lambda: _served_by_notes(far))
    console.print(f"notes serves again, with the rows of {await notes_starts(far)} starts on its volume")


def _served_by_notes(edge: str) -> bool:
    url = f"http://{edge}/notes/starts.json"
    try:
        return httpx.get(url, headers={"Host": "notes"}, timeout=2.0).status_code == 200
    except httpx.HTTPError:
        return False
