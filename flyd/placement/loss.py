"""What is to happen to the machines of lost hosts. Pure; repairs.py carries it out.

A host is lost while its sign of life (keys.alive) is missing. It may well run on, cut off from
etcd; nobody can tell. Rules:

- grace: nothing happens before a host has been silent for LossRule.grace_s. A sign of life vanishes
  LEASE_TTL_S after its last renewal, and that time counts as silence. (A flyd that is stopped
  in an orderly way takes its sign back at once, so its host gets that much less.)
- most hosts: while more than half of the hosts are lost, it is the network or etcd, not the hosts:
  nothing is moved. A host counts for AT_ONCE_S after its grace, and for as long as something of it
  waits to be moved; one that was emptied long ago does not.
- volumes stay: a machine with a volume stays where its data is, and is reported. So does each member
  of a Postgres cluster: the others have what it has, and one of them takes over.
- run once: a machine whose restart policy is `no` is not run a second time; a lost host counts as
  its end, as a reboot does.
- at rest: one that had ended for good, or was stopped, is moved and stays stopped.
- regions: first the machine's own region; then the other regions of its app, in the app's order
  (primary first), because those are where its owner lets it run, and one that answers from farther
  away beats one that does not answer; nowhere else. An app that names no regions has no preference:
  any region will do.
- storms: at most MOVES_PER_LOOK at one look, by host, app and id.

The same id is kept, the claim's epoch grows: the host that comes back ends its copy first
(flyd/machines/fencing.py). Until it sees etcd again, its copy runs beside the new one; no edge and
no name leads there any more. That is the price of promise 7 (design.md), paid only by machines
without volumes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from flyd.model import App, AppKind, Desired, Machine, MachineState, MachineStatus, Value

MOVES_PER_LOOK = 8
AT_ONCE_S = 300.0


class Silence(Value, frozen=True, kw_only=True):
    """A host without its sign of life: since when (monotonic), and at which revision it had joined."""

    since_s: float
    joined_revision: int


class Sight(Value, frozen=True, kw_only=True):
    """All that is decided on."""

    grace_s: float
    alive: tuple[str, ...]
    silent_s: dict[str, float]  # lost hosts, and for how long they have been silent
    machines: tuple[Machine, ...]  # those on lost hosts
    statuses: dict[str, MachineStatus] = {}  # by machine id
    apps: dict[str, App] = {}


class MoveOff(Value, frozen=True, kw_only=True):
    """Place this machine elsewhere, in the first of these regions that has room (None: any)."""

    machine: Machine
    regions: tuple[str | None, ...]
    at_rest: bool = False  # it shall not start there


class Plan(Value, frozen=True, kw_only=True):
    """What to do now, and what to tell."""

    moves: tuple[MoveOff, ...] = ()
    left: dict[str, dict[str, str]] = {}  # host -> machine id -> why it stays
    held: str = ""  # why nothing is moved although it is time
    next_s: float | None = None  # until the next host's grace ends; None: none is waited for


def track(
    before: Mapping[str, Silence], hosts: Mapping[str, int], alive: Collection[str], now_s: float
) -> dict[str, Silence]:
    """The silences as of now. `hosts`: each one's name and the revision at which it last joined.

    A host that joined again meanwhile, unseen, begins anew: a count may be late, never early.
    """
    silences: dict[str, Silence] = {}
    for name in sorted(hosts):
        if name in alive:
            continue
        known = before.get(name)
        if known is None or known.joined_revision != hosts[name]:
            known = Silence(since_s=now_s, joined_revision=hosts[name])
        silences[name] = known
    return silences


def plan(sight: Sight, waiting: Collection[str] = ()) -> Plan:
    """What to do about all lost hosts; `waiting`: machines for which there is no room at the moment."""
    moves: dict[str, list[MoveOff]] = {name: [] for name in sorted(sight.silent_s)}
    left: dict[str, dict[str, str]] = {}
    for machine in sorted(sight.machines, key=lambda m: (m.host, m.app, m.id)):
        if machine.host not in moves or machine.desired is Desired.DESTROYED:
            continue
        app, status = sight.apps.get(machine.app), sight.statuses.get(machine.id)
        reason = why_it_stays(machine, app) or _runs_once(machine)
        if reason:
            left.setdefault(machine.host, {})[machine.id] = reason
        else:
            at_rest = machine.desired is Desired.STOPPED or ended_for_good(status) or _once_each_time(machine)
            move = MoveOff(machine=machine, regions=regions_for(machine, app), at_rest=at_rest)
            moves[machine.host].append(move)
    due = [name for name in sorted(moves) if sight.silent_s[name] >= sight.grace_s]
    patient = [sight.grace_s - s for s in sight.silent_s.values() if s < sight.grace_s]
    wanted = [move for name in due for move in moves[name]]
    held = _most_hosts(sight, moves) if wanted else ""
    return Plan(
        moves=() if held else tuple(m for m in wanted if m.machine.id not in waiting)[:MOVES_PER_LOOK],
        left={name: left[name] for name in due if name in left},
        held=held,
        next_s=min(patient, default=None),
    )


def _most_hosts(sight: Sight, moves: Mapping[str, Sequence[MoveOff]]) -> str:
    """The rule of most hosts: why nothing may be moved, or nothing."""
    lost = [
        name
        for name, silent_s in sorted(sight.silent_s.items())
        if moves[name] or silent_s < sight.grace_s + AT_ONCE_S
    ]
    total = len(sight.alive) + len(lost)
    if 2 * len(lost) <= total:
        return ""
    return (
        f"{len(lost)} of {total} hosts are lost ({', '.join(lost)}): when most are lost at once it is the "
        "network, so nothing is moved until half of them are back"
    )


def why_it_stays(machine: Machine, app: App | None) -> str:
    """Why a machine can not leave its host; empty if it can."""
    if not machine.config.mounts:
        return ""
    volumes = ", ".join(mount.volume or mount.name for mount in machine.config.mounts)
    if app is not None and app.kind is AppKind.POSTGRES:
        return f"a member of Postgres cluster {machine.app}: its data ({volumes}) is there"
    return f"its volume is there ({volumes})"


def _runs_once(machine: Machine) -> str:
    once = machine.desired is Desired.STARTED and machine.config.restart.policy == "no"
    if once and not machine.config.schedule:
        return "runs once (restart policy 'no'): the loss of its host counts as its end"
    return ""


def _once_each_time(machine: Machine) -> bool:
    """Whether it runs no second time, but again when its schedule says so."""
    return machine.config.restart.policy == "no" and machine.config.schedule != ""


def ended_for_good(status: MachineStatus | None) -> bool:
    """Whether its process ended by itself and rests, although its claim says `started`."""
    return (
        status is not None
        and status.state is MachineState.STOPPED
        and bool(status.events)
        and status.events[-1].type == "exit"
    )


def regions_for(machine: Machine, app: App | None) -> tuple[str | None, ...]:
    """Where it may go, best first; None is any region."""
    named = app.regions if app is not None else ()
    if not named:
        return (machine.region, None)
    return (machine.region, *(region for region in named if region != machine.region))
