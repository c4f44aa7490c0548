"""Where machines may run, and who may move them: one machine, one copy, but for hosts that are cut off.

Owns `Copies`, told of every change of etcd, of hardware, of the network and of flyds. It knows since
when each host can see etcd, and when a claim left a host. Violations:

- double placement: a machine leaves a host that gives signs of life while it runs there, or one
  that has not been silent for the grace period; or one with a volume leaves at all.
- twice: a copy that is no longer its host's runs on, although the host can see etcd since
  FENCED_WITHIN_S.
- resurrected: a flyd that began after the claim had left, and could see etcd ever since, starts a copy.
- stale leader: a host writes what only the elected repairer may, and is not that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flyd.hosts.membership import LEASE_TTL_S
from flyd.model import Desired, Machine, decode
from flyd.model.cluster import LossRule
from flyd.ports import Change
from flyd.store import keys
from flyd.store.leader import CONTROLLER
from tests.simulation.driver import Hardware
from tests.simulation.ledger import Violation
from tests.simulation.loop import current
from tests.simulation.network import ETCD, Network, Store

FENCED_WITHIN_S = 25.0  # a lost list (2 s), an operation under way, a machine that ignores signals (5 s)
POLL_S = 1.0
ROUNDING_S = 0.01


class Copies:
    """Watches the copies of all machines in one world."""

    def __init__(self, store: Store, network: Network, hardware: Mapping[str, Hardware]) -> None:
        self._store = store
        self._network = network
        self._hardware = hardware
        self.sees_since: dict[str, float] = {}  # hosts whose flyd runs and reaches etcd
        self.born_s: dict[str, float] = {}  # when each host's flyd began
        self._silent_since: dict[str, float] = {}
        self._left_at: dict[tuple[str, str], float] = {}  # (machine, host)
        self._claims: dict[str, Machine] = {}
        self._outside = current().world_context()

    def attach(self) -> None:
        """Look after every change from now on, and every POLL_S."""
        self._store.on_change.append(self.see_store)
        self._network.on_change.append(self.see_hosts)
        for hardware in self._hardware.values():
            hardware.on_start.append(self.see_start)
        self._poll()

    def _poll(self) -> None:
        self.see_hosts()
        self.see_copies()
        current().call_later(POLL_S, self._poll, context=self._outside)

    def born(self, host: str) -> None:
        """A flyd begins on the host."""
        self.born_s[host] = current().time()
        self.sees_since.pop(host, None)
        self.see_hosts()

    def see_hosts(self) -> None:
        """After a change of who can see etcd."""
        loop = current()
        for host in self._hardware:
            if not (loop.runs(f"{host}/flyd") and self._network.reaches(host, ETCD)):
                self.sees_since.pop(host, None)
            else:
                self.sees_since.setdefault(host, loop.time())

    # ------------------------------------------------------------------ etcd

    def see_store(self, changes: Sequence[Change]) -> None:
        """After a transaction."""
        for change in changes:
            name = keys.last_part(change.key)
            if change.key.startswith(keys.ALIVE):
                if change.value is None:
                    self._silent_since[name] = current().time()
                else:
                    self._silent_since.pop(name, None)
            elif change.key.startswith((keys.LOSSES, keys.DRAINS)):
                self._check_leads(change.key)
            elif change.key.startswith(keys.MACHINES):
                self._see_claim(name, decode(change.value.value, Machine) if change.value else None)

    def _see_claim(self, machine_id: str, claim: Machine | None) -> None:
        before = self._claims.pop(machine_id, None)
        if claim is not None:
            self._claims[machine_id] = claim
            self._left_at.pop((machine_id, claim.host), None)
        if before is None or (claim is not None and claim.host == before.host):
            return
        self._left_at[machine_id, before.host] = current().time()
        if claim is not None:
            self._check_move(before, claim)

    def _check_leads(self, what: str) -> None:
        writer, leader = self._store.writer, self._store.get(keys.leader(CONTROLLER))
        if writer in self._hardware and (leader is None or leader.value.decode() != writer):
            holder = leader.value.decode() if leader is not None else "nobody"
            raise Violation(f"stale leader: {writer} wrote {what}, but {holder} leads")

    def _check_move(self, before: Machine, after: Machine) -> None:
        host = before.host
        self._check_leads(f"the claim of {before.id}")
        if before.config.mounts:
            raise Violation(f"double placement: {before.id} left {host}, where its volume is")
        if self._store.get(keys.alive(host)) is not None:
            if before.config.schedule:
                return  # it may have begun by its schedule right now; that copy ends soon
            if after.desired is not Desired.STOPPED or before.id in self._hardware[host].running():
                raise Violation(f"double placement: {before.id} left {host}, which gives signs of life")
            return
        rule = self._store.get(keys.HOST_LOSS)
        grace_s = decode(rule.value, LossRule).grace_s if rule is not None else LossRule().grace_s
        silent_s = LEASE_TTL_S + current().time() - self._silent_since[host]
        if silent_s < grace_s - ROUNDING_S:
            raise Violation(f"double placement: {before.id} left {host}, silent for {silent_s:.2f} s only")

    # ------------------------------------------------------------------ hardware

    def see_start(self, host: str, machine_id: str) -> None:
        """A copy begins to run."""
        self.see_copies()
        left_s, born_s = self._left_at.get((machine_id, host)), self.born_s.get(host)
        sees_s = self.sees_since.get(host)
        if left_s is None or born_s is None or sees_s is None:
            return
        if left_s < born_s and sees_s <= born_s:
            raise Violation(f"resurrected: {machine_id} starts on {host}, which its claim had left")

    def _check_twice(self, machine_id: str, host: str, other: str) -> None:
        raise Violation(f"twice: {machine_id}, with a volume, on {host} and {other}")

    def see_copies(self) -> None:
        """Every copy that runs is where its claim says, or on a host that can not know better yet."""
        now_s = current().time()
        where: dict[str, str] = {}
        for host, hardware in self._hardware.items():
            for machine_id, spec in hardware.running().items():
                if spec.mounts and machine_id in where:
                    self._check_twice(machine_id, where[machine_id], host)
                where[machine_id] = host
                left_s, sees_s = self._left_at.get((machine_id, host)), self.sees_since.get(host)
                if left_s is None or sees_s is None:
                    continue
                if now_s - max(left_s, sees_s) > FENCED_WITHIN_S:
                    raise Violation(f"twice: {machine_id} runs on {host}, which its claim left long ago")
