"""A pure world for roll-outs: machines do at once what their behaviour says they do."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from flyd.deploy import moves, plan, rollout
from flyd.deploy.appconfig import AppConfig, DeployPolicy, ProcessGroup
from flyd.deploy.appconfig.expansion import RELEASE_COMMAND_GROUP
from flyd.deploy.deployer import PLACE_AGAIN_S
from flyd.deploy.plan import StepName
from flyd.deploy.releases import DeployRun, Phase, Release, RunState
from flyd.machines.leases import MachineLease
from flyd.model import (
    Check,
    CheckStatus,
    Desired,
    ExitStatus,
    Machine,
    MachineConfig,
    MachineEvent,
    MachineState,
    MachineStatus,
    Mount,
    Service,
)
from flyd.placement.scheduler import Order

CHECK = Check(kind="tcp", port=8080)
WEB = ProcessGroup(command=("serve",), services=(Service(internal_port=8080, checks=(CHECK,)),))
WORKER = ProcessGroup(command=("work",))
STATEFUL = msgspec.structs.replace(WEB, mounts=(Mount(path="/data", name="data"),))

Behaviour = Callable[[Machine], str]
"""ok, sick (a check fails), loops, exits, silent (the host says nothing), broken, code-1 (a command)."""


def make_config(**groups: ProcessGroup) -> AppConfig:
    return AppConfig(app="chat", groups=groups or {"app": WEB}, deploy=DeployPolicy(wait_timeout_s=60.0))


def with_command(config: AppConfig) -> AppConfig:
    policy = msgspec.structs.replace(config.deploy, release_command=("migrate",))
    return msgspec.structs.replace(config, deploy=policy)


def status_of(machine: Machine, behaviour: str) -> MachineStatus | None:
    """What the machine's host says of it once all has settled."""
    if behaviour == "silent":
        return None
    said = MachineStatus(
        id=machine.id,
        app=machine.app,
        host=machine.host,
        instance_id=machine.instance_id,
        epoch=machine.epoch,
        state=MachineState.STARTED,
        checks=_checks(machine.config, behaviour),
    )
    code = 0 if behaviour == "ok" else 1
    ended = MachineEvent(type="exit", status="stopped", at_s=1.0, exit=ExitStatus(code=code))
    failed = MachineEvent(type="create", status="failed", at_s=1.0, detail="no such file")
    if behaviour == "broken":
        return msgspec.structs.replace(said, state=MachineState.FAILED, checks=(), events=(failed,) * 3)
    if machine.config.process_group == RELEASE_COMMAND_GROUP or behaviour == "exits":
        return msgspec.structs.replace(said, state=MachineState.STOPPED, checks=(), events=(ended,))
    if behaviour == "loops":
        return msgspec.structs.replace(said, state=MachineState.RESTARTING, restarts=3, events=(ended,))
    return said


def _checks(config: MachineConfig, behaviour: str) -> tuple[CheckStatus, ...]:
    named = [*config.checks, *(f"service-{s.internal_port}" for s in config.services for _ in s.checks)]
    if behaviour == "sick":
        return tuple(CheckStatus(name=n, status="critical", output="connection refused") for n in named)
    return tuple(CheckStatus(name=n, status="passing") for n in named)


