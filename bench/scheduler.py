"""How fast the pure scheduler places: 5,000 hosts, 100,000 machines, one core.

    python bench/scheduler.py

The cluster is made by the scheduler itself: 25 regions of 200 hosts, filled to about 80 % of their
memory with machines of 2,000 apps (and one app with a machine on every host); a tenth of the
machines have a volume, a fifth have CPUs of their own. Then, for each kind of request, one machine
after the other is placed and the oldest one is destroyed, so that the size stays. What is timed is the
decision and all changes of the snapshot that both make (`schedule`, `put_*`, `drop_*`): nothing is
rebuilt, nothing is prepared outside the time. CPU time of one thread, garbage collector on.

Exit code 1 if the usual mix is placed at less than 5,000 a second.
"""

from __future__ import annotations

import resource
import sys
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import support
from flyd.model import Guest, Host, Machine, MachineConfig, Mount, Reservations, Resources, Volume
from flyd.placement.index import Snapshot
from flyd.placement.scheduler import Placement, Request, address, reserved, schedule

REGIONS = [f"r{number:02d}" for number in range(25)]
HOSTS_EACH = 200
MACHINES = 100_000
APPS = 2_000
WIDE_APP = "everywhere"
PLACED = 20_000  # timed, of each kind
REFUSED = 50
MIN_PER_S = 5_000
SIZES_MB = (256, 512, 512, 1024, 1024, 2048)
CAPACITY = Resources(cpus=16, memory_mb=22 * 1024, disk_gb=100)
DATA = (Mount(path="/data", name="data", size_gb=2),)


def hosts() -> Iterator[Host]:
    for number in range(len(REGIONS) * HOSTS_EACH):
        region = REGIONS[number % len(REGIONS)]
        yield Host(
            name=f"{region}-{number // len(REGIONS):03d}",
            region=region,
            api_address="127.0.0.1:1",
            address="127.0.0.1",
            subnet=f"10.{number % 250}",
            capacity=CAPACITY,
            driver="bench",
            version="0",
            labels={"disk": "nvme" if number % 3 == 0 else "hdd"},
        )


class Cluster:
    """A snapshot, and its machines from the oldest to the newest."""

    def __init__(self) -> None:
        self.snapshot = Snapshot()
        self.machines: deque[Machine] = deque()
        self.refused = 0

    def place(self, request: Request) -> None:
        """Decide, and change the snapshot as the commit would."""
        outcome = schedule(request, self.snapshot)
        if not isinstance(outcome, Placement):
            self.refused += 1
            return
        assert request.guest is not None
        name = outcome.host.name
        promised = self.snapshot.reservations.get(name) or Reservations(host=name)
        volumes = [self._volume(request, outcome, mount) for mount in outcome.mounts]
        machine = Machine(
            id=request.machine_id,
            app=request.app,
            name=request.machine_id,
            region=outcome.host.region,
            host=name,
            instance_id="",
            config=MachineConfig(image="host:", guest=request.guest, mounts=outcome.mounts),
            private_ip=address(outcome.host.subnet, outcome.address_number),
        )
        self.snapshot.put_reservations(
            Reservations(
                host=name,
                machines={**promised.machines, machine.id: reserved(request.guest)},
                volumes_gb={**promised.volumes_gb, **{v.id: v.size_gb for v in volumes}},
                addresses={**promised.addresses, machine.id: outcome.address_number},
            )
        )
        for volume in volumes:
            self.snapshot.put_volume(volume)
        self.snapshot.put_machine(machine)
        self.machines.append(machine)

    def _volume(self, request: Request, placement: Placement, mount: Mount) -> Volume:
        return Volume(
            id=mount.volume or f"vol_{request.machine_id}",
            name=mount.name,
            app=request.app,
            region=placement.host.region,
            host=placement.host.name,
            size_gb=mount.size_gb,
            attached_machine=request.machine_id,
        )

    def destroy_oldest(self) -> None:
        """Give back what the oldest machine has; its volumes stay, and are free."""
        machine = self.machines.popleft()
        promised = self.snapshot.reservations[machine.host]
        self.snapshot.put_reservations(
            msgspec.structs.replace(
                promised,
                machines={m: size for m, size in promised.machines.items() if m != machine.id},
                addresses={m: number for m, number in promised.addresses.items() if m != machine.id},
            )
        )
        self.snapshot.drop_machine(machine.id)
        for volume in self.snapshot.volumes_of(machine.app):
            if volume.attached_machine == machine.id:
                self.snapshot.put_volume(msgspec.structs.replace(volume, attached_machine=""))


