"""A host's hardware: the machines that run on it, its disk, and the ports through which flyd sees them.

Owns: `Hardware` (survives a crash of flyd; a power cut kills every machine and keeps the
disk), and the fakes that one flyd is given: `SimulatedDriver`, `SimulatedVolumes`,
`SimulatedSources`. Every operation takes time, and its effect happens somewhere within
that time, so a crash leaves it done or not done.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import msgspec

from flyd.errors import Conflict, NotFound, Refused, Unavailable
from flyd.model import ExecOutput, ExitStatus, LogLine, MachineSpec, Observed
from flyd.store.memory import MemoryRunLog
from tests.simulation.loop import current, stream
from tests.simulation.network import WALL_START_S

SIGKILL = 9


class Temper(msgspec.Struct, frozen=True, kw_only=True):
    """How badly a host's machines and disk behave."""

    start_fails: float = 0.0
    exits_by_itself: float = 0.0  # of each run; at a time within EXIT_WITHIN_S
    ignores_signals: float = 0.0
    work_s: tuple[float, float] = (0.01, 0.05)


EVEN = Temper()
BAD = Temper(start_fails=0.05, exits_by_itself=0.3, ignores_signals=0.1, work_s=(0.01, 0.8))
EXIT_WITHIN_S = 40.0


class Running:
    """One machine on the hardware."""

    def __init__(self, spec: MachineSpec) -> None:
        self.spec = spec
        self.pid = 0
        self.started_at_s = 0.0
        self.exit: ExitStatus | None = None
        self.deaf = False
        self.unreported = False

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


class Attachment(msgspec.Struct):
    """What the disk knows of a volume: its newest epoch, whose that is, and whether it still has it."""

    claimant: str = ""
    epoch: int = 0
    held: bool = False

    @property
    def machine(self) -> str:
        """Who has it now; empty: nobody."""
        return self.claimant if self.held else ""


class Hardware:
    """One host, as flyd's crash leaves it."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.temper = EVEN
        self.machines: dict[str, Running] = {}
        self.volumes: dict[str, Attachment] = {}
        self.run_log = MemoryRunLog()
        self.on_change: list[Callable[[], None]] = []
        self.exited = asyncio.Event()
        self.chance = stream(current().seed, f"hardware/{host}")
        self._outside = current().world_context()
        self._next_pid = 1

    def running(self) -> dict[str, MachineSpec]:
        """What runs now, by machine id."""
        return {m: r.spec for m, r in sorted(self.machines.items()) if r.pid}

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
        machine.started_at_s = WALL_START_S + current().time()
        if self.flip(self.temper.exits_by_itself):
            after_s = self.chance.uniform(0, EXIT_WITHIN_S)
            run = (machine, machine.pid, ExitStatus(code=self.chance.choice((0, 1, 137))))
            current().call_later(after_s, self._exit_later, *run, context=self._outside)
        self._changed(f"runs {machine.spec.machine_id} pid {machine.pid}")

    def end(self, machine: Running, status: ExitStatus) -> None:
        """The machine's process has ended."""
        if not machine.pid:
            return
        machine.pid, machine.unreported = 0, True
        machine.exit = msgspec.structs.replace(status, at_s=WALL_START_S + current().time())
        self._changed(f"ended {machine.spec.machine_id} {status.code} {status.signal}")
        self.exited.set()

    def _exit_later(self, machine: Running, pid: int, status: ExitStatus) -> None:
        if machine.pid == pid:
            self.end(machine, status)

    def power_cut(self) -> None:
        """Every process is gone, and nobody saw how it ended; the disk stays."""
        for machine in self.machines.values():
            machine.pid, machine.unreported = 0, False
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
            await asyncio.sleep(timeout_s)
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

    async def logs(self, machine_id: str, *, tail: int, follow: bool) -> AsyncIterator[LogLine]:
        await self._hardware.work()
        yield LogLine(machine_id=machine_id, at_s=WALL_START_S, text="hello")


class SimulatedVolumes:
    """ports.VolumeStore on one host's disk."""

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware

    async def create(self, volume_id: str, size_gb: int) -> None:
        await self._hardware.work()
        self._hardware.volumes.setdefault(volume_id, Attachment())
        await self._hardware.work()

    async def attach(self, volume_id: str, machine_id: str, epoch: int) -> str:
        await self._hardware.work()
        volume = self._volume(volume_id)
        if epoch < volume.epoch or (epoch == volume.epoch and volume.claimant not in ("", machine_id)):
            raise Refused(f"volume {volume_id} is {volume.claimant}'s claim with epoch {volume.epoch}")
        volume.claimant, volume.epoch, volume.held = machine_id, epoch, True
        await self._hardware.work()
        return f"/volumes/{volume_id}"

    async def detach(self, volume_id: str, machine_id: str, epoch: int) -> None:
        await self._hardware.work()
        volume = self._hardware.volumes.get(volume_id)
        if volume is not None and (volume.claimant, volume.epoch) == (machine_id, epoch):
            volume.held = False
        await self._hardware.work()

    async def destroy(self, volume_id: str) -> None:
        await self._hardware.work()
        volume = self._hardware.volumes.get(volume_id)
        if volume is not None and volume.machine:
            raise Refused(f"volume {volume_id} is attached to {volume.machine}")
        self._hardware.volumes.pop(volume_id, None)
        await self._hardware.work()

    def _volume(self, volume_id: str) -> Attachment:
        volume = self._hardware.volumes.get(volume_id)
        if volume is None:
            raise NotFound(f"volume {volume_id} is not on {self._hardware.host}")
        return volume


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
