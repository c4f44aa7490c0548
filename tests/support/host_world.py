"""One host for tests of the host loop: fake hardware, a fake etcd, and flyds that come and go on it.

A `Crasher` kills the flyd of the moment right after its n-th effect (a driver call, a
volume call, a run log write, an etcd transaction): the hardware, the log and etcd stay.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import count

import msgspec

from flyd.errors import NotFound, Refused, Unavailable
from flyd.machines.halts import Halts
from flyd.machines.host import HostLoop
from flyd.machines.operations import Records, Tools
from flyd.model import (
    Check,
    ExecOutput,
    ExitStatus,
    Host,
    LogLine,
    Machine,
    MachineConfig,
    MachineSpec,
    MachineState,
    MachineStatus,
    Mount,
    Observed,
    Reservations,
    Resources,
    RunEvent,
    Volume,
    decode,
    encode,
)
from flyd.model.machine import Process
from flyd.ports import Delete, Put, SessionClient
from flyd.store import keys
from flyd.store.memory import MemoryEtcd, MemoryKV, MemoryRunLog
from flyd.store.mirror import Mirror

HOST = Host(
    name="h1",
    region="fra",
    api_address="127.0.0.1:1",
    address="127.10.0.1",
    subnet="127.10",
    capacity=Resources(cpus=4),
    driver="fake",
    version="0",
)
SOURCE = "source:sha256:" + "ab" * 32


class Crash(BaseException):
    """A kill -9 at this very instruction."""


class Crasher:
    """Counts effects and dies after (or before) the chosen one."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.seen = 0

    def effect(self) -> None:
        self.seen += 1
        if self.seen == self.at:
            raise Crash


class FakeDriver:
    """Processes that live outside any one flyd; `crasher` is the flyd's that uses it now."""

    def __init__(self) -> None:
        self.specs: dict[str, MachineSpec] = {}
        self.seen: dict[str, Observed] = {}
        self.starts: list[str] = []
        self.signals: list[tuple[str, str]] = []
        self.refuse_start = 0
        self.looks = 0
        self.ended: asyncio.Queue[str] = asyncio.Queue()
        self.crasher = Crasher()
        self._pids = count(100)

    async def create(self, spec: MachineSpec) -> None:
        self.specs[spec.machine_id] = spec
        self.crasher.effect()

    async def start(self, spec: MachineSpec) -> Observed:
        if spec.machine_id not in self.specs:
            raise NotFound("never created")
        old = self.seen.get(spec.machine_id)
        if old is None or not old.running:
            if self.refuse_start:
                self.refuse_start -= 1
                raise Refused("no such program")
            self.starts.append(spec.machine_id)
            self.seen[spec.machine_id] = Observed(
                machine_id=spec.machine_id,
                instance_id=spec.instance_id,
                running=True,
                pid=next(self._pids),
                started_at_s=1.0,
            )
        self.crasher.effect()
        return self.seen[spec.machine_id]

    async def stop(self, machine_id: str, signal: str, timeout_s: float) -> ExitStatus | None:
        was = self.seen.get(machine_id)
        exit = None
        if was and was.running:
            exit = ExitStatus(code=0, requested=True)
            self.end(machine_id, exit)
        self.crasher.effect()
        return exit

    def end(self, machine_id: str, exit: ExitStatus) -> None:
        self.seen[machine_id] = msgspec.structs.replace(
            self.seen[machine_id], running=False, pid=0, exit=exit
        )
        self.ended.put_nowait(machine_id)

    async def destroy(self, machine_id: str) -> None:
        self.seen.pop(machine_id, None)
        self.specs.pop(machine_id, None)
        self.crasher.effect()

    async def observe(self) -> Mapping[str, Observed]:
        return dict(self.seen)

    async def look(self, machine_id: str) -> Observed | None:
        self.looks += 1
        return self.seen.get(machine_id)

    async def signal(self, machine_id: str, signal: str) -> None:
        self.signals.append((machine_id, signal))

    async def processes(self, machine_id: str) -> tuple[Process, ...]:
        return ()

    async def exits(self) -> AsyncIterator[str]:
        while True:
            yield await self.ended.get()

    async def exec(
        self, machine_id: str, command: Sequence[str], timeout_s: float
    ) -> AsyncIterator[ExecOutput]:
        yield ExecOutput(exit_code=0)

    async def session(self, machine_id: str, command: Sequence[str], client: SessionClient) -> int:
        return 0

    async def logs(self, machine_id: str, *, tail: int, follow: bool) -> AsyncIterator[LogLine]:
        yield LogLine(machine_id=machine_id, at_s=0.0, text="")