_ids = count()


def dice(number: int, salt: int, sides: int) -> int:
    """The same in every run, and unrelated for different salts."""
    return zlib.crc32(f"{salt} {number}".encode()) % sides


def usual(number: int) -> Request:
    """Nine of ten name a region, as deploys do; one in ten has a volume."""
    return Request(
        app=f"app{dice(number, 1, APPS)}",
        machine_id=f"{next(_ids):014x}",
        guest=Guest(
            cpus=1 + dice(number, 2, 2),
            memory_mb=SIZES_MB[dice(number, 3, len(SIZES_MB))],
            cpu_kind="performance" if dice(number, 4, 5) == 0 else "shared",
        ),
        region=REGIONS[dice(number, 5, len(REGIONS))] if dice(number, 6, 10) else None,
        mounts=DATA if dice(number, 7, 10) == 0 else (),
    )


def anywhere(number: int) -> Request:
    return msgspec.structs.replace(usual(number), region=None, mounts=())


def labelled(number: int) -> Request:
    return msgspec.structs.replace(usual(number), mounts=(), labels={"disk": "hdd"})


def wide(number: int) -> Request:
    return msgspec.structs.replace(anywhere(number), app=WIDE_APP)


def hopeless(number: int) -> Request:
    return msgspec.structs.replace(anywhere(number), guest=Guest(cpus=64))


KINDS: dict[str, Callable[[int], Request]] = {
    "usual mix": usual,
    "any region": anywhere,
    "with a label": labelled,
    "an app on every host": wide,
}


def per_second(cluster: Cluster, kind: Callable[[int], Request]) -> tuple[float, float]:
    """Placements a second, and the slowest one's ms."""
    slowest_s = 0.0
    began_s = time.thread_time()
    for number in range(PLACED):
        one_s = time.thread_time()
        cluster.place(kind(number))
        cluster.destroy_oldest()
        slowest_s = max(slowest_s, time.thread_time() - one_s)
    return PLACED / (time.thread_time() - began_s), slowest_s * 1000


def main() -> int:
    cluster = Cluster()
    began_s = time.thread_time()
    for host in hosts():
        cluster.snapshot.put_host(host)
        cluster.snapshot.set_alive(host.name, True)
    for number in range(len(REGIONS) * HOSTS_EACH):
        cluster.place(wide(number))
    for number in islice(count(), MACHINES - len(cluster.machines)):
        cluster.place(usual(number))
    filled_s = time.thread_time() - began_s
    spread = Counter(m.host for m in cluster.machines if m.app == WIDE_APP)
    print(
        f"{len(cluster.snapshot.hosts)} hosts, {len(cluster.machines)} machines of {APPS + 1} apps, "
        f"placed one by one in {filled_s:.1f} s of CPU ({len(cluster.machines) / filled_s:.0f}/s); "
        f"{cluster.refused} refused.\nOf the app that is everywhere, each host has "
        f"{min(spread.values())} to {max(spread.values())}.\n"
    )
    figures: dict[str, object] = {"fill_per_s": round(len(cluster.machines) / filled_s)}
    print(f"{'REQUEST':<24}{'PER SECOND':>12}{'SLOWEST MS':>12}   (of {PLACED}, each with one destroyed)")
    rates: dict[str, float] = {}
    for name, kind in KINDS.items():
        rates[name], slowest_ms = per_second(cluster, kind)
        print(f"{name:<24}{rates[name]:>12.0f}{slowest_ms:>12.1f}")
        figures[name.replace(" ", "_")] = {"per_s": round(rates[name]), "slowest_ms": round(slowest_ms, 2)}
    began_s = time.thread_time()
    for number in range(REFUSED):
        cluster.place(hopeless(number))
    refusal_ms = (time.thread_time() - began_s) / REFUSED * 1000
    figures["refusal_ms"] = round(refusal_ms, 2)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\nA refusal with each of the {len(cluster.snapshot.hosts)} hosts' reasons: {refusal_ms:.1f} ms.")
    print(f"{len(cluster.machines)} machines at the end, {cluster.refused} refused; peak {peak_mb:.0f} MB.\n")
    support.report(
        "scheduler", figures, hosts=len(cluster.snapshot.hosts), machines=MACHINES, min_per_s=MIN_PER_S
    )
    return 0 if rates["usual mix"] >= MIN_PER_S else 1


if __name__ == "__main__":
    sys.exit(main())
