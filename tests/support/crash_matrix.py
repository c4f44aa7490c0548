"""Every operation on a machine, and a flyd that dies right after any one of its effects.

An effect is a run log write (real SQLite), a call of the driver or of the volumes that has taken
effect, or an etcd transaction. `points_of` walks a lane: operations that lead into each other on one
machine (or each on a new one, where it begins or ends a machine), each with a flyd that dies after
its first effect, then after its second, and so on until it comes to its end undisturbed. After each
death a new flyd takes over; AssertionError unless what is wanted is then so and nothing is left over.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from flyd.errors import Unavailable
from flyd.machines.host import HostLoop
from flyd.model import (
    Check,
    Desired,
    Host,
    Machine,
    MachineConfig,
    MachineState,
    MachineStatus,
    Mount,
    Reservations,
    Resources,
    StopConfig,
    Volume,
    decode,
    encode,
)
from flyd.ports import Driver, Put
from flyd.store import keys
from flyd.store.memory import MemoryEtcd
from flyd.store.mirror import Mirror
from tests.support.dying import DyingDriver, DyingRunLog, DyingVolumes
from tests.support.host_world import Counting, Crash, Crasher, FakeSources, FaultyKV, LoopClock
from volumes.directory import DirectoryVolumes

CONVERGE_S = 60.0
LOOK_S = 0.005

T = TypeVar("T")

APP, VOLUME, EPOCH = "web", "v1", 3
STOP_CONFIG = StopConfig(signal="SIGTERM", timeout_s=0.3)


class Operation(msgspec.Struct, frozen=True):
    """A change of what is wanted, what it leads to, and how many processes it begins."""

    name: str
    change: Callable[[Machine], Machine]
    after: MachineState | None  # None: gone
    begins: int = 0


def _restarted(claim: Machine) -> Machine:
    return msgspec.structs.replace(claim, restart_nonce=claim.restart_nonce + 1)


def _updated(claim: Machine) -> Machine:
    return msgspec.structs.replace(claim, instance_id=f"{int(claim.instance_id) + 1:04}")


def _wanted(desired: Desired) -> Callable[[Machine], Machine]:
    return lambda claim: msgspec.structs.replace(claim, desired=desired)


CREATE = Operation("create", _wanted(Desired.STOPPED), MachineState.CREATED)
START = Operation("start", _wanted(Desired.STARTED), MachineState.STARTED, begins=1)
STOP = Operation("stop", _wanted(Desired.STOPPED), MachineState.STOPPED)
RESTART = Operation("restart", _restarted, MachineState.STARTED, begins=1)
UPDATE = Operation("update", _updated, MachineState.STARTED, begins=1)
DESTROY = Operation("destroy", _wanted(Desired.DESTROYED), None)

# What is done undisturbed to a new machine first, and then what is disturbed, in turn.
LANES: tuple[tuple[tuple[Operation, ...], tuple[Operation, ...]], ...] = (
    ((), (CREATE,)),
    ((CREATE,), (START, STOP)),
    ((CREATE, START), (RESTART,)),
    ((CREATE, START), (UPDATE,)),
    ((CREATE, START), (DESTROY,)),
)
ONCE = (CREATE, DESTROY)  # each time on a machine of its own


class Hardware(Protocol):
    """What machines run on; flyds come and go on it."""

    name: str  # of the driver
    image: str
    command: tuple[str, ...]
    every_effect: bool  # or those on the run log and the driver alone, where each point costs more

    def driver(self, machine_id: str) -> Driver:
        """A driver for a flyd that has just started, on the host of this machine."""
        ...

    def close(self, driver: Driver) -> None:
        """That flyd is gone; machines run on."""
        ...

    def left(self, machine_id: str) -> list[str]:
        """What there is of a machine on the host: containers, directories, processes."""
        ...


class OneMachine:
    """One machine on real hardware, with an etcd of its own."""

    def __init__(self, hardware: Hardware, folder: Path, machine_id: str, with_volume: bool) -> None:
        folder.mkdir()
        self.hardware = hardware
        self.machine_id = machine_id
        self.with_volume = with_volume
        self.runs: dict[int, None] = {}  # pids of all processes that were begun
        self.state: MachineState | None = None  # as the last operation left it
        self._folder = folder
        self._etcd = MemoryEtcd()
        self._entropy = Counting()
        self._run_log: DyingRunLog | None = None
        self._driver: Driver | None = None  # of the newest flyd
        mounts = (Mount(path="/data", volume=VOLUME),) if with_volume else ()
        self.claim = Machine(
            id=machine_id,
            app=APP,
            name=machine_id,
            region="fra",
            host="h1",
            instance_id="0001",
            config=MachineConfig(image=hardware.image, cmd=hardware.command, mounts=mounts, stop=STOP_CONFIG),
            private_ip="",
        )

    def wish(self, claim: Machine) -> None:
        """What a command writes; the first time, what the placer does."""
        effects = [Put(keys.machine(APP, claim.id), encode(claim))]
        if self.state is None:
            promised = Reservations(host="h1", machines={claim.id: Resources()}, addresses={claim.id: 2})
            effects.append(Put(keys.reservations("h1"), encode(promised)))
        if self.state is None and self.with_volume:
            volume = Volume(
                id=VOLUME, name="d", app=APP, region="fra", host="h1", size_gb=1,
                attached_machine=claim.id, epoch=EPOCH,
            )  # fmt: skip
            effects.append(Put(keys.volume(APP, VOLUME), encode(volume)))
        self._etcd.txn((), effects)
        self.claim = claim

    @asynccontextmanager
    async def flyd(self, crasher: Crasher) -> AsyncGenerator[None]:
        """One flyd, until the end of the block or its death."""
        inner = self._driver = self.hardware.driver(self.machine_id)
        self._run_log = DyingRunLog(self._folder / "runs.sqlite", crasher)
        kv = FaultyKV(self._etcd)
        others = crasher if self.hardware.every_effect else Crasher()
        kv.crasher = others
        mirror = Mirror(kv, (keys.ROOT,))
        loop = HostLoop(
            host=Host(
                name="h1", region="fra", api_address="127.0.0.1:1", address="127.10.0.1", subnet="127.10",
                capacity=Resources(cpus=4), driver=self.hardware.name, version="0",
            ),
            kv=kv,
            mirror=mirror,
            driver=DyingDriver(inner, crasher, self.machine_id, self.runs),
            run_log=self._run_log,
            volumes=DyingVolumes(DirectoryVolumes(self._folder / "volumes"), others),
            sources=FakeSources(),
            clock=LoopClock(),
            entropy=self._entropy,
            probe=_no_probe,
        )  # fmt: skip
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(mirror.keep()), group.create_task(loop.run())]
                yield
                for task in tasks:
                    task.cancel()
        finally:
            self._run_log.close()
            self._run_log = None
            self.hardware.close(inner)

    # ------------------------------------------------------------------ what is so

    def status(self) -> MachineStatus | None:
        """What the host said last."""
        stored = self._etcd.get(keys.status(APP, self.machine_id))
        return decode(stored.value, MachineStatus) if stored else None

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for what etcd shows."""
        try:
            async with asyncio.timeout(CONVERGE_S):
                while not condition():
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            raise AssertionError(f"{what}: not within {CONVERGE_S:g} s; {self.status()}") from None

    def settled(self) -> bool:
        """All is as the last operation left it."""
        status = self.status()
        return (status.state if status is not None else None) is self.state and self._rests()

    def reached(self, operation: Operation, before: Collection[int]) -> bool:
        """The operation has come to what it is for; `before`: the processes there were."""
        status = self.status()
        if operation.after is None or status is None:
            claimed = self._etcd.get(keys.machine(APP, self.machine_id)) is not None
            return operation.after is None and status is None and not claimed and self._rests()
        begun = status.pid in self.runs and status.pid not in before
        return (
            status.state is operation.after
            and status.instance_id == self.claim.instance_id
            and (begun or not operation.begins)
            and self._rests()
        )

    def _rests(self) -> bool:
        return self._run_log is not None and not self._run_log.open_runs()

    async def assert_well(self, operation: Operation, before: Collection[int], where: str) -> None:
        """One run where one was wanted; no leaked container, process, claim, reservation, attachment."""
        self.state = operation.after
        assert len(self.runs) - len(before) == operation.begins, f"{where}: runs {list(self.runs)}"
        seen = await self._patiently(lambda driver: driver.look(self.machine_id))
        gone = self.state is None
        assert self.hardware.left(self.machine_id) == ([] if gone else [self.machine_id]), where
        if gone:
            assert seen is None, where
        else:
            assert seen is not None, where
            assert seen.running == (self.state is MachineState.STARTED), where
            assert seen.instance_id == self.claim.instance_id, where
        self._assert_promises(where, gone)

    def _assert_promises(self, where: str, gone: bool) -> None:
        stored = self._etcd.get(keys.reservations("h1"))
        assert stored is not None
        promised = decode(stored.value, Reservations)
        kept = set[str]() if gone else {self.machine_id}
        assert (set(promised.machines), set(promised.addresses)) == (kept, kept), where
        if self.with_volume:
            record = self._etcd.get(keys.volume(APP, VOLUME))
            assert record is not None
            assert decode(record.value, Volume).attached_machine == ("" if gone else self.machine_id), where
            on_disk = (self._folder / "volumes" / VOLUME / "volume.json").read_bytes()
            disk = json.loads(on_disk)
            assert disk.get("attached", False) is not gone, where
            assert (disk["machine_id"], disk["epoch"]) == (self.machine_id, EPOCH), where

    async def remove(self) -> None:
        """Take what is left off the hardware."""
        self._driver = self.hardware.driver(self.machine_id)
        await self._patiently(lambda driver: driver.destroy(self.machine_id))
        self.hardware.close(self._driver)

    async def _patiently(self, ask: Callable[[Driver], Awaitable[T]]) -> T:
        """What the newest flyd's driver answers, once its engine does: others keep it busy too."""
        async with asyncio.timeout(CONVERGE_S):
            while True:
                assert self._driver is not None
                try:
                    return await ask(self._driver)
                except Unavailable:
                    await asyncio.sleep(LOOK_S)


