"""A flyd's ports after whose effects it may die: each effect is counted by a Crasher."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from flyd.model import ExitStatus, MachineSpec, Observed, RunEvent
from flyd.ports import Driver
from flyd.store.runlog import SqliteRunLog
from tests.support.host_world import Crasher
from volumes.directory import DirectoryVolumes


class DyingDriver:
    """A driver that sees one machine only, and after whose effects its flyd may die."""

    def __init__(self, inner: Driver, crasher: Crasher, machine_id: str, runs: dict[int, None]) -> None:
        self._inner = inner
        self._crasher = crasher
        self._machine_id = machine_id
        self._runs = runs
        self.exec, self.logs, self.session = inner.exec, inner.logs, inner.session
        self.signal, self.processes = inner.signal, inner.processes

    async def create(self, spec: MachineSpec) -> None:
        await self._inner.create(spec)
        self._crasher.effect()

    async def start(self, spec: MachineSpec) -> Observed:
        observed = await self._inner.start(spec)
        self._runs[observed.pid] = None
        self._crasher.effect()
        return observed

    async def stop(self, machine_id: str, signal: str, timeout_s: float) -> ExitStatus | None:
        exit = await self._inner.stop(machine_id, signal, timeout_s)
        self._crasher.effect()
        return exit

    async def destroy(self, machine_id: str) -> None:
        await self._inner.destroy(machine_id)
        self._crasher.effect()

    async def look(self, machine_id: str) -> Observed | None:
        return await self._inner.look(machine_id)

    async def observe(self) -> Mapping[str, Observed]:
        seen = await self.look(self._machine_id)
        return {self._machine_id: seen} if seen is not None else {}

    async def exits(self) -> AsyncIterator[str]:
        async for machine_id in self._inner.exits():
            if machine_id == self._machine_id:
                yield machine_id


class DyingVolumes:
    """Volumes after whose effects a flyd may die."""

    def __init__(self, inner: DirectoryVolumes, crasher: Crasher) -> None:
        self._inner = inner
        self._crasher = crasher

    async def create(self, volume_id: str, size_gb: int) -> None:
        await self._inner.create(volume_id, size_gb)
        self._crasher.effect()

    async def attach(self, volume_id: str, machine_id: str, epoch: int) -> str:
        path = await self._inner.attach(volume_id, machine_id, epoch)
        self._crasher.effect()
        return path

    async def detach(self, volume_id: str, machine_id: str, epoch: int) -> None:
        await self._inner.detach(volume_id, machine_id, epoch)
        self._crasher.effect()


class DyingRunLog(SqliteRunLog):
    """The real log, after whose writes a flyd may die."""

    def __init__(self, path: Path, crasher: Crasher) -> None:
        super().__init__(path)
        self._crasher = crasher

    def append(self, event: RunEvent) -> None:
        super().append(event)
        self._crasher.effect()

    def put_record(self, key: str, value: bytes) -> None:
        super().put_record(key, value)
        self._crasher.effect()

    def delete_record(self, key: str) -> None:
        super().delete_record(key)
        self._crasher.effect()