class PureWorld:
    """Walks a run as the deployer would; time passes only while the run waits."""

    def __init__(self, behaviour: Behaviour | None = None, full: tuple[str, ...] = ()) -> None:
        self.behaviour: Behaviour = behaviour or (lambda _machine: "ok")
        self.full = full  # regions without room
        self.room: dict[str, int] = {}  # regions with room for so many machines only
        self.machines: dict[str, Machine] = {}
        self.before: dict[StepName, Callable[[], object]] = {}  # happens once, before that step is judged
        self.alive: tuple[str, ...] = ("ams-1", "iad-1", "sin-1")
        self.comes_back: list[tuple[str, ...]] = []  # the living hosts after each further wait
        self.leases: dict[str, MachineLease] = {}
        self.history: list[str] = []  # what was done to machines, in order
        self.twice = False  # do every effect twice, as a crash before the record makes it
        self.overlap = True  # whether two running machines never shared a volume
        self._clock_s = 100.0

    def deploy(
        self,
        config: AppConfig,
        version: int,
        regions: tuple[str, ...] = ("ams", "iad"),
        counts: dict[str, dict[str, int]] | None = None,
    ) -> DeployRun:
        """Walk a whole run."""
        release = Release(version=version, app="chat", image=f"image:{version}", config=config)
        run = DeployRun(id=f"run{version}", app="chat", version=version, regions=regions, counts=counts or {})
        waited_s = 0.0
        for _ in range(1000):
            step = plan.current_step(run, release)
            if step is not None:
                self.before.pop(step.name, lambda: None)()
            move = rollout.next_step(run, release, self._world(waited_s))
            if isinstance(move, moves.Wait):
                waited_s += move.look_again_s
                self._clock_s += move.look_again_s
                self.alive = self.comes_back.pop(0) if self.comes_back else self.alive
                continue
            if isinstance(move, moves.Place) and not self._room(move) and waited_s < move.waits_s(()):
                waited_s += PLACE_AGAIN_S
                self._clock_s += PLACE_AGAIN_S
                continue
            if isinstance(move, moves.Finish):
                return msgspec.structs.replace(run, state=move.state, phase=Phase.ENDED)
            if self.twice:
                self._apply(run, move)
            run, waited_s = self._apply(run, move), 0.0
        raise AssertionError(f"the run does not end: {run}")

    def of_release(self, version: int) -> list[Machine]:
        """The machines of one release."""
        return [m for m in self.machines.values() if m.release == version]

    def running(self) -> dict[str, list[str]]:
        """By region: the releases of the machines that are there and routed to."""
        there = [m for m in self.machines.values() if m.desired is Desired.STARTED and not m.cordoned]
        regions = sorted({m.region for m in there})
        return {
            r: sorted(f"{m.config.process_group}@{m.release}" for m in there if m.region == r)
            for r in regions
        }

    def _world(self, waited_s: float) -> moves.World:
        """The world settled: what is to be destroyed on a living host is gone and freed."""
        gone = [
            m.id for m in self.machines.values() if m.desired is Desired.DESTROYED and m.host in self.alive
        ]
        for machine_id in gone:
            if self.behaviour(self.machines[machine_id]) != "silent":
                del self.machines[machine_id]
        said = {m.id: status_of(m, self.behaviour(m)) for m in self.machines.values()}
        return moves.World(
            machines=dict(self.machines),
            statuses={k: v for k, v in said.items() if v is not None},
            alive=self.alive,
            leases=self.leases,
            waited_s=waited_s,
        )

    def _apply(self, run: DeployRun, move: moves.Move) -> DeployRun:
        self._clock_s += 0.01
        steps = move.steps if isinstance(move, moves.Advance) else 1
        forward = msgspec.structs.replace(run, done=run.done + steps)
        match move:
            case moves.Plan():
                return msgspec.structs.replace(run, phase=Phase.ROLLING, slots=move.slots, done=0)
            case moves.Undo():
                return self._turned(run, move.error)
            case moves.Place():
                order = self._room(move)
                if order is not None:
                    self._place(order)
                elif run.phase is Phase.ROLLING:
                    return self._turned(run, f"no host can take it in {move.orders[0].region}")
                return forward
            case moves.Cordon():
                machine = self.machines[move.machine_id]
                changed = msgspec.structs.replace(machine, cordoned=move.cordoned)
                if changed != machine:
                    self._note("cordon" if move.cordoned else "uncordon", machine)
                self.machines[move.machine_id] = changed
                return forward
            case moves.Destroy():
                machine = self.machines[move.machine_id]
                if machine.desired is not Desired.DESTROYED:
                    self._note("destroy", machine)
                self.machines[move.machine_id] = msgspec.structs.replace(machine, desired=Desired.DESTROYED)
                return forward
            case _:
                return forward

    def _room(self, wanted: moves.Place) -> Order | None:
        """The first of the orders that finds room, or whose machine is there already."""
        if wanted.orders[0].machine_id in self.machines:
            return wanted.orders[0]
        return next((order for order in wanted.orders if order.region not in self._no_room()), None)

    def _no_room(self) -> tuple[str, ...]:
        there = [m.region for m in self.machines.values()]
        return (*self.full, *(region for region, most in self.room.items() if there.count(region) >= most))

    def _turned(self, run: DeployRun, error: str) -> DeployRun:
        return msgspec.structs.replace(run, phase=Phase.UNDOING, reached=run.done + 1, done=0, error=error)

    def _place(self, order: Order) -> None:
        if order.machine_id in self.machines:
            return
        mounts = tuple(
            msgspec.structs.replace(m, volume=m.volume or f"vol_{order.region}") for m in order.config.mounts
        )
        held = [x.volume for m in self.machines.values() for x in m.config.mounts]
        self.overlap = self.overlap and not any(m.volume in held for m in mounts)
        machine = Machine(
            id=order.machine_id,
            app=order.app,
            name=order.name or order.machine_id,
            region=order.region or "",
            host=f"{order.region}-1",
            instance_id=f"{order.machine_id}-instance",
            config=msgspec.structs.replace(order.config, mounts=mounts),
            private_ip="127.11.0.2",
            release=order.release,
            desired=order.desired,
            cordoned=order.cordoned,
            created_at_s=self._clock_s,
        )
        self.machines[machine.id] = machine
        self._note("place", machine)

    def _note(self, what: str, machine: Machine) -> None:
        group = machine.config.process_group
        self.history.append(f"{what} {machine.region} {group}@{machine.release}")


def ended_well(run: DeployRun) -> bool:
    return run.state is RunState.COMPLETE and not run.error