class FakeVolumes:
    def __init__(self) -> None:
        self.held: dict[str, tuple[str, int]] = {}
        self.created: list[str] = []
        self.crasher = Crasher()

    async def create(self, volume_id: str, size_gb: int) -> None:
        if volume_id not in self.held:
            self.created.append(volume_id)
            self.held[volume_id] = ("", 0)
        self.crasher.effect()

    async def attach(self, volume_id: str, machine_id: str, epoch: int) -> str:
        if epoch < self.held[volume_id][1]:
            raise Refused("stale epoch")
        self.held[volume_id] = (machine_id, epoch)
        self.crasher.effect()
        return f"/vol/{volume_id}"

    async def detach(self, volume_id: str, machine_id: str, epoch: int) -> None:
        if volume_id not in self.held:
            raise NotFound("no such volume")
        if self.held[volume_id] == (machine_id, epoch):
            self.held[volume_id] = ("", epoch)
        self.crasher.effect()


class FakeSources:
    def __init__(self) -> None:
        self.fails = 0

    async def ensure(self, digest: str) -> str:
        if self.fails:
            self.fails -= 1
            raise Unavailable("no host has it")
        return f"/src/{digest}"

    async def receive(self, digest: str, chunks: AsyncIterator[bytes]) -> None:
        raise NotImplementedError

    async def open(self, digest: str) -> AsyncIterator[bytes]:
        yield b""


class CrashingLog(MemoryRunLog):
    crasher = Crasher()

    def append(self, event: RunEvent) -> None:
        super().append(event)
        self.crasher.effect()

    def put_record(self, key: str, value: bytes) -> None:
        super().put_record(key, value)
        self.crasher.effect()

    def delete_record(self, key: str) -> None:
        super().delete_record(key)
        self.crasher.effect()


class FaultyKV(MemoryKV):
    """etcd that can be away, and whose effects can be the last thing a flyd did."""

    def __init__(self, server: MemoryEtcd) -> None:
        super().__init__(server)
        self.away = False
        self.crasher = Crasher()

    async def _before(self, op: str) -> None:
        await super()._before(op)
        if self.away:
            raise Unavailable("etcd is away")

    async def _after(self, op: str) -> None:
        if op == "txn":
            self.crasher.effect()


class LoopClock:
    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()

    def wall_s(self) -> float:
        return 1000.0


class Counting:
    def __init__(self) -> None:
        self._numbers = count(1)

    def token(self, n_bytes: int) -> str:
        return f"{next(self._numbers):0{2 * n_bytes}x}"


