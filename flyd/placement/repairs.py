"""The elected repairer: brings machines off lost hosts, and off hosts that are being drained.

Runs inside a leadership scope (store/leader.py) and ends with it. Invariants: every
write carries the leader's guard, so a deposed repairer changes nothing; a move also compares that
the host it leaves has still not given a sign of life since (moves.py); a drain's record says what is
begun before it is. An old view therefore costs an attempt, never a wrong move; and who is cut off from
etcd soon leads no more.

Decides nothing: loss.py and drain.py do. How long a host has been silent is counted by every flyd
(`watch_silences`), so that a new leader goes on counting where the last one stopped.
Made by flyd/daemon.py, and by the simulator's hosts.
"""

from __future__ import annotations

import asyncio

import msgspec
import structlog

from flyd.errors import Conflict, Unavailable, Unplaceable
from flyd.hosts.membership import LEASE_TTL_S
from flyd.model import App, Event, Host, Machine, MachineStatus, encode
from flyd.model.cluster import Loss, LossRule
from flyd.placement import loss
from flyd.placement.drains import Drains, wait_caught_up, wait_change
from flyd.placement.loss import MoveOff, Plan, Sight, Silence
from flyd.placement.moves import move
from flyd.placement.placer import Placer
from flyd.ports import KV, Clock, Delete, Entropy, Put, Unchanged
from flyd.store import keys
from flyd.store.mirror import Mirror

log = structlog.get_logger(__name__)

CLUSTER = "_cluster"  # the app of history lines that are no app's (incidents/recorder.py)
LOOK_EVERY_S = 0.25  # at most so often, however much happens
LOOK_AT_LEAST_S = 30.0
RETRY_MIN_S = 0.5
RETRY_MAX_S = 5.0
ROOM_AGAIN_S = 30.0  # a machine without room is tried again this often although nothing seems to have changed

MACHINES_STAY = "machine.stays"
MACHINE_UNPLACEABLE = "machine.unplaceable"
MOVES_HELD = "host.moves_held"


