"""A host's hardware: the machines that run on it, its disk, and the ports through which flyd sees them.

Owns: `Hardware` (survives a crash of flyd; a power cut kills every machine and keeps the disk,
but for what was not synced to it), and the fakes that one flyd is given: `SimulatedDriver` and
`SimulatedSources` (its volumes: disk.py). Every operation takes time, and its effect happens somewhere
within that time, so a crash leaves it done or not done.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress

import msgspec

from flyd.errors import Conflict, NotFound, Refused, Unavailable
from flyd.model import ExecOutput, ExitStatus, LogLine, MachineSpec, Observed
from flyd.model.machine import Process
from flyd.ports import SessionClient
from flyd.store.memory import MemoryRunLog
from tests.simulation.disk import Attachment
from tests.simulation.loop import current, stream
from tests.simulation.network import WALL_START_S

SIGKILL = 9


class Temper(msgspec.Struct, frozen=True, kw_only=True):
    """How badly a host's machines and disk behave."""

    start_fails: float = 0.0
    exits_by_itself: float = 0.0  # of each run; at a time within EXIT_WITHIN_S
    ignores_signals: float = 0.0
    falls_sick: float = 0.0  # of each run, likewise; it fails its checks from then on
    work_s: tuple[float, float] = (0.01, 0.05)


EVEN = Temper()
BAD = Temper(start_fails=0.05, exits_by_itself=0.3, ignores_signals=0.4, falls_sick=0.3, work_s=(0.01, 0.8))
EXIT_WITHIN_S = 40.0
UNSYNCED_S = 5.0  # what a driver made so recently may not be on the disk yet; run logs and volumes are synced
LOST_UNSYNCED = 0.5


class Running:
    """One machine on the hardware."""

    def __init__(self, spec: MachineSpec) -> None:
        self.spec = spec
        self.pid = 0
        self.started_at_s = 0.0
        self.exit: ExitStatus | None = None
        self.deaf = False
        self.sick_at_s = math.inf
        self.gone = asyncio.Event()  # of this run
        self.unreported = False
        self.made_at_s = current().time()

    def observed(self) -> Observed:
        """As a driver says it."""
        return Observed(
            machine_id=self.spec.machine_id,
            instance_id=self.spec.instance_id,
            running=self.pid != 0,
            pid=self.pid,
            started_at_s=self.started_at_s,
            exit=self.exit,
        )


class Hardware:
    """One host, as flyd's crash leaves it."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.temper = EVEN
        self.machines: dict[str, Running] = {}
        self.volumes: dict[str, Attachment] = {}
        self.purged: list[str] = []  # volumes whose data was removed for ever
        self.run_log = MemoryRunLog()
        self.on_change: list[Callable[[], None]] = []
        self.on_start: list[Callable[[str, str], None]] = []  # host, machine
        self.exited = asyncio.Event()
        self.chance = stream(current().seed, f"hardware/{host}")
        self._outside = current().world_context()
        self._next_pid = 1

    def running(self) -> dict[str, MachineSpec]:
        """What runs now, by machine id."""
        return {m: r.spec for m, r in sorted(self.machines.items()) if r.pid}

    def sick(self) -> list[str]:
        """Machines that run and fail their checks."""
        now_s = current().time()
        return [m for m, r in sorted(self.machines.items()) if r.pid and r.sick_at_s <= now_s]

    def answers(self, address: str) -> bool:
        """Whether what has this address runs, and is well."""
        sick = self.sick()
        return any(m not in sick for m, spec in self.running().items() if spec.private_ip == address)

    def flip(self, probability: float) -> bool:
        """One draw."""
        return self.chance.random() < probability

    async def work(self) -> None:
        """Half of an operation's time."""
        await asyncio.sleep(self.chance.uniform(*self.temper.work_s) / 2)

    def start(self, machine: Running) -> None:
        """The machine runs from now on."""
        self._next_pid += 1
        machine.pid, machine.exit, machine.deaf = self._next_pid, None, self.flip(self.temper.ignores_signals)
        machine.gone = asyncio.Event()
        machine.started_at_s = WALL_START_S + current().time()
        sick_s = self.chance.uniform(0, EXIT_WITHIN_S) if self.flip(self.temper.falls_sick) else math.inf
        machine.sick_at_s = current().time() + sick_s
        if self.flip(self.temper.exits_by_itself):
            after_s = self.chance.uniform(0, EXIT_WITHIN_S)
            run = (machine, machine.pid, ExitStatus(code=self.chance.choice((0, 1, 137))))
            current().call_later(after_s, self._exit_later, *run, context=self._outside)
        self._changed(f"runs {machine.spec.machine_id} pid {machine.pid}")
        for see in self.on_start:
            see(self.host, machine.spec.machine_id)

    def end(self, machine: Running, status: ExitStatus) -> None:
        """The machine's process has ended."""
        if not machine.pid:
            return
        machine.pid, machine.unreported = 0, True
        machine.gone.set()
        machine.exit = msgspec.structs.replace(status, at_s=WALL_START_S + current().time())
        self._changed(f"ended {machine.spec.machine_id} {status.code} {status.signal}")
        self.exited.set()

    def _exit_later(self, machine: Running, pid: int, status: ExitStatus) -> None:
        if machine.pid == pid:
            self.end(machine, status)

    def power_cut(self) -> None:
        """Every process is gone, and nobody saw how it ended; the disk stays."""
        now_s = current().time()
        for machine_id, machine in sorted(self.machines.items()):
            machine.pid, machine.unreported = 0, False
            machine.gone.set()
            if now_s - machine.made_at_s < UNSYNCED_S and self.flip(LOST_UNSYNCED):
                del self.machines[machine_id]  # a file, or a container, that never reached the disk
                current().note(f"{self.host} lost what was made for {machine_id}")
        self._changed("lost its power")

    def _changed(self, what: str) -> None:
        current().note(f"{self.host} {what}")
        for see in self.on_change:
            see()


