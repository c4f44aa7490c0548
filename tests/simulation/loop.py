"""A deterministic event loop: one seed, one history.

Owns: the order of callbacks (chosen from the seed), time (virtual; it jumps to the next
timer only when nothing is ready) and simulated processes (started, paused, crashed).

Invariants:
- Equal seeds give equal histories, in any process and under any PYTHONHASHSEED. So tasks
  and futures hash by their number (TaskGroup keeps tasks in a set), the cyclic garbage
  collector is off during a run, and chance comes from named streams of the seed.
- A crashed process runs not one more instruction: its callbacks and timers are dropped and
  its frames are kept, so that no `finally` tidies up after a power cut.
- Nothing real is reached: threads, sockets, signals and subprocesses are refused.

Does not: know hosts, networks or faults (tests/simulation/network.py, the worlds).
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import heapq
import itertools
import random  # noqa: TID251 - this is where the simulated world's chance comes from
import traceback
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar, cast

from tests.simulation.process import (
    PROCESS,
    Process,
    StableFuture,
    StableHandle,
    StableTask,
    StableTimer,
    close_quietly,
)

T = TypeVar("T")

START_S = 1_000.0
DEFAULT_LIMIT_S = 3_600.0
MAX_STEPS_AT_ONE_TIME = 200_000

Stream = random.Random


class SimulationError(Exception):
    """The simulated program did something that no run may do."""


class Deadlock(SimulationError):
    """Nothing can ever run again, and the main task is not done."""


class Livelock(SimulationError):
    """Callbacks run without end while virtual time stands still."""


class TimeLimit(SimulationError):
    """The run took more virtual seconds than it was given."""


class RealWorld(SimulationError):
    """The program reached for a thread, a socket or a subprocess."""


class ProcessFailed(SimulationError):
    """A simulated process, or a callback in it, raised what nobody handled."""


def _refuse(*_arguments: object, **_options: object) -> NoReturn:
    """Stand in for everything that would leave the simulation."""
    raise RealWorld(
        "the simulated program asked for a thread, a socket, a signal or a subprocess; "
        "give it a fake of that port instead"
    )


class SimulationLoop(asyncio.BaseEventLoop):
    """The loop. Made by `run`; the program finds it with `current()`."""

    def __init__(self, seed: int, limit_s: float = DEFAULT_LIMIT_S) -> None:
        super().__init__()
        self.set_debug(False)
        self.seed = seed
        self.trace: list[str] = []
        self.failures: list[str] = []
        self.world = Process("world", 1)
        self._now = START_S
        self._deadline = START_S + limit_s
        self._order = stream(seed, "order")
        self._numbers = itertools.count(1)
        self._runnable: list[StableHandle | StableTimer] = []
        self._timers: list[tuple[float, int, StableTimer]] = []
        self._processes: dict[str, Process] = {}
        self._incarnations: dict[str, int] = {}
        self._dead: list[Process] = []
        self._steps = 0
        self._steps_at_this_time = 0
        self._over = False
        self.set_exception_handler(self._on_unhandled)

    # ------------------------------------------------------------------ time and order

    def time(self) -> float:
        """Virtual seconds."""
        return self._now

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Any = None) -> StableHandle:
        """Make the callback runnable, in the process of its context."""
        context = contextvars.copy_context() if context is None else context
        handle = StableHandle(callback, args, self, context)
        handle.process = cast(contextvars.Context, context).get(PROCESS, self.world)
        self._make_runnable(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_at(
        self, when: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> StableTimer:
        """Make the callback runnable at that virtual time."""
        context = contextvars.copy_context() if context is None else context
        timer = StableTimer(when, callback, args, self, context)
        timer.process = cast(contextvars.Context, context).get(PROCESS, self.world)
        if timer.process.alive and not self._over:
            heapq.heappush(self._timers, (when, next(self._numbers), timer))
        return timer

    def call_later(
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> StableTimer:
        """Make the callback runnable after so many virtual seconds."""
        return self.call_at(self._now + delay, callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """asyncio's hook; cancelled timers are skipped when they come up."""

    def _make_runnable(self, handle: StableHandle | StableTimer) -> None:
        if not handle.process.alive or self._over:
            return
        if handle.process.paused:
            handle.process.held.append(handle)
        else:
            self._runnable.append(handle)

    def _run_once(self) -> None:
        """asyncio's hook: run one callback, or let time jump."""
        runnable = self._runnable
        if not runnable:
            self._jump()
            return
        chosen = int(self._order.random() * len(runnable))
        runnable[chosen], runnable[-1] = runnable[-1], runnable[chosen]
        handle = runnable.pop()
        if handle.cancelled():
            return
        if handle.process.paused:
            handle.process.held.append(handle)
            return
        self._steps += 1
        self._steps_at_this_time += 1
        if self._steps_at_this_time > MAX_STEPS_AT_ONE_TIME:
            raise Livelock(f"{MAX_STEPS_AT_ONE_TIME} callbacks at {self._now:.3f} s, last: {handle!r}")
        handle.run()

    def _jump(self) -> None:
        """Let time jump to the next timer; whatever is due then becomes runnable together."""
        timers = self._timers
        while timers and (timers[0][2].cancelled() or not timers[0][2].process.alive):
            heapq.heappop(timers)
        if not timers:
            raise Deadlock("no callback and no timer is left; waiting:\n" + self.waiting())
        if timers[0][0] > self._deadline:
            raise TimeLimit(f"not done after {self._deadline - START_S:.0f} s; waiting:\n" + self.waiting())
        if timers[0][0] > self._now:
            self._now = timers[0][0]
            self._steps_at_this_time = 0
        while timers and timers[0][0] <= self._now:
            timer = heapq.heappop(timers)[2]
            if not timer.cancelled():
                self._make_runnable(timer)

    def create_future(self) -> StableFuture[Any]:
        """A future with a stable hash."""
        return StableFuture(next(self._numbers), self)

    def create_task(self, coro: Any, *, name: object = None, context: Any = None) -> StableTask[Any]:
        """A task with a stable hash and name, held by the process of its context."""
        number = next(self._numbers)
        context = contextvars.copy_context() if context is None else context
        task = StableTask[Any](number, coro, loop=self, name=str(name or f"t{number}"), context=context)
        cast(contextvars.Context, context).get(PROCESS, self.world).adopt(task)
        return task

    # ------------------------------------------------------------------ processes

    def spawn(self, name: str, main: Coroutine[Any, Any, Any]) -> Process:
        """Start a process; its tasks, callbacks and timers are its own until it crashes.

        That `main` raises fails the run; that it returns is a normal exit.
        """
        if name in self._processes and self._processes[name].alive:
            main.close()
            raise SimulationError(f"process {name} runs already")
        incarnation = self._incarnations[name] = self._incarnations.get(name, 0) + 1
        process = self._processes[name] = Process(name, incarnation)
        context = contextvars.Context()
        context.run(PROCESS.set, process)
        self.note(f"start {process}")
        context.run(self.create_task, self._run_process(process, main), name=name, context=context)
        return process

    async def _run_process(self, process: Process, main: Coroutine[Any, Any, Any]) -> None:
        try:
            await main
        except Exception as error:  # noqa: BLE001 - whatever it is, the run has found it
            self.fail(f"process {process} raised {error!r}", error)
        self.note(f"exit {process}")
        self._bury(process)

    def crash(self, name: str) -> bool:
        """Stop the process this instant; says whether it ran."""
        process = self._processes.get(name)
        if process is None or not process.alive:
            return False
        self._bury(process)
        self.note(f"crash {process}")
        return True

    def _bury(self, process: Process) -> None:
        process.alive = False
        process.held.clear()
        self._runnable = [h for h in self._runnable if h.process is not process]
        self._dead.append(process)

    def pause(self, name: str) -> bool:
        """Freeze the process, as SIGSTOP does; says whether it ran."""
        process = self._processes.get(name)
        if process is None or not process.alive or process.paused:
            return False
        process.paused = True
        self.note(f"pause {process}")
        return True

    def resume(self, name: str) -> bool:
        """Let a frozen process go on; timers that were due meanwhile fire now."""
        process = self._processes.get(name)
        if process is None or not process.alive or not process.paused:
            return False
        process.paused = False
        self._runnable.extend(process.held)
        process.held.clear()
        self.note(f"resume {process}")
        return True

    def alive(self, name: str) -> bool:
        """Whether the process runs (a frozen one does)."""
        process = self._processes.get(name)
        return process is not None and process.alive

    def runs(self, name: str) -> bool:
        """Whether the process is alive and not frozen."""
        process = self._processes.get(name)
        return process is not None and process.alive and not process.paused

    def world_context(self) -> contextvars.Context:
        """A context outside of every process: what runs in it survives any crash."""
        context = contextvars.Context()
        context.run(PROCESS.set, self.world)
        return context

    # ------------------------------------------------------------------ what happened

    def note(self, text: str) -> None:
        """Add a line to the trace."""
        self.trace.append(f"{self._now - START_S:12.6f} {PROCESS.get(self.world)} {text}")

    def fail(self, text: str, error: BaseException | None = None) -> None:
        """Record a failure of the run; `run` raises the first one when the run is over."""
        self.note(f"FAILED {text}")
        self.failures.append(f"at {self._now - START_S:.3f} s: {text}")
        if error is not None:
            self.failures.append("".join(traceback.format_exception(error)[-12:]))
        self.stop()

    def _on_unhandled(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not self._over:
            error = context.get("exception")
            # asyncio's message shows objects by their address, which differs in each process
            self.fail(f"unhandled: {error!r}" if error else f"unhandled: {context.get('message')}", error)

    def waiting(self) -> str:
        """The tasks that are not done, oldest first, and where each of them stands."""
        lines: list[str] = []
        for process in (self.world, *self._processes.values()):
            for task in process.tasks:
                if process.alive and not task.done():
                    frames = task.get_stack(limit=1)
                    code = frames[0].f_code if frames else None
                    place = f"{code.co_qualname}:{frames[0].f_lineno}" if code else "?"
                    lines.append(f"  {process} {task.get_name()} in {place}")
        return "\n".join(lines)

    def signature(self) -> str:
        """What two runs of one seed must agree on, beyond the trace."""
        return f"{self._steps} steps, {self._now:.9f} s, next {self._order.random():.12f}"

    # ------------------------------------------------------------------ the end

    def dispose(self) -> None:
        """After the run: free every frame that is left, quietly."""
        self._over = True
        processes = (self.world, *self._dead, *self._processes.values())
        for process in processes:
            process.alive = False
        for process in processes:
            for task in process.tasks:
                close_quietly(task)
            process.tasks.clear()
            process.held.clear()
        self._runnable.clear()
        self._timers.clear()
        self.close()

    def _asyncgen_finalizer_hook(self, agen: Any) -> None:
        """asyncio's hook: a generator that was dropped half-way is closed by a task of its dropper."""
        if not self._over and PROCESS.get(self.world).alive:
            self.create_task(agen.aclose(), name="aclose")


REFUSED = """
    run_in_executor getaddrinfo getnameinfo create_connection create_datagram_endpoint
    create_server create_unix_connection create_unix_server connect_accepted_socket
    connect_read_pipe connect_write_pipe subprocess_exec subprocess_shell add_reader add_writer
    add_signal_handler sock_connect sock_accept sock_recv sock_sendall
"""
for _name in REFUSED.split():
    setattr(SimulationLoop, _name, _refuse)


def stream(seed: int, name: str) -> Stream:
    """A source of chance of its own, so that a new draw in one place shifts no other."""
    return random.Random(f"{seed}/{name}")


def current() -> SimulationLoop:
    """The running simulation."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SimulationLoop)
    return loop


class Finished:
    """A run that ended: its result, its trace and its signature."""

    def __init__(self, result: Any, loop: SimulationLoop) -> None:
        self.result = result
        self.trace = tuple(loop.trace)
        self.failures = tuple(loop.failures)
        self.signature = loop.signature()
        self.simulated_s = loop.time() - START_S


def run_to_end(
    seed: int, main: Callable[[], Coroutine[Any, Any, Any]], limit_s: float = DEFAULT_LIMIT_S
) -> Finished:
    """Run `main` in a new simulation; failures are in the answer, not raised."""
    loop = SimulationLoop(seed, limit_s)
    collecting = gc.isenabled()
    gc.disable()  # a collection would finalize generators at a time that depends on the past
    result: Any = None
    try:
        result = loop.run_until_complete(main())
    except SimulationError as error:
        loop.fail(f"{type(error).__name__}: {error}")
    except Exception as error:  # noqa: BLE001 - whatever it is, the run has found it
        if not loop.failures:  # else it is asyncio's word for a loop that a failure stopped
            loop.fail(f"{type(error).__name__}: {error}", error)
    finally:
        finished = Finished(result, loop)
        loop.dispose()
        if collecting:
            gc.enable()
    return finished


def run(seed: int, main: Callable[[], Coroutine[Any, Any, T]], limit_s: float = DEFAULT_LIMIT_S) -> T:
    """Run `main` in a new simulation and answer its result; any failure raises."""
    finished = run_to_end(seed, main, limit_s)
    if finished.failures:
        raise ProcessFailed("\n".join(finished.failures))
    return cast(T, finished.result)
