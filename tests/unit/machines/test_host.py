"""The host loop over a fake etcd, run log and driver: the ordinary life, and crashes everywhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import count

import msgspec
import pytest

from flyd.errors import NotFound, Refused, Unavailable
from flyd.machines.host import HostLoop
from flyd.model import (
    App,
    AppKind,
    Check,
    Desired,
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
    RestartPolicy,
    RunEvent,
    Secrets,
    Service,
    Volume,
    decode,
    encode,
)
from flyd.ports import Delete, Put
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
        self.refuse_start = 0
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

    async def exits(self) -> AsyncIterator[str]:
        while True:
            yield await self.ended.get()

    async def exec(
        self, machine_id: str, command: Sequence[str], timeout_s: float
    ) -> AsyncIterator[ExecOutput]:
        yield ExecOutput(exit_code=0)

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

    async def destroy(self, volume_id: str) -> None:
        self.held.pop(volume_id, None)


class FakeSources:
    def __init__(self) -> None:
        self.fails = 0

    async def ensure(self, digest: str) -> str:
        if self.fails:
            self.fails -= 1
            raise Unavailable("no host has it")
        return f"/src/{digest}"


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
        self.kv = FaultyKV(self.etcd)
        self.probe_ok = True
        self.probes = 0

    async def probe(self, check: Check, address: str) -> tuple[bool, str]:
        self.probes += 1
        return (True, "200 OK") if self.probe_ok else (False, "refused")

    @asynccontextmanager
    async def flyd(self, crasher: Crasher | None = None, away: bool = False) -> AsyncIterator[None]:
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
            clock=LoopClock(),
            entropy=self.entropy,
            probe=self.probe,
        )
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(mirror.keep()), group.create_task(loop.run())]
            yield
            for task in tasks:
                task.cancel()

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


@pytest.fixture
def world() -> World:
    return World()


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
    assert decode(reserved.value, Reservations) == Reservations(
        host="h1", machines={"other": Resources(cpus=1)}, volumes_gb={"v1": 1}, addresses={"other": 3}
    )
    volume = world.etcd.get(keys.volume("web", "v1"))
    assert volume is not None
    assert decode(volume.value, Volume).attached_machine == ""
    assert world.volumes.held["v1"] == ("", 3)
    assert world.driver.specs == {}
    assert world.run_log.records("machines/") == {}
    assert world.run_log.open_runs() == ()


# --------------------------------------------------------------------------- the ordinary life


async def test_a_claim_is_created_and_started_and_said(world: World) -> None:
    world.put(keys.app("web"), App(name="web", regions=("ams", "fra")))
    world.put(
        keys.secrets("web"), Secrets(app="web", values={"DATABASE_URL": "postgres://u@db.internal:5432/x"})
    )
    world.put(keys.app("db"), App(name="db", kind=AppKind.POSTGRES, endpoint_port=6001))
    world.claim(machine())
    async with world.flyd():
        status = await world.until_state(MachineState.STARTED)
        spec = world.driver.specs["m1"]
    assert (status.pid, status.host, status.instance_id) == (100, "h1", "01A")
    assert [event.type for event in status.events] == ["launch", "start"]
    assert spec.command == ("./serve", "--host", "127.10.0.2")
    assert spec.env["DATABASE_URL"] == "postgres://u@127.10.0.1:6001/x"
    assert spec.env["PRIMARY_REGION"] == "ams"
    assert spec.source_path == "/src/sha256:" + "ab" * 32


async def test_stop_start_restart_as_asked(world: World) -> None:
    world.claim(machine())
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
        world.claim(machine(desired=Desired.STOPPED))
        await world.until_state(MachineState.STOPPED)
        world.claim(machine())
        await world.until_state(MachineState.STARTED)
        world.claim(machine(restart_nonce=1))
        await world.until(lambda: (s := world.status()) is not None and s.pid == 102)
        status = await world.until_state(MachineState.STARTED)
        world.claim(machine(restart_nonce=1, cordoned=True))
        await asyncio.sleep(0.02)
    assert [event.type for event in status.events] == ["launch", "start", "stop", "start", "restart"]
    assert len(world.driver.starts) == 3
    assert status.restarts == 0


async def test_created_machines_that_shall_not_start_do_not(world: World) -> None:
    world.claim(machine(desired=Desired.STOPPED))
    async with world.flyd():
        await world.until_state(MachineState.CREATED)
    assert world.driver.starts == []


async def test_destroy_gives_everything_back(world: World) -> None:
    claim = placed_with_volume(world)
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
        assert world.driver.specs["m1"].mounts == (("/vol/v1", "/data"),)
        assert world.volumes.held["v1"] == ("m1", 3)
        world.claim(msgspec.structs.replace(claim, desired=Desired.DESTROYED))
        await world.until(lambda: world.etcd.get(keys.machine("web", "m1")) is None)
        await world.until(lambda: not world.run_log.open_runs())
    assert_freed(world)


async def test_a_claim_that_was_never_seen_here_is_freed(world: World) -> None:
    claim = placed_with_volume(world)
    world.claim(msgspec.structs.replace(claim, desired=Desired.DESTROYED))
    async with world.flyd():
        await world.until(lambda: world.etcd.get(keys.machine("web", "m1")) is None)
        await world.until(lambda: not world.run_log.open_runs())
    assert world.driver.starts == []


@pytest.mark.parametrize("gone", ["deleted", "elsewhere", "newer epoch here"])
async def test_a_machine_that_is_no_longer_ours_is_removed(world: World, gone: str) -> None:
    world.claim(machine())
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
        if gone == "deleted":
            world.delete(keys.machine("web", "m1"))
            await world.until(lambda: not world.driver.seen and world.state() is None)
        elif gone == "elsewhere":
            world.claim(machine(host="h2", epoch=2))
            await world.until(lambda: not world.driver.seen and not world.run_log.records("machines/"))
            assert world.etcd.get(keys.machine("web", "m1")) is not None
        else:
            world.claim(machine(epoch=2))
            await world.until(lambda: len(world.driver.starts) == 2)
            await world.until(lambda: (s := world.status()) is not None and s.epoch == 2)
    assert len(world.driver.starts) == (2 if gone == "newer epoch here" else 1)


async def test_what_nobody_claims_is_left_alone(world: World) -> None:
    stray = Observed(machine_id="stray", instance_id="x", running=True, pid=7)
    world.driver.seen["stray"] = stray
    world.claim(machine())
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
        world.driver.ended.put_nowait("stray")
        await world.until(world.driver.ended.empty)
    assert world.driver.seen["stray"] == stray


# --------------------------------------------------------------------------- exits


async def test_a_crash_is_restarted_by_policy_and_counted(world: World) -> None:
    world.claim(machine())
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
        world.driver.end("m1", ExitStatus(code=1))
        await world.until(lambda: len(world.driver.starts) == 2)
        await world.until(lambda: (s := world.status()) is not None and s.pid == 101)
    status = world.status()
    assert status is not None
    assert [event.type for event in status.events] == ["launch", "start", "exit", "start"]
    assert status.events[2].exit == ExitStatus(code=1)
    assert status.restarts == 1


async def test_the_exit_code_of_a_one_shot_machine_stays_visible(world: World) -> None:
    world.claim(machine(config=MachineConfig(image="host:", cmd=("x",), restart=RestartPolicy(policy="no"))))
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
        world.driver.end("m1", ExitStatus(code=3))
        status = await world.until_state(MachineState.STOPPED)
        assert status.events[-1].exit == ExitStatus(code=3)
    async with world.flyd():  # a new flyd must not start it again
        world.claim(
            machine(config=MachineConfig(image="host:", restart=RestartPolicy(policy="no")), restart_nonce=1)
        )
        await world.until(lambda: len(world.driver.starts) == 2)


async def test_a_start_that_fails_is_tried_again_with_its_reason_shown(world: World) -> None:
    world.driver.refuse_start = 1
    world.claim(machine())
    async with world.flyd():
        status = await world.until_state(MachineState.FAILED)
        assert status.detail == "run: no such program"
        await world.until_state(MachineState.STARTED)


async def test_a_start_that_fails_rests_under_policy_no(world: World) -> None:
    world.driver.refuse_start = 1
    one_shot = MachineConfig(image="host:", cmd=("x",), restart=RestartPolicy(policy="no"))
    world.claim(machine(config=one_shot))
    async with world.flyd():
        await world.until_state(MachineState.FAILED)
        await asyncio.sleep(0.3)
        assert world.driver.starts == []


async def test_a_create_that_fails_is_undone_and_tried_again(world: World) -> None:
    world.sources.fails = 1
    world.claim(machine())
    async with world.flyd():
        status = await world.until_state(MachineState.FAILED)
        assert status.detail == "source: no host has it"
        await world.until_state(MachineState.STARTED)


async def test_a_machine_whose_volume_is_not_given_to_it_says_so(world: World) -> None:
    claim = placed_with_volume(world)
    volume = world.etcd.get(keys.volume("web", "v1"))
    assert volume is not None
    taken = msgspec.structs.replace(decode(volume.value, Volume), attached_machine="m2")
    world.put(keys.volume("web", "v1"), taken)
    world.claim(claim)
    async with world.flyd():
        status = await world.until_state(MachineState.FAILED)
    assert "volume v1 is not given to machine m1" in status.detail
    assert world.volumes.created == []


# --------------------------------------------------------------------------- checks


async def test_checks_decide_health_and_come_back(world: World) -> None:
    world.probe_ok = False
    check = Check(kind="tcp", port=80, interval_s=0.02, grace_period_s=60.0)
    config = MachineConfig(
        image="host:",
        cmd=("x",),
        services=(Service(internal_port=80, checks=(check,)),),
        checks={"own": check},
    )
    world.claim(machine(config=config))
    async with world.flyd():
        status = await world.until_state(MachineState.STARTED)
        assert [c.status for c in status.checks] == ["warning", "warning"]
        assert not status.routable()
        world.probe_ok = True
        await world.until(lambda: (s := world.status()) is not None and s.healthy())
        world.probe_ok = False
        await world.until(
            lambda: (s := world.status()) is not None and all(c.status == "critical" for c in s.checks)
        )
        world.probe_ok = True
        await world.until(lambda: (s := world.status()) is not None and s.healthy())
    revision = world.etcd.revision
    async with world.flyd():  # a new flyd goes on from what was known: never a moment of doubt
        probes = world.probes
        await world.until(lambda: world.probes > probes + 4)
        status = world.status()
        assert status is not None
        assert status.healthy()
    assert world.etcd.revision <= revision + 1


# --------------------------------------------------------------------------- etcd away, flyd gone


async def test_a_new_flyd_adopts_what_runs(world: World) -> None:
    world.claim(machine())
    async with world.flyd():
        before = await world.until_state(MachineState.STARTED)
    async with world.flyd():
        await asyncio.sleep(0.05)
        assert world.status() == before
    assert world.driver.starts == ["m1"]


async def test_without_etcd_restarts_go_on_and_are_told_later(world: World) -> None:
    world.claim(machine())
    async with world.flyd():
        await world.until_state(MachineState.STARTED)
        world.kv.away = True
        world.driver.end("m1", ExitStatus(code=1))
        await world.until(lambda: len(world.driver.starts) == 2)
        world.kv.away = False
        await world.until(lambda: (s := world.status()) is not None and s.restarts == 1)
    world.driver.end("m1", ExitStatus(code=1))
    async with world.flyd(away=True):  # not even a first look at etcd
        await world.until(lambda: len(world.driver.starts) == 3)
        world.kv.away = False
        await world.until(lambda: (s := world.status()) is not None and s.restarts == 2)


async def crash_after(world: World, at: int, act: Callable[[], None], done: Callable[[], bool]) -> bool:
    """Run a flyd that dies after its `at`-th effect; True if it came to the end before."""
    finished = False
    try:
        async with world.flyd(Crasher(at)):
            act()
            await world.until(done)
            finished = True
    except* Crash:
        pass
    return finished and world.driver.crasher.seen < at


MAX_EFFECTS = 60  # more than any operation has


async def create_with_crash(at: int) -> bool:
    world = World()
    placed_with_volume(world)

    def done() -> bool:
        return world.state() is MachineState.STARTED and not world.run_log.open_runs()

    finished = await crash_after(world, at, lambda: None, done)
    async with world.flyd():
        await world.until(done)
        status = world.status()
    assert status is not None
    assert world.driver.starts == ["m1"], f"effect {at}"
    assert world.volumes.created == ["v1"], f"effect {at}"
    assert [event.type for event in status.events] == ["launch", "start"], f"effect {at}"
    return finished


async def end_with_crash(at: int, wish: Desired) -> bool:
    world = World()
    claim = placed_with_volume(world)
    wished = msgspec.structs.replace(claim, desired=wish)
    reached = MachineState.STOPPED if wish is Desired.STOPPED else None

    def done() -> bool:
        return world.state() is reached and not world.run_log.open_runs()

    async with world.flyd():
        await world.until_state(MachineState.STARTED)
    finished = await crash_after(world, at, lambda: world.claim(wished), done)
    async with world.flyd():
        await world.until(done)
    if wish is Desired.DESTROYED:
        assert_freed(world)
    assert world.driver.starts == ["m1"], f"effect {at}"
    return finished


async def restart_with_crash(at: int) -> bool:
    world = World()
    world.claim(machine())

    def done() -> bool:
        status = world.status()
        restarted = status is not None and status.events[-1].type == "restart"
        return restarted and world.state() is MachineState.STARTED and not world.run_log.open_runs()

    async with world.flyd():
        await world.until_state(MachineState.STARTED)
    finished = await crash_after(world, at, lambda: world.claim(machine(restart_nonce=1)), done)
    async with world.flyd():
        await world.until(done)
    assert len(world.driver.starts) == 2, f"effect {at}"
    return finished


@pytest.mark.parametrize("operation", ["create", "stop", "destroy", "restart"])
async def test_every_operation_survives_a_crash_after_every_effect(operation: str) -> None:
    runs: dict[str, Callable[[int], Awaitable[bool]]] = {
        "create": create_with_crash,
        "stop": lambda at: end_with_crash(at, Desired.STOPPED),
        "destroy": lambda at: end_with_crash(at, Desired.DESTROYED),
        "restart": restart_with_crash,
    }
    for at in range(1, MAX_EFFECTS):
        if await runs[operation](at):
            assert at > 5  # the crashes before were real ones
            return
    pytest.fail("every run crashed: the end was never reached")
