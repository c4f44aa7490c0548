"""Carrying out decisions: one method an action, called by pgha/agent.py, one at a time.

Each method may fail with `Unavailable` at any line; every one can be repeated. The order of
the steps inside is what the safety argument needs (README.md); nothing is decided here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

from flyd.errors import InvariantBroken, Unavailable
from flyd.model import PostgresLeader, encode
from flyd.ports import KV, Clock, Delete, Put, Unchanged
from pgha import keys
from pgha.change import quorum_of
from pgha.extension import Extensions
from pgha.journal import Journal
from pgha.model import Action, AgentConfig, Bootstrap, Decision, Doubt, Lease, Lineage, Position, View, Vote
from pgha.observe import ClusterRecords
from pgha.ports import Postgres
from pgha.term import Term

CHECKPOINT_S = 3.0  # before it: less than the agent may leave Postgres unobserved (term.py, HEALTH_S)
STEP_DOWN_S = 10.0  # a planned hand-over: for the standbys to get the last WAL
ATTEMPT_S = 0.6  # for a request that may be repeated: a member of etcd that just died must not cost more
T = TypeVar("T")


class Acts:
    """What one member can do to its Postgres and to etcd."""

    def __init__(
        self,
        config: AgentConfig,
        kv: KV,
        postgres: Postgres,
        clock: Clock,
        records: ClusterRecords,
        term: Term,
        journal: Journal,
        extensions: Extensions,
    ) -> None:
        self._config = config
        self._kv = kv
        self._postgres = postgres
        self._clock = clock
        self._records = records
        self._term = term
        self._journal = journal
        self._extensions = extensions
        self.serving = asyncio.Event()  # a checkpoint is due
        self.complete_lsn = 0  # of the present term: what a quorum must have before it serves, or changes
        self.complete = False  # ... and has had
        self._acts: dict[Action, Callable[[View, Decision], Awaitable[None]]] = {
            Action.CLAIM_BOOTSTRAP: self._claim_bootstrap,
            Action.INITIALISE: self._initialise,
            Action.START: self._start,
            Action.COPY: self._copy,
            Action.REWIND: self._rewind,
            Action.FOLLOW: self._follow,
            Action.DOUBT: self._doubt,
            Action.VOTE: self._vote,
            Action.TAKE_OVER: self._take_over,
            Action.PROMOTE: self._promote,
            Action.SERVE: self._serve,
            Action.DEMOTE: self._demote,
            Action.RELEASE: self._release,
            Action.STEP_DOWN: self._step_down,
            Action.REFUSE_SWITCHOVER: self._refuse_switchover,
            Action.SYNCHRONISE: self._synchronise,
            Action.RECONFIGURE: self._reconfigure,
        }

    async def do(self, view: View, decision: Decision) -> None:
        """Carry out what was decided; raises Unavailable if it must be looked at again."""
        await self._acts[decision.action](view, decision)

    # ----------------------------------------------------------------------- getting up

    async def _claim_bootstrap(self, view: View, decision: Decision) -> None:
        cluster = self._config.cluster
        absent = [Unchanged(keys.bootstrap(cluster), 0), Unchanged(keys.postgres_leader(cluster), 0)]
        claim = Put(keys.bootstrap(cluster), encode(Bootstrap(node=self._config.node)))
        await self._kv.txn(absent, [claim])

    async def _initialise(self, view: View, decision: Decision) -> None:
        await self._postgres.initialise()
        self._record("initialised", "new data directory", 1)

    async def _start(self, view: View, decision: Decision) -> None:
        await self._postgres.start()

    async def _copy(self, view: View, decision: Decision) -> None:
        await self._postgres.copy(decision.address)
        self._record("copied", f"fresh copy from {decision.address}", decision.epoch)

    async def _rewind(self, view: View, decision: Decision) -> None:
        was = Position(timeline=view.status.timeline, lsn=view.status.replayed_lsn)
        if await self._postgres.rewind(decision.address):
            self._record("rewound", f"rewound to {decision.address}", decision.epoch, was)
        else:
            self._record("rewind_failed", "a fresh copy is needed", decision.epoch, was)

    async def _follow(self, view: View, decision: Decision) -> None:
        await self._postgres.follow(decision.address)
        at = Position(timeline=view.status.timeline, lsn=view.status.replayed_lsn)
        self._record("following", f"streaming from {decision.address}", decision.epoch, at)

    # ----------------------------------------------------------------------- a round

    async def _doubt(self, view: View, decision: Decision) -> None:
        """Only if the lease is still at the revision that we saw getting old: not a watch that stalled."""
        cluster, node, revision = self._config.cluster, self._config.node, decision.revision
        said = Doubt(node=node, revision=revision, evidence=decision.detail)
        put = Put(keys.doubt(cluster, node), encode(said))
        if (await _soon(self._kv.txn([Unchanged(keys.lease(cluster), revision)], [put]))).succeeded:
            holder, epoch = ("", 0) if view.lease is None else (view.lease.node, view.lease.epoch)
            self._record("doubted", f"{holder} is {decision.detail}", epoch)

    async def _vote(self, view: View, decision: Decision) -> None:
        """Promise, close, and only then say what we have: in this order (I3)."""
        cluster, node, revision = self._config.cluster, self._config.node, decision.revision
        lease = await _soon(self._kv.get(keys.lease(cluster)))
        if lease is None or lease.mod_revision != revision or not self._extensions.close(revision):
            return
        await self._postgres.save_promise(revision)
        position = await self._postgres.fence()
        epoch = 0 if view.lease is None else view.lease.epoch
        self._record("fenced", "closed to the old primary", epoch, position)
        vote = Vote(
            node=node,
            revision=revision,
            epoch=position.timeline,
            lsn=position.lsn,
            system_id=view.data.system_id,
        )
        put = Put(keys.vote(cluster, revision, node), encode(vote))
        if (await _soon(self._kv.txn([Unchanged(keys.lease(cluster), revision)], [put]))).succeeded:
            self._record("voted", f"in the round of lease revision {revision}", epoch, position)

    async def _take_over(self, view: View, decision: Decision) -> None:
        """One compare-and-set on the very revisions that were voted on (I1)."""
        config, epoch = self._config, decision.epoch
        leader_key, lease_key = keys.postgres_leader(config.cluster), keys.lease(config.cluster)
        leader = PostgresLeader(
            cluster=config.cluster,
            epoch=epoch,
            node=config.node,
            address=config.address,
            since_s=self._clock.wall_s(),
        )
        mine = next((v for v in view.votes if v.node == config.node), None)
        parent = mine.epoch if mine is not None else view.status.timeline
        line = Lineage(epoch=epoch, node=config.node, system_id=view.data.system_id, parent=parent)
        compares = [
            Unchanged(leader_key, view.leader_revision),
            Unchanged(lease_key, decision.revision),
            Unchanged(keys.membership(config.cluster), view.membership_revision),  # whose votes were counted
            Unchanged(keys.pause(config.cluster), 0),  # who was told that it is paused can rely on that
        ]
        effects = [
            Put(leader_key, encode(leader)),
            Put(lease_key, encode(Lease(epoch=epoch, node=config.node))),
            Put(keys.history(config.cluster, epoch), encode(line)),
            Delete(keys.switchover(config.cluster)),
            *(Delete(key) for key in self._records.vote_keys()),
        ]
        sent_s = self._clock.monotonic_s()
        result = await self._kv.txn(compares, effects)
        if result.succeeded:
            self.complete_lsn, self.complete = 0, False
            self._term.begin(epoch, result.revision, sent_s)
            lsn = 0 if mine is None else mine.lsn
            self._record("elected", "took over", epoch, Position(timeline=parent, lsn=lsn))

    async def _promote(self, view: View, decision: Decision) -> None:
        cluster, epoch = self._config.cluster, decision.epoch
        if not self._term.valid():
            return
        switch_lsn = await self._postgres.promote(epoch)
        status = await self._postgres.status()
        self.complete_lsn, self.complete = max(status.flushed_lsn, switch_lsn), False
        line = next((h for h in view.history if h.epoch == epoch), None)
        if line is None:
            raise InvariantBroken(f"epoch {epoch} was won but has no lineage record")
        done = Lineage(
            epoch=epoch,
            node=line.node,
            system_id=line.system_id,
            parent=line.parent,
            switch_lsn=switch_lsn,
        )
        compare = Unchanged(keys.postgres_leader(cluster), view.leader_revision)
        if not (await self._kv.txn([compare], [Put(keys.history(cluster, epoch), encode(done))])).succeeded:
            raise Unavailable(f"epoch {epoch} ended while it was promoting")
        at = Position(timeline=epoch, lsn=switch_lsn)
        self._record("promoted", "out of recovery", epoch, at)

    async def _serve(self, view: View, decision: Decision) -> None:
        if await self._set_serving(view, serving=True):
            at = Position(timeline=decision.epoch, lsn=self.complete_lsn)
            self._record("serving", "a quorum has everything: open for writes", decision.epoch, at)
            self.serving.set()

    async def _set_serving(self, view: View, *, serving: bool) -> bool:
        leader = view.leader
        if leader is None:
            return False
        key = keys.postgres_leader(self._config.cluster)
        said = PostgresLeader(
            cluster=leader.cluster,
            epoch=leader.epoch,
            node=leader.node,
            address=leader.address,
            serving=serving,
            since_s=leader.since_s,
        )
        compare = Unchanged(key, view.leader_revision)  # not a newer one: somebody else may lead by now
        return (await self._kv.txn([compare], [Put(key, encode(said))])).succeeded

    # ----------------------------------------------------------------------- the members

    async def _synchronise(self, view: View, decision: Decision) -> None:
        """From here on no process of our Postgres takes anybody's word but theirs."""
        self.complete = False  # also if it fails half-way
        lsn = await self._postgres.synchronise(quorum_of(view).synchronous)
        if view.status.primary():
            self.complete_lsn = max(self.complete_lsn, lsn)

    async def _reconfigure(self, view: View, decision: Decision) -> None:
        """The record first, by compare; Postgres follows it (a round in between counts by the new record)."""
        if decision.membership is None or not self._term.valid():
            return
        leader_key, key = keys.postgres_leader(self._config.cluster), keys.membership(self._config.cluster)
        compares = [
            Unchanged(leader_key, view.leader_revision),
            Unchanged(key, view.membership_revision),
        ]
        if (await _soon(self._kv.txn(compares, [Put(key, encode(decision.membership))]))).succeeded:
            at = Position(timeline=view.status.timeline, lsn=view.status.flushed_lsn)
            self._record(decision.rule, decision.detail, self._term.epoch, at)

    # ----------------------------------------------------------------------- the end of a term

    async def lost(self, reason: str) -> None:
        """The lease cannot be held: Postgres dies now. Called by the term's own loop."""
        await self._postgres.kill()
        self._term.buried()
        self._journal.record("postgres.demoted", f"killed Postgres: {reason}")
        self._records.poke()

    async def _demote(self, view: View, decision: Decision) -> None:
        self._term.end()
        await self._postgres.kill()
        self._term.buried()
        self._record("demoted", "killed Postgres: its epoch is over", decision.epoch)

    async def _release(self, view: View, decision: Decision) -> None:
        self._term.end()
        await self._postgres.kill()
        self._term.buried()
        if await self._term.release(target=""):
            epoch = 0 if view.lease is None else view.lease.epoch
            self._record("demoted", "Postgres is down here: gave the lease back", epoch)

    async def _step_down(self, view: View, decision: Decision) -> None:
        # What is dirty is written while clients still work: the shutdown's own checkpoint is short then.
        with contextlib.suppress(Unavailable, TimeoutError):
            async with asyncio.timeout(CHECKPOINT_S):
                await self._postgres.checkpoint()
        await self.hand_over(view, decision.target, STEP_DOWN_S)

    async def hand_over(self, view: View, target: str, timeout_s: float) -> None:
        """Stop serving, stop Postgres so that the standbys get everything, give the lease back."""
        epoch = self._term.epoch
        if not await self._set_serving(view, serving=False):
            return
        self._record("switchover", f"handing over to {target or 'the best replica'}", epoch)
        await self._postgres.stop(timeout_s)
        self._term.end()
        self._term.buried()
        await self._term.release(target)
        self._record("demoted", "stopped and gave the lease back", epoch)

    async def _refuse_switchover(self, view: View, decision: Decision) -> None:
        key = keys.switchover(self._config.cluster)
        compare = Unchanged(key, self._records.mod_revision(key))
        if (await self._kv.txn([compare], [Delete(key)])).succeeded:
            self._record("switchover_refused", decision.detail, self._term.epoch)

    def _record(self, kind: str, message: str, epoch: int, position: Position | None = None) -> None:
        fields: dict[str, str | int] = {"epoch": epoch}
        if position is not None:
            fields |= {"lsn": position.lsn, "timeline": position.timeline}
        self._journal.record(f"postgres.{kind}", message, **fields)


async def _soon(request: Awaitable[T]) -> T:
    """The answer, or Unavailable after ATTEMPT_S. Only for what may be done twice, or late."""
    try:
        async with asyncio.timeout(ATTEMPT_S):
            return await request
    except TimeoutError:
        raise Unavailable(f"etcd did not answer within {ATTEMPT_S} s") from None
