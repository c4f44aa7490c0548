"""The process driver: a machine is a process group with a directory of its own.

Owns the machine directories under one root (flyd/drivers/process/directory.py) and starts one shim for
each running machine (flyd/drivers/process/shim.py), which outlives this object and flyd itself. Built
inside the running loop by flyd/daemon.py; a new driver over the same root adopts what runs.

Invariants: at most one run of a machine at a time (the shim's lock); an ended run has left no
process behind before the next one starts; `stop` answers only when nothing of the run is left.
All that is slow or fsyncs happens in threads; ends are seen through pidfds, without polling.

What it does not do: limit CPU, memory or disk (`spec.guest` is not enforced), isolate file system
or network, tell an out-of-memory kill from another SIGKILL, or decide whether to restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal as signals
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import msgspec
import structlog

from flyd.drivers.locks import Locks
from flyd.drivers.process import proc, shim
from flyd.drivers.process.directory import MachineDirectory, RunRecord, check_spec, identity_of
from flyd.drivers.process.exec import Place, run_command
from flyd.drivers.process.log import read_lines
from flyd.drivers.process.session import run_session
from flyd.drivers.processes import descendants, look_at
from flyd.errors import Conflict, InvalidInput, NotFound, Refused, Unavailable
from flyd.model import OWN_IMAGE, ExecOutput, ExitStatus, LogLine, MachineSpec, Observed
from flyd.model.machine import Process
from flyd.ports import Clock, SessionClient

log = structlog.get_logger(__name__)

LOG_MAX_BYTES = 8 * 1024 * 1024  # each of a machine's two log files
START_TIMEOUT_S = 10.0  # until a new shim answers
START_RETRY_S = 0.02  # while the last run's shim is still on its way out
KILL_TIMEOUT_S = 5.0  # from SIGKILL to the shim's end, before the shim is killed too

_MACHINE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


class _Watch:
    """One running machine, from its start (or adoption) to its end."""

    def __init__(self, run: RunRecord, pidfd: int) -> None:
        self.run = run
        self.pidfd = pidfd
        self.ended = asyncio.Event()


class ProcessDriver:
    """ports.Driver with processes of this host."""

    def __init__(
        self, root: Path, clock: Clock, base_env: Mapping[str, str], own_env: Mapping[str, str] | None = None
    ) -> None:
        self._root = root.absolute()
        self._clock = clock
        self._base_env = dict(base_env)
        self._own_env = dict(own_env or {})  # for flyd's own programs alone
        self._loop = asyncio.get_running_loop()
        self._watches: dict[str, _Watch] = {}
        self._locks = Locks()
        self._exited: asyncio.Queue[str] = asyncio.Queue()
        self._root.mkdir(mode=0o711, parents=True, exist_ok=True)
        for path in sorted(self._root.iterdir()):
            if path.name.startswith("."):
                MachineDirectory(path).remove(path)  # a destroy that was interrupted
            elif (run := MachineDirectory(path).newest_run()) is not None:
                self._adopt(path.name, run)

    def close(self) -> None:
        """Forget the machines (they run on); the loop holds nothing of this driver any more."""
        for watch in self._watches.values():
            self._loop.remove_reader(watch.pidfd)
            os.close(watch.pidfd)
        self._watches.clear()

    # ------------------------------------------------------------------- the port

    async def create(self, spec: MachineSpec) -> None:
        """Make the machine's directory with its own copy of the source tree; start nothing."""
        directory = self._directory(spec.machine_id)
        check_spec(spec)
        async with self._locks.of(spec.machine_id):
            if not self._runs(spec, await self._watch_of(directory)):
                await asyncio.to_thread(directory.prepare, spec)

    async def start(self, spec: MachineSpec) -> Observed:
        """Start the machine; answers when its command runs or could not be run (exit 126, 127)."""
        directory = self._directory(spec.machine_id)
        check_spec(spec)
        async with self._locks.of(spec.machine_id):
            if not self._runs(spec, await self._watch_of(directory)):
                await asyncio.to_thread(self._prepare_start, directory, spec)
                await self._spawn(directory, spec)
            observed = directory.observe()
        if observed is None:
            raise Unavailable(f"machine {spec.machine_id} vanished from {directory.path} while it started")
        return observed

    async def stop(self, machine_id: str, signal: str, timeout_s: float) -> ExitStatus | None:
        """Signal the group, wait, SIGKILL; answers when nothing of the run is left."""
        directory = self._directory(machine_id)
        number = _signal_number(signal)
        async with self._locks.of(machine_id):
            watch = await self._watch_of(directory)
            if watch is None:
                return None
            await asyncio.to_thread(directory.mark_stop, watch.run)
            await self._end(watch, number, timeout_s)
            await asyncio.to_thread(proc.kill_leftovers, directory.path, watch.run.output)
            return directory.exit_of(watch.run)

    async def destroy(self, machine_id: str) -> None:
        """Kill what runs and remove the directory; absent is no error."""
        directory = self._directory(machine_id)
        async with self._locks.of(machine_id):
            watch = await self._watch_of(directory)
            if watch is not None:
                await asyncio.to_thread(directory.mark_stop, watch.run)
                await self._end(watch, signals.SIGKILL, 0.0)
            await asyncio.to_thread(self._remove, directory)

    async def observe(self) -> Mapping[str, Observed]:
        """Every created machine, from its files and the kernel."""
        found: dict[str, Observed] = {}
        for path in sorted(self._root.iterdir()):
            if _MACHINE_ID.fullmatch(path.name) and (observed := MachineDirectory(path).observe()):
                found[path.name] = observed
        return found

    async def look(self, machine_id: str) -> Observed | None:
        """One machine, from its files and the kernel."""
        return self._directory(machine_id).observe()

    async def signal(self, machine_id: str, signal: str) -> None:
        """Signal the main process alone; not the group, as `stop` does."""
        number = _signal_number(signal)
        watch = await self._watch_of(self._directory(machine_id))
        if watch is None:
            raise _not_running(machine_id)
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(watch.run.pid, number)

    async def processes(self, machine_id: str) -> tuple[Process, ...]:
        """All that the machine's shim watches over."""
        watch = await self._watch_of(self._directory(machine_id))
        if watch is None:
            return ()
        return await asyncio.to_thread(lambda: look_at(descendants(watch.run.shim)))

    async def exits(self) -> AsyncIterator[str]:
        """One id for each run that ended since this driver was built; for one consumer."""
        while True:
            yield await self._exited.get()

    async def exec(
        self, machine_id: str, command: Sequence[str], timeout_s: float
    ) -> AsyncIterator[ExecOutput]:
        """Run a command beside the machine: same directory, environment and user; ends with it."""
        place = await self._place(machine_id, command)
        async for output in run_command(command, place, timeout_s):
            yield output

    async def session(self, machine_id: str, command: Sequence[str], client: SessionClient) -> int:
        """Run a command beside the machine, as `exec` does, with its input and perhaps a terminal."""
        place = await self._place(machine_id, command)
        return await run_session(command, place, client)

    async def logs(self, machine_id: str, *, tail: int, follow: bool) -> AsyncIterator[LogLine]:
        """The machine's output of all its runs, as far back as the two log files reach."""
        directory = self._directory(machine_id)
        if directory.created() is None:
            raise NotFound(f"no machine {machine_id} on this host", hint="`fly machine list` names them")
        async for line in read_lines(machine_id, directory.log, tail, follow):
            yield line

    async def _place(self, machine_id: str, command: Sequence[str]) -> Place:
        """Where a command runs beside a running machine."""
        directory = self._directory(machine_id)
        created = directory.created()
        if created is None:
            raise NotFound(f"no machine {machine_id} on this host", hint="`fly machine list` names them")
        if await self._watch_of(directory) is None:
            raise _not_running(machine_id)
        if not command:
            raise InvalidInput("the command is empty")
        environment = self._environment(directory, created.spec)
        return Place(directory.work, environment, identity_of(created.spec.user))

    # ------------------------------------------------------------------- starting

    def _runs(self, spec: MachineSpec, watch: _Watch | None) -> bool:
        """Whether this very instance runs; another instance of the machine must be stopped first."""
        if watch is None:
            return False
        if watch.run.instance_id != spec.instance_id:
            raise Conflict(
                f"machine {spec.machine_id} still runs instance {watch.run.instance_id}, "
                f"so instance {spec.instance_id} cannot take its place",
                hint="stop the machine first",
            )
        return True

    def _prepare_start(self, directory: MachineDirectory, spec: MachineSpec) -> None:
        run = self._kill_leftovers(directory)
        if run is not None and not proc.wait_reaped(run.pid, run.pid_start):
            log.warning("machine.not_reaped", machine=spec.machine_id, pid=run.pid)
        directory.prepare(spec)

    async def _spawn(self, directory: MachineDirectory, spec: MachineSpec) -> None:
        """Run shims until one starts the machine, or one from before flyd's restart has done so."""
        request = msgspec.json.encode(
            {
                "command": spec.command,
                "env": self._environment(directory, spec),
                "identity": identity_of(spec.user),
                "instance_id": spec.instance_id,
                "boot_id": proc.boot_id(),
                "log_max_bytes": LOG_MAX_BYTES,
            }
        )
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while (code := await self._run_shim(directory, request)) == shim.ALREADY_RUNS:
                    if self._runs(spec, await self._watch_of(directory)):
                        return
        except TimeoutError:
            raise _silent(directory) from None
        run = directory.newest_run()
        if code != shim.STARTED or run is None:
            raise Unavailable(
                f"the supervisor of machine {spec.machine_id} ended with code {code} before it started",
                hint=f"see {directory.log.parent}/shim.err",
            )
        if not self._adopt(spec.machine_id, run):
            self._exited.put_nowait(spec.machine_id)

    async def _run_shim(self, directory: MachineDirectory, request: bytes) -> int:
        environment = {k: v for k, v in self._base_env.items() if k == "FLYD_HOST"}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", shim.__file__, str(directory.path)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env=environment,
            cwd="/",
        )
        try:
            await process.communicate(request)
        finally:
            if process.returncode is None:  # cancelled: nothing may start behind our back
                process.kill()
        return await process.wait()

    def _environment(self, directory: MachineDirectory, spec: MachineSpec) -> dict[str, str]:
        marks = {proc.MARK: str(directory.path)}
        if host := self._base_env.get("FLYD_HOST"):
            marks["FLYD_HOST"] = host
        own = self._own_env if spec.image == OWN_IMAGE else {}
        return {**self._base_env, "HOME": str(directory.work), **spec.env, **own, **marks}

    # ------------------------------------------------------------------- ending

    async def _watch_of(self, directory: MachineDirectory) -> _Watch | None:
        """The machine's run, if one is under way; waits for a shim that is just starting or leaving.

        One that this driver does not watch yet is left from a `start` that was cancelled.
        """
        machine_id = directory.path.name
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while True:
                    watch = self._watches.get(machine_id)
                    if watch is not None and directory.exit_of(watch.run) is None:
                        return watch
                    if watch is None:
                        run = directory.newest_run()
                        if run is not None and self._adopt(machine_id, run):
                            continue
                        with directory.lock() as free:
                            if free:
                                return None
                    await asyncio.sleep(START_RETRY_S)
        except TimeoutError:
            raise _silent(directory) from None

    def _adopt(self, machine_id: str, run: RunRecord) -> bool:
        """Watch a run until it ends; False if it already has (then its exit is on disk)."""
        directory = self._directory(machine_id)
        if directory.exit_of(run) is None and run.boot_id == proc.boot_id():
            pidfd = proc.open_process(run.shim, run.shim_start)
            if pidfd is not None:
                watch = self._watches[machine_id] = _Watch(run, pidfd)
                self._loop.add_reader(pidfd, self._ended, machine_id, watch)
                return True
        self._settle(directory, run)
        return False

    def _ended(self, machine_id: str, watch: _Watch) -> None:
        """The run's shim is gone."""
        self._loop.remove_reader(watch.pidfd)
        os.close(watch.pidfd)
        if self._watches.get(machine_id) is watch:
            del self._watches[machine_id]
        try:
            self._settle(self._directory(machine_id), watch.run)
        finally:
            watch.ended.set()
            self._exited.put_nowait(machine_id)

    def _settle(self, directory: MachineDirectory, run: RunRecord) -> None:
        """A shim that was killed, or lost with the host's power, could not say how its run ended."""
        if directory.exit_of(run) is not None:
            return
        with directory.lock() as held:
            if held and directory.newest_run() == run and directory.exit_of(run) is None:
                if run.boot_id == proc.boot_id():
                    killed = proc.kill_leftovers(directory.path, run.output)
                    log.warning("machine.shim_lost", machine=directory.path.name, leftovers=killed)
                status = ExitStatus(signal=int(signals.SIGKILL), at_s=self._clock.wall_s())
                directory.write_exit(run, status)

    async def _end(self, watch: _Watch, number: signals.Signals, timeout_s: float) -> None:
        """Signal the group; past the timeout SIGKILL it, and past KILL_TIMEOUT_S its shim."""
        for next_number, wait_s in ((number, timeout_s), (signals.SIGKILL, KILL_TIMEOUT_S)):
            _signal_group(watch, next_number)
            try:
                async with asyncio.timeout(wait_s):
                    await watch.ended.wait()
                return
            except TimeoutError:
                continue
        signals.pidfd_send_signal(watch.pidfd, signals.SIGKILL)  # frozen, or stuck on a dead disk
        async with asyncio.timeout(KILL_TIMEOUT_S):
            await watch.ended.wait()

    def _remove(self, directory: MachineDirectory) -> None:
        self._kill_leftovers(directory)
        with directory.lock() as held:
            if not held:
                raise _silent(directory)
            directory.remove(self._root / f".gone-{directory.path.name}")

    def _kill_leftovers(self, directory: MachineDirectory) -> RunRecord | None:
        """Whatever an ended run left; answers that run if it was of this boot."""
        run = directory.newest_run()
        if run is not None and run.boot_id != proc.boot_id():
            run = None
        proc.kill_leftovers(directory.path, run.output if run else "")
        return run

    def _directory(self, machine_id: str) -> MachineDirectory:
        if not _MACHINE_ID.fullmatch(machine_id):
            raise InvalidInput(f"{machine_id!r} is no machine id")
        return MachineDirectory(self._root / machine_id)


def _signal_group(watch: _Watch, number: signals.Signals) -> None:
    """The main process is not reaped while its shim lives, so its group id is its own."""
    if watch.ended.is_set():
        return
    with contextlib.suppress(ProcessLookupError):  # it is ending: the shim's pidfd will say so
        os.killpg(watch.run.pid, number)


def _not_running(machine_id: str) -> Refused:
    return Refused(f"machine {machine_id} is not running", hint=f"`fly machine start {machine_id}`")


def _silent(directory: MachineDirectory) -> Unavailable:
    return Unavailable(
        f"the supervisor of machine {directory.path.name} did not answer within {START_TIMEOUT_S:g} s",
        hint=f"see {directory.log.parent}/shim.err, and whether the disk is full or stuck",
    )


def _signal_number(name: str) -> signals.Signals:
    try:
        return signals.Signals[name]
    except KeyError:
        raise InvalidInput(
            f"there is no signal {name!r}", hint="use a name such as SIGINT or SIGTERM"
        ) from None