class SimulatedDriver:
    """ports.Driver on one host's hardware."""

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware
        for machine in hardware.machines.values():
            machine.unreported = False  # `exits` tells of what ends from now on

    async def create(self, spec: MachineSpec) -> None:
        await self._hardware.work()
        known = self._hardware.machines.get(spec.machine_id)
        if known is None:
            self._hardware.machines[spec.machine_id] = Running(spec)
        elif not known.pid:
            known.spec = spec
        await self._hardware.work()

    async def start(self, spec: MachineSpec) -> Observed:
        hardware = self._hardware
        await hardware.work()
        machine = hardware.machines.get(spec.machine_id)
        if machine is None:
            raise NotFound(f"machine {spec.machine_id} was never created on {hardware.host}")
        if machine.pid and machine.spec.instance_id != spec.instance_id:
            raise Conflict(f"machine {spec.machine_id} runs instance {machine.spec.instance_id}")
        if not machine.pid:
            if hardware.flip(hardware.temper.start_fails):
                raise Unavailable(f"machine {spec.machine_id} could not be started")
            machine.spec = spec
            hardware.start(machine)
        await hardware.work()
        return machine.observed()

    async def stop(self, machine_id: str, signal: str, timeout_s: float) -> ExitStatus | None:
        hardware = self._hardware
        await hardware.work()
        machine = hardware.machines.get(machine_id)
        if machine is None or not machine.pid:
            return None
        pid = machine.pid
        if machine.deaf:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await machine.gone.wait()
        if machine.pid == pid:
            status = ExitStatus(signal=SIGKILL) if machine.deaf else ExitStatus(code=0)
            hardware.end(machine, msgspec.structs.replace(status, requested=True))
        await hardware.work()
        return machine.exit

    async def destroy(self, machine_id: str) -> None:
        hardware = self._hardware
        await hardware.work()
        machine = hardware.machines.get(machine_id)
        if machine is not None:
            hardware.end(machine, ExitStatus(signal=SIGKILL, requested=True))
            hardware.machines.pop(machine_id, None)
        await hardware.work()

    async def observe(self) -> Mapping[str, Observed]:
        await self._hardware.work()
        return {m: r.observed() for m, r in sorted(self._hardware.machines.items())}

    async def look(self, machine_id: str) -> Observed | None:
        await self._hardware.work()
        machine = self._hardware.machines.get(machine_id)
        return machine.observed() if machine is not None else None

    async def signal(self, machine_id: str, signal: str) -> None:
        await self._hardware.work()
        if machine_id not in self._hardware.running():
            raise Refused(f"machine {machine_id} is not running")

    async def processes(self, machine_id: str) -> tuple[Process, ...]:
        await self._hardware.work()
        machine = self._hardware.machines.get(machine_id)
        return (Process(pid=machine.pid, command="simulated"),) if machine is not None and machine.pid else ()

    async def exits(self) -> AsyncIterator[str]:
        hardware = self._hardware
        while True:
            for machine_id, machine in sorted(hardware.machines.items()):
                if machine.unreported:
                    machine.unreported = False
                    yield machine_id
            hardware.exited.clear()
            await hardware.exited.wait()

    async def exec(
        self, machine_id: str, command: Sequence[str], timeout_s: float
    ) -> AsyncIterator[ExecOutput]:
        await self._hardware.work()
        yield ExecOutput(exit_code=0)

    async def session(self, machine_id: str, command: Sequence[str], client: SessionClient) -> int:
        await self._hardware.work()
        return 0

    async def logs(self, machine_id: str, *, tail: int, follow: bool) -> AsyncIterator[LogLine]:
        await self._hardware.work()
        yield LogLine(machine_id=machine_id, at_s=WALL_START_S, text="hello")


class SimulatedSources:
    """ports.SourceStore: every tree is there, after a while."""

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware

    async def ensure(self, digest: str) -> str:
        await self._hardware.work()
        return f"/sources/{digest}"

    async def receive(self, digest: str, chunks: AsyncIterator[bytes]) -> None:
        async for _ in chunks:
            await self._hardware.work()

    async def open(self, digest: str) -> AsyncIterator[bytes]:
        await self._hardware.work()
        yield b""
