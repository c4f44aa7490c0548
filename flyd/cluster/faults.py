"""Faults that only a host in a container can have: a disk of its own that is full, a link that is slow.

Each is made of a few commands run in the host; which ones is said by pure functions. Hosts that are
processes share this machine's disk and loopback network, where such a fault would be everybody's: there
it is refused. Called by `fly chaos`.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable

from flyd.cluster import disks
from flyd.cluster.layout import LocalHost
from flyd.cluster.registry import Cluster
from flyd.errors import Refused, Unavailable

DATA_FOLDER = "/var/lib/flyd"
FILLER = f"{DATA_FOLDER}/filled-by-fly-chaos"
SLACK_MB = 16  # a reservation needs blocks for its own lists; what remains is written
IFB = "fly-slow"  # what arrives is sent through this device, since only what leaves one can be queued
BURST_BYTES = 32 * 1024
BURST_S = 0.01  # a queue is served once a tick: its burst must hold what passes until the next
QUEUE_MS = 400
MIN_KBIT = 64  # with less, etcd's heartbeats alone fill the link

Run = Callable[..., str]
"""Runs a command in a host; what it printed. Raises Unavailable if it failed."""


def runner(cluster: Cluster, host: LocalHost, fault: str) -> Run:
    """What runs commands in this host; Refused where the fault can not be one host's alone."""
    if cluster.plan.provider != "docker":
        raise Refused(
            f"{host.name} can not have {fault}: the hosts of this cluster share this machine's",
            hint="`fly cluster up --provider docker` makes hosts that have their own.",
        )
    from flyd.cluster.containers import ContainerCluster  # only this kind of cluster needs an engine

    container = ContainerCluster(cluster.plan).container_name(host)

    def run(*command: str) -> str:
        # Not by the SDK: it loses output that comes in one packet with the engine's answer.
        asked = ("docker", "exec", container, *command)
        ran = subprocess.run(asked, capture_output=True, text=True, check=False)
        if ran.returncode != 0:
            raise Unavailable(
                f"{' '.join(command)} on {host.name} ended with {ran.returncode}: {ran.stderr.strip()}",
                hint="Lost or frozen? `fly cluster start-host` and `fly chaos resume-host` bring it back.",
            )
        return ran.stdout

    return run


# --------------------------------------------------------------------------- a full disk


def fill_disk(cluster: Cluster, host: LocalHost, leave_mb: int) -> int:
    """Use up a host's data disk but for `leave_mb`; how many MB are free now."""
    run = runner(cluster, host, "a full disk")
    if not disks.image(cluster.root / host.name).exists():
        raise Refused(
            f"{host.name} has no disk of its own, so this would fill this machine's: "
            f"when the cluster was made, {disks.why_none() or 'one could not be made'}",
            hint="`fly cluster down`, then `fly cluster up --provider docker` as root.",
        )
    run("rm", "-f", FILLER)
    reserved = free_mb(run) - leave_mb - SLACK_MB
    if reserved > 0:
        run("fallocate", "--length", f"{reserved}MiB", FILLER)
    run("sh", "-c", fill_script(free_mb(run) - leave_mb, to_the_end=leave_mb == 0))
    return free_mb(run)


def free_disk(cluster: Cluster, host: LocalHost) -> int:
    """Give a host's data disk back; how many MB are free now."""
    run = runner(cluster, host, "a full disk")
    run("rm", "-f", FILLER)
    return free_mb(run)


def free_mb(run: Run) -> int:
    """What is free on a host's data disk."""
    return int(run("df", "--output=avail", "--block-size=1K", DATA_FOLDER).split()[-1]) // 1024


def fill_script(rest_mb: int, *, to_the_end: bool) -> str:
    """Write the filler's last part: so much, or until nothing more can be written, which is no error."""
    writing = f"dd if=/dev/zero of={FILLER} bs=64k oflag=append conv=notrunc status=none"
    return f"{writing}; true" if to_the_end else f"{writing} count={max(0, rest_mb) * 16}"


# --------------------------------------------------------------------------- a slow link


def slow_link(cluster: Cluster, host: LocalHost, kbit: int) -> None:
    """Let no more than this pass between a host and all others each second, either way."""
    run = runner(cluster, host, "a slow link")
    device = device_of(run("ip", "-oneline", "-4", "address", "show"), host.address)
    _undo(run, device)
    for command in slow_commands(device, kbit):
        run(*command)


def fast_link(cluster: Cluster, host: LocalHost) -> None:
    """Let a host's traffic pass again as it likes."""
    run = runner(cluster, host, "a slow link")
    _undo(run, device_of(run("ip", "-oneline", "-4", "address", "show"), host.address))


def _undo(run: Run, device: str) -> None:
    run("sh", "-c", "; ".join(f"{command} 2>/dev/null" for command in fast_commands(device)) + "; true")


def device_of(addresses: str, address: str) -> str:
    """The network device that has an address, from what `ip -oneline address show` prints."""
    for line in addresses.splitlines():
        words = line.split()
        if words[3].partition("/")[0] == address:
            return words[1]
    raise Refused(
        f"the host has no {address}: it is cut off", hint="`fly chaos heal REGION` connects it again."
    )


def slow_commands(device: str, kbit: int) -> list[list[str]]:
    """What makes a device slow in both directions."""
    burst = max(BURST_BYTES, int(kbit * 1000 / 8 * BURST_S))
    queue = ["tbf", "rate", f"{kbit}kbit", "burst", f"{burst}b", "latency", f"{QUEUE_MS}ms"]
    through = ["action", "mirred", "egress", "redirect", "dev", IFB]
    return [
        ["tc", "qdisc", "replace", "dev", device, "root", *queue],
        ["ip", "link", "add", IFB, "type", "ifb"],
        ["ip", "link", "set", IFB, "up"],
        ["tc", "qdisc", "add", "dev", IFB, "root", *queue],
        ["tc", "qdisc", "add", "dev", device, "handle", "ffff:", "ingress"],
        ["tc", "filter", "add", "dev", device, "parent", "ffff:", "u32", "match", "u32", "0", "0", *through],
    ]


def fast_commands(device: str) -> list[str]:
    """What undoes `slow_commands`; each may find that there is nothing to undo."""
    return [
        f"tc qdisc del dev {device} root",
        f"tc qdisc del dev {device} ingress",
        f"ip link del {IFB}",
    ]