async def _no_probe(_check: Check, _address: str) -> tuple[bool, str]:
    return True, ""


def _died(crasher: Crasher, at: int | None) -> bool:
    """Whether the flyd is dead; what it did last may be seen a moment before its other tasks end."""
    return at is not None and crasher.at == at and crasher.seen >= at


async def point(machine: OneMachine, operation: Operation, at: int | None) -> bool:
    """The operation with a flyd that dies after effect `at`; False if it came to its end before."""
    where = f"{operation.name} of {machine.machine_id} on {machine.hardware.name}, effect {at}"
    before = tuple(machine.runs)
    crasher = Crasher()
    try:
        async with machine.flyd(crasher):
            await machine.until(machine.settled, f"before {where}")
            crasher.seen, crasher.at = 0, at
            machine.wish(operation.change(machine.claim))
            await machine.until(lambda: machine.reached(operation, before), where)
            if not _died(crasher, at):
                crasher.at = None
                await machine.assert_well(operation, before, where)
    except* Crash:
        pass
    if crashed := _died(crasher, at):
        async with machine.flyd(Crasher()):
            await machine.until(lambda: machine.reached(operation, before), f"after a crash in {where}")
            await machine.assert_well(operation, before, where)
    return crashed


async def points_of(
    make: Callable[[], OneMachine],
    prepare: Sequence[Operation],
    disturbed: Sequence[Operation],
    room: asyncio.Semaphore,
) -> dict[str, int]:
    """All points of a lane; how many each operation has. `room`: what others do at the same time."""
    points = dict.fromkeys((operation.name for operation in disturbed), 0)
    ended: dict[str, None] = {}
    machine: OneMachine | None = None
    while len(ended) < len(disturbed):
        for operation in disturbed:
            async with room:
                if machine is None:
                    machine = make()
                    for first in prepare:
                        await point(machine, first, None)
                at = None if operation.name in ended else points[operation.name] + 1
                if await point(machine, operation, at):
                    points[operation.name] += 1
                else:
                    ended[operation.name] = None
                if operation in ONCE:
                    await machine.remove()
                    machine = None
    if machine is not None:
        await machine.remove()
    return points