class Repairs:
    """One flyd's repairer. The mirror must hold what loss.Sight, drain.Scene and `_room` are made of."""

    def __init__(self, kv: KV, mirror: Mirror, placer: Placer, *, clock: Clock, entropy: Entropy) -> None:
        self._kv = kv
        self._mirror = mirror
        self._clock = clock
        self._entropy = entropy
        self._drains = Drains(kv, mirror, placer, clock=clock, entropy=entropy)
        self._silences: dict[str, Silence] = {}
        self._told: dict[str, Loss] = {}
        self._refused: dict[str, tuple[object, str]] = {}  # machine -> the room there was, and why not

    async def watch_silences(self) -> None:
        """Count, on every flyd, how long hosts have given no sign of life; for ever."""
        await self._mirror.wait_synced()
        while True:
            version = self._mirror.version
            self._track()
            await self._mirror.wait_change(version)

    async def keep_repairing(self, guard: Unchanged) -> None:
        """Repair and drain until leadership ends (cancels) this."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_losses(guard), name="losses")
            group.create_task(self._drains.keep(guard), name="drains")

    def _track(self) -> None:
        hosts = {found.value.name: found.mod_revision for found in self._mirror.list(keys.HOSTS, Host)}
        now_s = self._clock.monotonic_s()
        self._silences = loss.track(self._silences, hosts, self._alive(), now_s)

    def _alive(self) -> tuple[str, ...]:
        return tuple(keys.last_part(found.key) for found in self._mirror.list(keys.ALIVE, bytes))

    # ----------------------------------------------------------------------- lost hosts

    async def _keep_losses(self, guard: Unchanged) -> None:
        self._refused.clear()
        told: dict[str, Loss] | None = None
        retry_s = RETRY_MIN_S
        while True:
            version = self._mirror.version
            try:
                if told is None:
                    self._told = told = await self._told_before()
                look_again_s = await self._look(guard)
                retry_s = RETRY_MIN_S
            except (Unavailable, Conflict) as error:
                if retry_s == RETRY_MIN_S:
                    log.warning("repairs.look_failed", error=error.message)
                told = None  # an answer may be lost: read again what was told
                await asyncio.sleep(retry_s)
                retry_s = min(retry_s * 2, RETRY_MAX_S)
                continue
            await asyncio.sleep(LOOK_EVERY_S)
            await wait_change(self._mirror, version, look_again_s)

    async def _told_before(self) -> dict[str, Loss]:
        listing = await self._kv.list(keys.LOSSES)
        return {
            keys.last_part(item.key): msgspec.json.decode(item.value, type=Loss) for item in listing.items
        }

    async def _look(self, guard: Unchanged) -> float:
        """One look at all lost hosts; how long nothing may change before the next."""
        self._track()
        found = self._mirror.get(keys.HOST_LOSS, LossRule)
        rule = found.value if found is not None else LossRule()
        sight = self._sight(rule)
        room = self._room()
        waiting = tuple(m for m, (seen, _) in sorted(self._refused.items()) if seen == room)
        plan = loss.plan(sight, waiting)
        lost_machines = {machine.id for machine in sight.machines}
        self._refused = {m: held for m, held in self._refused.items() if m in lost_machines}
        for wanted in plan.moves:
            await self._move(wanted, sight, room, guard)
        await self._tell(plan, rule, sight, guard)
        if plan.moves:
            await wait_caught_up(self._kv, self._mirror)
            return 0.0
        return min(LOOK_AT_LEAST_S if plan.next_s is None else plan.next_s, LOOK_AT_LEAST_S)

    def _sight(self, rule: LossRule) -> Sight:
        now_s = self._clock.monotonic_s()
        silent_s = {name: now_s - s.since_s + LEASE_TTL_S for name, s in sorted(self._silences.items())}
        if not silent_s:
            return Sight(grace_s=rule.grace_s, alive=self._alive(), silent_s={}, machines=())
        machines = tuple(
            item.value for item in self._mirror.list(keys.MACHINES, Machine) if item.value.host in silent_s
        )
        return Sight(
            grace_s=rule.grace_s,
            alive=self._alive(),
            silent_s=silent_s,
            machines=machines,
            statuses={
                machine.id: status.value
                for machine in machines
                if (status := self._mirror.get(keys.status(machine.app, machine.id), MachineStatus))
            },
            apps={item.value.name: item.value for item in self._mirror.list(keys.APPS, App)},
        )

    def _room(self) -> object:
        """Changes whenever a machine that found no room may find some."""
        prefixes = (keys.HOSTS, keys.ALIVE, keys.RESERVATIONS)
        revisions = tuple(
            tuple(found.mod_revision for found in self._mirror.list(prefix, bytes)) for prefix in prefixes
        )
        return revisions, int(self._clock.monotonic_s() / ROOM_AGAIN_S)

    async def _move(self, wanted: MoveOff, sight: Sight, room: object, guard: Unchanged) -> None:
        machine = wanted.machine
        still_lost = self._still_lost(machine.host)
        if not still_lost:
            return  # it is back
        why = f"host {machine.host} was silent for {sight.silent_s[machine.host]:.0f} s"
        try:
            moved = await move(
                self._kv,
                wanted,
                why,
                clock=self._clock,
                entropy=self._entropy,
                guards=(guard, *still_lost),
            )
        except Unplaceable as error:
            before = self._refused.get(machine.id)
            self._refused[machine.id] = (room, error.message)
            if before is None or before[1] != error.message:
                log.warning("repairs.unplaceable", machine=machine.id, app=machine.app, error=error.message)
                await self._write(
                    guard, self._line(machine.app, machine.id, MACHINE_UNPLACEABLE, error.message)
                )
            return
        self._refused.pop(machine.id, None)
        if moved is not None:
            log.info("repairs.moved", machine=moved.id, app=moved.app, lost=machine.host, host=moved.host)

    def _still_lost(self, host: str) -> tuple[Unchanged, ...]:
        """That the host is as it was seen: what arrives late must not count for one that is back."""
        silence = self._silences.get(host)
        if silence is None:
            return ()
        return Unchanged(keys.alive(host), 0), Unchanged(keys.host(host), silence.joined_revision)

    # ----------------------------------------------------------------------- what is told of them

    async def _tell(self, plan: Plan, rule: LossRule, sight: Sight, guard: Unchanged) -> None:
        """Keep losses/<host> as it is now; history where something stays or is held."""
        hosts_of = {machine.id: machine.host for machine in sight.machines}
        for name in sorted(sight.silent_s):
            silent_s = sight.silent_s[name]
            refused = {m: why for m, (_, why) in self._refused.items() if hosts_of.get(m) == name}
            before = self._told.get(name)
            since_s = before.since_s if before is not None else self._clock.wall_s() - silent_s
            now = Loss(
                host=name,
                since_s=since_s,
                moves_at_s=since_s + rule.grace_s,
                held=plan.held if silent_s >= sight.grace_s else "",
                left={**plan.left.get(name, {}), **refused},
            )
            still_lost = self._still_lost(name)
            if now == before or not still_lost:
                continue
            await self._write(guard, Put(keys.loss(name), encode(now)), *still_lost)
            self._told[name] = now
            for line in self._lines(before or Loss(host=name, since_s=0.0, moves_at_s=0.0), now, sight):
                await self._write(guard, line)
        for name in [name for name in sorted(self._told) if name not in sight.silent_s]:
            await self._write(guard, Delete(keys.loss(name)))
            del self._told[name]

    def _lines(self, before: Loss, now: Loss, sight: Sight) -> list[Put]:
        """History of what is new in a loss, one line for each app."""
        lines: list[Put] = []
        if now.held and now.held != before.held:
            lines.append(self._line(CLUSTER, now.host, MOVES_HELD, now.held))
        apps = {machine.id: machine.app for machine in sight.machines}
        stay: dict[str, list[str]] = {}
        for machine_id, reason in sorted(now.left.items()):
            if machine_id not in before.left and machine_id not in self._refused:
                stay.setdefault(apps.get(machine_id, CLUSTER), []).append(f"{machine_id} ({reason})")
        for app, machines in sorted(stay.items()):
            text = f"host {now.host} is lost; what stays there: {', '.join(machines)}"
            lines.append(self._line(app, now.host, MACHINES_STAY, text))
        return lines

    def _line(self, app: str, source: str, kind: str, message: str) -> Put:
        at_s = self._clock.wall_s()
        line = Event(at_s=at_s, app=app, source=source, kind=kind, message=message)
        return Put(keys.event(app, at_s, f"{source}-{kind.rpartition('.')[2]}"), encode(line))

    async def _write(self, guard: Unchanged, effect: Put | Delete, *still_lost: Unchanged) -> None:
        if not (await self._kv.txn((guard, *still_lost), (effect,))).succeeded:
            who = "another flyd repairs now" + (", or the host is back" if still_lost else "")
            raise Conflict(who, hint="Nothing to do: this scope is ending, or it looks again.")