class World:
    """One host's hardware and etcd; flyds come and go on it."""

    def __init__(self) -> None:
        self.etcd = MemoryEtcd()
        self.driver = FakeDriver()
        self.volumes = FakeVolumes()
        self.sources = FakeSources()
        self.run_log = CrashingLog()
        self.run_log.crasher = Crasher()
        self.entropy = Counting()
        self.clock = LoopClock()
        self.kv = FaultyKV(self.etcd)
        self.probe_ok = True
        self.probes = 0

    async def probe(self, check: Check, address: str) -> tuple[bool, str]:
        self.probes += 1
        return (True, "200 OK") if self.probe_ok else (False, "refused")

    @asynccontextmanager
    async def flyd(self, crasher: Crasher | None = None, away: bool = False) -> AsyncGenerator[None]:
        self.kv = FaultyKV(self.etcd)
        self.kv.away = away
        crasher = crasher or Crasher()
        for part in (self.driver, self.volumes, self.run_log, self.kv):
            part.crasher = crasher
        mirror = Mirror(self.kv, (keys.ROOT,))
        loop = HostLoop(
            host=HOST,
            kv=self.kv,
            mirror=mirror,
            driver=self.driver,
            run_log=self.run_log,
            volumes=self.volumes,
            sources=self.sources,
            clock=self.clock,
            entropy=self.entropy,
            probe=self.probe,
        )
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(mirror.keep()), group.create_task(loop.run())]
            yield
            for task in tasks:
                task.cancel()

    def tools(self) -> Tools:
        """What one flyd's operations work with, without its loops."""
        records = Records(self.run_log, lambda _: None)
        return Tools(
            host=HOST,
            kv=self.kv,
            driver=self.driver,
            run_log=self.run_log,
            volumes=self.volumes,
            sources=self.sources,
            clock=LoopClock(),
            records=records,
            halts=Halts(self.driver),
        )

    def put(self, key: str, value: msgspec.Struct) -> None:
        self.etcd.txn((), (Put(key, encode(value)),))

    def claim(self, machine: Machine) -> None:
        self.put(keys.machine(machine.app, machine.id), machine)

    def delete(self, key: str) -> None:
        self.etcd.txn((), (Delete(key),))

    def status(self, machine_id: str = "m1") -> MachineStatus | None:
        stored = self.etcd.get(keys.status("web", machine_id))
        return decode(stored.value, MachineStatus) if stored else None

    def state(self, machine_id: str = "m1") -> MachineState | None:
        status = self.status(machine_id)
        return status.state if status else None

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.002)

    async def until_state(self, state: MachineState) -> MachineStatus:
        await self.until(lambda: self.state() is state)
        status = self.status()
        assert status is not None
        return status


def machine(*, config: MachineConfig | None = None, **more: object) -> Machine:
    base = Machine(
        id="m1",
        app="web",
        name="web-1",
        region="fra",
        host="h1",
        instance_id="01A",
        config=config or MachineConfig(image=SOURCE, cmd=("./serve", "--host", "$FLY_PRIVATE_IP")),
        private_ip="127.10.0.2",
    )
    return msgspec.structs.replace(base, **more)


def placed_with_volume(world: World) -> Machine:
    claim = machine(
        config=MachineConfig(image=SOURCE, cmd=("x",), mounts=(Mount(path="/data", volume="v1"),))
    )
    world.claim(claim)
    world.put(
        keys.volume("web", "v1"),
        Volume(
            id="v1", name="d", app="web", region="fra", host="h1", size_gb=1, attached_machine="m1", epoch=3
        ),
    )
    world.put(
        keys.reservations("h1"),
        Reservations(
            host="h1",
            machines={"m1": Resources(cpus=1), "other": Resources(cpus=1)},
            volumes_gb={"v1": 1},
            addresses={"m1": 2, "other": 3},
        ),
    )
    return claim


def assert_freed(world: World) -> None:
    assert world.etcd.get(keys.machine("web", "m1")) is None
    assert world.etcd.get(keys.status("web", "m1")) is None
    reserved = world.etcd.get(keys.reservations("h1"))
    assert reserved is not None
    kept = Reservations(
        host="h1", machines={"other": Resources(cpus=1)}, volumes_gb={"v1": 1}, addresses={"other": 3}
    )
    # Nobody claims "other": a host loop that runs gives its place back too (flyd/machines/leftovers.py).
    swept = Reservations(host="h1", volumes_gb={"v1": 1})
    assert decode(reserved.value, Reservations) in (kept, swept)
    volume = world.etcd.get(keys.volume("web", "v1"))
    assert volume is not None
    assert decode(volume.value, Volume).attached_machine == ""
    assert world.volumes.held["v1"] == ("", 3)
    assert world.driver.specs == {}
    assert world.run_log.records("machines/") == {}
    assert world.run_log.open_runs() == ()
