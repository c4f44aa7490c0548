"""The Postgres world: three real pgha agents over fake servers, clients, and faults.

Owns the fault schedule, the clients and the end of a run. Checkers always on: ledger.py, and here: TTL -
margin after its last renewal an old primary is dead, by then succeeded or not, unless its killer was held up
(I7, I8); a round opens before the lease is old only on a quorum's word; and a new primary serves only when a
quorum has what it begins with (I9). After the faults: a serving primary within HEAL_S, which has every
acknowledged row, and all members stream again.

Called by tests/simulation/runner.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from flyd.model import PostgresLeader, decode, encode
from flyd.ports import Change, Put
from pgha import keys
from pgha.agent import Agent
from pgha.membership import settled
from pgha.model import MARGIN_S, TTL_S, AgentConfig, Doubt, Lease, Membership, Switchover
from tests.simulation.ledger import Ledger, Violation
from tests.simulation.loop import current, stream
from tests.simulation.network import CALM, ETCD, ROUGH, Network, SimulatedClock, SimulatedKV, Store
from tests.simulation.pgserver import Server
from tests.simulation.postgres import PostgresHost, SimulatedKiller, SimulatedLookout, SimulatedPostgres
from tests.simulation.voice import Heard, SimulatedVoice

NODES: tuple[str, ...] = ("ams", "iad", "sin")
CLUSTER = "chat-db"
CLIENT = "client"
ANSWER_S = 2.0
FAULTS_S = 25.0
HEAL_S = 30.0
STREAM_S = 60.0
ROWS_AT_LEAST = 5
ANY_EPOCH = 1_000_000
KILLED_S = 0.01  # from a deadline to its effect
WAKE_UP_S = 1.0  # for a killer that was held up, to do what it should have done


class PostgresWorld:
    """Everything of one run."""

    def __init__(self, faults_s: float = FAULTS_S) -> None:
        self._faults_s = faults_s
        loop = current()
        self.chance = stream(loop.seed, "faults")
        self.network = Network()
        self.store = Store()
        self.ledger = Ledger()
        self.hosts: dict[str, PostgresHost] = {}
        self._ears: dict[str, Heard] = {}
        self._killers: dict[str, list[SimulatedKiller]] = {}
        self.nodes = NODES  # that have a machine
        self.healing = False
        self.membership = Membership(quorum=settled(NODES), target=NODES)
        for name in NODES:
            self.make_host(name)
        self._held_up_s: dict[str, float] = {}  # node -> when its killer last began or went on
        self.leader: PostgresLeader | None = None
        self._lease = Lease(epoch=0, node="")
        self._renewed_s = loop.time()  # when the lease's holder last changed it
        self._doubters: set[str] = set()  # of the lease as it is; never iterated
        self.store.on_change.append(self._see)

    # ------------------------------------------------------------------ who runs

    def make_host(self, name: str) -> None:
        """A machine for a member."""
        self.hosts[name] = PostgresHost(name, self.network, self.ledger, self.hosts)
        self.hosts[name].founders = NODES
        self._killers[name] = []

    def start_agent(self, name: str) -> None:
        """Start pgha on a node, unless it runs."""
        loop = current()
        if loop.alive(f"{name}/pgha") or name not in self.nodes:
            return
        self._lose_agent(name)
        self._held_up_s[name] = loop.time()
        host = self.hosts[name]
        host.dark = False
        killer = SimulatedKiller(host)
        self._killers[name].append(killer)
        loop.spawn(killer.process, killer.main())
        config = AgentConfig(
            cluster=CLUSTER, node=name, region=name, address=host.address, machine_id=name, voters=NODES
        )
        kv = SimulatedKV(self.network, self.store, name)
        lookout, voice = SimulatedLookout(host), SimulatedVoice(host, self._ears)
        agent = Agent(config, kv, SimulatedPostgres(host), SimulatedClock(), killer, lookout, voice)
        loop.spawn(f"{name}/pgha", agent.run())

    def _lose_agent(self, name: str) -> None:
        """The agent is gone: its killer sees that, unless it is gone too."""
        current().crash(f"{name}/pgha")
        for killer in self._killers[name]:
            killer.lose_agent()

    def end_machine(self, name: str, *, dark: bool) -> None:
        """Nothing of it runs any more."""
        current().crash(f"{name}/pgha")
        for process in self._killer_processes(name):
            current().crash(process)
        self.hosts[name].dark = dark
        self.hosts[name].power_cut()

    def _killer_processes(self, name: str) -> list[str]:
        return [killer.process for killer in self._killers[name]]

    def primary(self) -> PostgresHost | None:
        """The serving primary, if its server is there."""
        leader = self.leader
        if leader is None or not leader.serving:
            return None
        host = self.hosts[leader.node]
        return host if host.server is not None and not host.server.in_recovery else None

    def _see(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if change.value is None:
                continue
            if change.key == keys.postgres_leader(CLUSTER):
                before, self.leader = self.leader, decode(change.value.value, PostgresLeader)
                if before is not None and before.epoch != self.leader.epoch:
                    self._check_reason(before)
                    self._check_old_primary(before)
                if self.leader.serving:
                    self._check_complete(self.leader)
            elif change.key == keys.membership(CLUSTER):
                self.membership = decode(change.value.value, Membership)
            elif change.key.startswith(keys.doubts(CLUSTER)):
                self._doubters.add(decode(change.value.value, Doubt).node)
        for change in changes:  # after the leader: a take-over changes both
            if change.key == keys.lease(CLUSTER) and change.value is not None:
                self._lease = decode(change.value.value, Lease)
                self._renewed_s = current().time()
                self._doubters.clear()

    def _check_reason(self, old: PostgresLeader) -> None:
        """The lease was given back, or its time was over, or a quorum of the others said that it is gone."""
        early = not self._lease.released and current().time() - self._renewed_s < TTL_S
        quorum = self.membership.quorum
        if early and len(self._doubters.intersection(quorum.voters) - {old.node}) < quorum.votes:
            current().fail(f"hasty: {old.node} of epoch {old.epoch} was succeeded without reason")

    def _check_old_primary(self, old: PostgresLeader) -> None:
        """It may still answer reads when it is succeeded early; never beyond its own deadline."""
        server = self.hosts[old.node].server
        left_s = self._renewed_s + TTL_S - MARGIN_S + KILLED_S - current().time()
        if server is None:
            return
        if left_s <= 0:
            self._check_dead(old, server)
        else:
            self._later((left_s, left_s), lambda: self._check_dead(old, server))

    def _check_dead(self, old: PostgresLeader, server: Server) -> None:
        name, loop = old.node, current()
        held_up = (
            not loop.runs(self._killers[name][-1].process) or loop.time() - self._held_up_s[name] < WAKE_UP_S
        )
        alive = self.hosts[name].server is server and not server.in_recovery and not server.stopping
        if alive and not held_up and server.timeline() == old.epoch:
            loop.fail(f"stale primary: {name} of epoch {old.epoch} still runs when {self.leader} leads")

    def _check_complete(self, leader: PostgresLeader) -> None:
        """Before clients are let in, a quorum has all that the new primary begins with (I9)."""
        epoch = leader.epoch
        synchronous = self.membership.quorum.synchronous
        others = [h for h in self.hosts.values() if h.name != leader.node and h.name in synchronous.names]
        have = [h.name for h in others if any(entry.timeline == epoch for entry in h.disk.wal)]
        if len(have) < synchronous.acks:
            current().fail(f"complete: {leader.node} serves in epoch {epoch} and no quorum has its beginning")

    # ------------------------------------------------------------------ clients

    async def write_through_endpoint(self) -> None:
        """A client that goes where the endpoint leads."""
        while True:
            primary = self.primary()
            if primary is None:
                await asyncio.sleep(0.05)
            else:
                await self._insert(primary)
                await asyncio.sleep(self.chance.uniform(0.01, 0.2))

    async def write_anywhere(self) -> None:
        """A client with an old address: writes to whoever takes it, and stays."""
        while True:
            target = self.hosts[self.chance.choice(self.nodes)]
            while await self._insert(target):
                await asyncio.sleep(self.chance.uniform(0.01, 0.2))
            await asyncio.sleep(self.chance.uniform(0.05, 0.5))

    async def _insert(self, host: PostgresHost) -> bool:
        """One row; False if it was refused or the answer did not come."""
        row = self.ledger.send()
        answer: asyncio.Future[bool] = current().create_future()

        def settle(accepted: bool) -> None:
            if not answer.done():
                answer.set_result(accepted)

        def arrive() -> None:
            server = host.server
            if server is not None:
                server.inbox.put_nowait(lambda: server.insert(row, reply))

        def reply(accepted: bool) -> None:
            self.network.send(host.name, CLIENT, lambda: settle(accepted))

        self.network.send(CLIENT, host.name, arrive)
        try:
            async with asyncio.timeout(ANSWER_S):
                return await answer
        except TimeoutError:
            return False

    # ------------------------------------------------------------------ the run

    async def run(self) -> str:
        """Form the cluster, let it suffer, let it heal, check."""
        loop = current()
        for name in self.nodes:
            self.start_agent(name)
        loop.spawn(f"{CLIENT}/endpoint", self.write_through_endpoint())
        loop.spawn(f"{CLIENT}/anywhere", self.write_anywhere())
        if self.chance.random() < 0.8:
            await self.wait("the cluster forms", lambda: self.primary() is not None, HEAL_S)
        end = loop.time() + self._faults_s
        while loop.time() < end:
            await asyncio.sleep(self.chance.uniform(0.1, 4))
            self._one_fault()
        await self.heal()
        return f"{len(self.ledger.acknowledged)} rows, epoch {self.leader.epoch if self.leader else 0}"

    def _one_fault(self) -> None:
        name = self.chance.choice(self.nodes)
        leader = self.leader
        if leader is not None and self.chance.random() < 0.5:
            name = leader.node  # most of what is interesting happens to the primary
        fault = self.chance.choice(self._faults())
        fault(name)

    def _faults(self) -> tuple[Callable[[str], None], ...]:
        return (
            self._power_cut,
            self._power_cut,
            self._crash_agent,
            self._kill_server,
            self._freeze_agent,
            self._freeze_agent_and_killer,
            self._freeze_server,
            self._freeze_node,
            self._cut_from_etcd,
            self._cut_off,
            self._cut_off,
            self._cut_one_link,
            self._etcd_outage,
            self._refuse,
            self._refuse,
            self._blip,
            self._compact,
            self._bad_weather,
            self._switchover,
        )

    def _later(self, span_s: tuple[float, float], action: Callable[[], None]) -> None:
        loop = current()
        loop.call_later(self.chance.uniform(*span_s), action, context=loop.world_context())

    def _power_cut(self, name: str) -> None:
        current().note(f"power cut {name}")
        self.end_machine(name, dark=self.chance.random() < 0.5)
        self._later((0.3, 12), lambda: self.start_agent(name))

    def _crash_agent(self, name: str) -> None:
        self._lose_agent(name)
        self._later((0.1, 4), lambda: self.start_agent(name))

    def _kill_server(self, name: str) -> None:
        current().note(f"kill -9 of Postgres {name}")
        self.hosts[name].kill()

    def _freeze_agent(self, name: str) -> None:
        self._freeze(name, f"{name}/pgha")

    def _freeze_agent_and_killer(self, name: str) -> None:  # stale reads are not bounded then
        self._freeze(name, f"{name}/pgha", *self._killer_processes(name))

    def _freeze_server(self, name: str) -> None:
        self._freeze(name, f"{name}/postgres")

    def _freeze_node(self, name: str) -> None:
        self._freeze(name, f"{name}/pgha", f"{name}/postgres", *self._killer_processes(name))

    def _freeze(self, name: str, *processes: str) -> None:
        loop = current()
        for process in processes:
            loop.pause(process)

        def resume() -> None:
            self._held_up_s[name] = loop.time()
            for process in processes:
                loop.resume(process)

        self._later((0.2, 8), resume)

    def _cut_from_etcd(self, name: str) -> None:
        self.network.cut(name, ETCD)
        self._later((0.3, 8), self.network.heal)

    def _cut_off(self, name: str) -> None:
        for other in (*self.nodes, ETCD, CLIENT):
            if other != name:
                self.network.cut(name, other)
        self._later((0.3, 8), self.network.heal)

    def _cut_one_link(self, name: str) -> None:
        self.network.cut(name, self.chance.choice([n for n in self.nodes if n != name]))
        self._later((0.3, 8), self.network.heal)

    def _refuse(self, name: str) -> None:
        """A firewall resets and refuses some or all of its connections, while it lives: false evidence."""
        host = self.hosts[name]
        others = [other for other in self.nodes if other != name]
        host.refused = others if self.chance.random() < 0.6 else [self.chance.choice(others)]
        current().note(f"{name} seems to refuse {host.refused}")
        for other in host.refused:
            host.reset_stream(self.hosts[other])
        self._later((0.02, 5), host.refused.clear)

    def _blip(self, name: str) -> None:
        """Cut off for less than anybody should mind."""
        for other in (*self.nodes, ETCD, CLIENT):
            if other != name:
                self.network.cut(name, other)
        self._later((0.05, 0.6), self.network.heal)

    def _etcd_outage(self, _name: str) -> None:
        for node in self.nodes:
            self.network.cut(node, ETCD)
        self._later((0.3, 6), self.network.heal)

    def _compact(self, _name: str) -> None:
        self.store.compact(self.store.revision - self.chance.randrange(3))

    def _bad_weather(self, _name: str) -> None:
        self.network.weather = ROUGH
        self._later((1, 15), self._calm)

    def _calm(self) -> None:
        self.network.weather = CALM

    def _switchover(self, name: str) -> None:
        target = self.chance.choice(("", name))
        self.store.txn((), (Put(keys.switchover(CLUSTER), encode(Switchover(target=target))),))

    # ------------------------------------------------------------------ the end

    async def heal(self) -> None:
        loop = current()
        self.healing = True
        self.network.heal()
        self._calm()
        for name in self.nodes:
            self.hosts[name].refused = []
            for process in (f"{name}/pgha", f"{name}/postgres", *self._killer_processes(name)):
                loop.resume(process)
            self.start_agent(name)
        loop.note("healed")
        acknowledged = len(self.ledger.acknowledged)
        await self.wait(
            "rows are acknowledged again",
            lambda: len(self.ledger.acknowledged) >= acknowledged + ROWS_AT_LEAST,
            HEAL_S,
        )
        await self.wait("all members stream again", self.all_stream, STREAM_S)
        primary = self.primary()
        if primary is None:
            raise Violation("no primary at the end")
        self.ledger.check_lost(f"{primary.name}, the primary at the end,", primary.disk.wal, ANY_EPOCH)

    def all_stream(self) -> bool:
        primary = self.primary()
        others = [host for host in self.hosts.values() if host is not primary and host.name in self.nodes]
        return primary is not None and all(
            h.server is not None and h.server.streaming and h.server.upstream == primary.address
            for h in others
        )

    async def wait(self, what: str, reached: Callable[[], bool], limit_s: float) -> None:
        deadline = current().time() + limit_s
        while not reached():
            if current().time() > deadline:
                raise Violation(f"not within {limit_s:.0f} s: {what}; leader {self.leader}")
            await asyncio.sleep(0.1)
