"""One member's agent: observe, decide, act, in a loop; plus the loops that must not wait for it.

Loops under one TaskGroup: follow etcd (observe.py), renew the lease (term.py), write the journal
(journal.py), ask for time and give it while etcd is silent (extension.py), look at the primary
(suspicion.py), see Postgres end, and `_keep_deciding` here.
All that is decided is decided in decide.py; this file only carries it out, one action a turn, and
every action may fail with `Unavailable`, which means: look again and decide again.

Made by pgha/main.py (real adapters) and by the simulator (fakes). Times by ports.Clock.
"""

from __future__ import annotations

import asyncio

import msgspec
import structlog

from flyd.errors import InvariantBroken, Unavailable
from flyd.model import PostgresMember
from flyd.ports import KV, Clock
from pgha import keys
from pgha.acts import Acts
from pgha.change import enough
from pgha.decide import decide, doubted, lease_alive, own_term
from pgha.extension import Extensions, Pleas
from pgha.journal import Journal
from pgha.model import TTL_S, Action, AgentConfig, Decision, Status, View
from pgha.observe import ClusterRecords
from pgha.ports import Killer, Lookout, Postgres, Voice
from pgha.suspicion import Suspicion
from pgha.term import Term

log = structlog.get_logger(__name__)

TURN_S = 0.2  # a turn at least this often, to see what Postgres does by itself
CALM_TURN_S = 1.0  # while all is as it should be: its end, and that of its stream, are noticed at once anyway
BUSY_TURN_S = 0.01  # while something is about to be finished
FRESH_S = 0.1  # what etcd said this recently needs no asking again: who votes asks for the lease first anyway
BACKOFF_S = 0.2  # after an action that failed
RETIRE_S = 3.0  # for handing over when the member itself is told to end

EAGER_RULES = frozenset({"await_quorum", "starting", "replaying"})
ROLES = {Action.REWIND: "rewinding", Action.COPY: "copying", Action.INITIALISE: "starting"}


class Agent:
    """The supervisor of one member's Postgres."""

    def __init__(
        self,
        config: AgentConfig,
        kv: KV,
        postgres: Postgres,
        clock: Clock,
        killer: Killer,
        lookout: Lookout,
        voice: Voice,
    ) -> None:
        self._config = config
        self._kv = kv
        self._postgres = postgres
        self._clock = clock
        self.records = self._records = ClusterRecords(config.cluster, kv, clock)
        self._term = Term(config.cluster, config.node, kv, clock, killer)
        self.journal = self._journal = Journal(config.cluster, config.node, kv, clock)
        self._extensions = Extensions(config, kv, clock, self._records)
        self._acts = Acts(
            config, kv, postgres, clock, self._records, self._term, self._journal, self._extensions
        )
        self._pleas = Pleas(config, voice, clock, self._records, self._term)
        self._voice = voice
        self._suspicion = Suspicion(config.node, lookout, clock, self._records)
        self._unlatched_s = 0.0
        self._doubted = 0  # the lease revision whose end has been recorded
        self._rule = ""
        self._retiring = False
        self._calm = False  # a renewed lease is no reason to look again

    async def run(self) -> None:
        """Until `retire` was called. What an earlier run left behind is killed first (T8)."""
        await self._postgres.kill()
        async with asyncio.TaskGroup() as group:
            loops = [
                group.create_task(self._records.watch(), name="pgha-watch"),
                group.create_task(self._term.keep(self._acts.lost), name="pgha-term"),
                group.create_task(self._journal.write(), name="pgha-journal"),
                group.create_task(self._suspicion.watch(), name="pgha-suspicion"),
                group.create_task(self._pleas.keep(), name="pgha-pleas"),
                group.create_task(self._voice.listen(self._extensions.answer), name="pgha-voice"),
                group.create_task(self._watch_postgres(), name="pgha-exits"),
                group.create_task(self._keep_checkpointed(), name="pgha-checkpoint"),
            ]
            await self._keep_deciding()
            await self._end()
            for loop in loops:
                loop.cancel()

    def retire(self) -> None:
        """Ask `run` to end: hand over if leading, stop Postgres, return."""
        self._retiring = True
        self._records.poke()

    # ----------------------------------------------------------------------- the loop

    async def _keep_deciding(self) -> None:
        failing = ""
        while not self._retiring:
            try:
                decision = await self._turn()
                failing = ""
                pause_s = self._pause_s(decision)
            except Unavailable as error:
                if failing != str(error):
                    log.warning("pgha.turn_failed", node=self._config.node, error=str(error))
                failing = str(error)
                pause_s = BACKOFF_S
            except InvariantBroken as error:
                await self._postgres.kill()
                self._journal.record("postgres.stopped", str(error))
                await self._journal.flush()
                raise
            if pause_s > 0 and not self._retiring:
                await self._records.wait_change(pause_s, renewals=not self._calm)

    async def _turn(self) -> Decision:
        """Observe, decide, act once."""
        if not self._records.known:
            await self._records.refresh()
        view = await self._observe()
        now = self._clock.monotonic_s()
        if self._term.epoch == 0 and not lease_alive(view, now) and now - self._records.heard_s >= FRESH_S:
            await self._records.refresh()  # never doubt a holder because of a stalled watch
            view = await self._observe()
        decision = decide(view, self._config.node, self._clock.monotonic_s())
        self._calm = decision.rule == "leading" or (decision.rule == "following" and view.status.streaming)
        self._note(view, decision)
        if decision.action is not Action.WAIT:
            await self._acts.do(view, decision)
            await self._records.refresh()
        return decision

    def _pause_s(self, decision: Decision) -> float:
        if decision.action is not Action.WAIT:
            return 0.0
        if decision.rule in EAGER_RULES:
            return BUSY_TURN_S
        alive_s = max(self._records.lease_seen_s + TTL_S, self._extensions.given.until_s)
        expiry_s = alive_s - self._clock.monotonic_s()
        turn_s = CALM_TURN_S if self._calm else TURN_S
        return min(turn_s, expiry_s) if expiry_s > 0 else BUSY_TURN_S * 5

    async def _observe(self) -> View:
        records, status = self._records, await self._postgres.status()
        now = self._clock.monotonic_s()
        self._suspicion.saw(status)
        self._unlatched_s = (self._unlatched_s or now) if status.upstream and not status.streaming else 0.0
        data = await self._postgres.data()
        self._extensions.promised(data.promised)
        leading = status.primary() and self._term.epoch > 0
        if leading or (self._term.epoch > 0 and status.ready):
            self._term.healthy()
        replicas = await self._postgres.replicas() if leading else ()
        view = View(  # nothing is awaited from here on: all of one instant
            founders=self._config.voters,
            membership=records.membership(),
            membership_revision=records.mod_revision(keys.membership(self._config.cluster)),
            bootstrap=records.bootstrap(),
            leader=records.leader(),
            leader_revision=records.mod_revision(keys.postgres_leader(self._config.cluster)),
            lease=records.lease(),
            lease_revision=records.lease_revision,
            lease_seen_s=records.lease_seen_s,
            votes=records.votes(),
            doubts=records.doubts(),
            history=records.history(),
            switchover=records.switchover(),
            pause=records.pause(),
            data=data,
            status=status,
            replicas=replicas,
            won_epoch=self._term.epoch,
            complete_lsn=self._acts.complete_lsn,
            complete=self._acts.complete,
            unlatched_s=self._unlatched_s,
            sighting=self._suspicion.sighting,
            extension=self._extensions.given,
        )
        if leading and not view.complete and enough(view, self._config.node):
            self._acts.complete = True
            view = msgspec.structs.replace(view, complete=True)
        return view

    def _note(self, view: View, decision: Decision) -> None:
        """Say what changed: in the log, in the member's record, and the first doubt in the history."""
        config, status = self._config, view.status
        if decision.rule != self._rule:
            log.info("pgha.rule", node=config.node, rule=decision.rule, detail=decision.detail)
            self._rule = decision.rule
        expired = decision.action is Action.VOTE and self._doubted != view.lease_revision
        if expired and view.lease is not None:
            self._doubted = view.lease_revision
            self._journal.record("postgres.lease_lost_seen", _why(view), epoch=view.lease.epoch)
        self._publish(view, status, decision)

    def _publish(self, view: View, status: Status, decision: Decision) -> None:
        config = self._config
        epoch = status.timeline if view.leader is None else view.leader.epoch
        detail = f"{decision.rule}: {decision.detail}" if decision.detail else decision.rule
        self._journal.publish(
            PostgresMember(
                node=config.node,
                region=config.region,
                address=config.address,
                machine_id=config.machine_id,
                role=_role(view, config.node, decision),
                epoch=epoch,
                timeline=status.timeline,
                flushed_lsn=status.flushed_lsn,
                streaming=status.streaming,
                detail=detail,
                updated_at_s=self._clock.wall_s(),
            )
        )

    async def _end(self) -> None:
        """The member is told to end: hand over first, so that nobody waits for the lease."""
        try:
            view = await self._observe()
            if own_term(view, self._config.node) and view.status.primary():
                await self._acts.hand_over(view, "", RETIRE_S)
            await self._postgres.stop(RETIRE_S)
            stopped = Decision(rule="retired")
            self._publish(await self._observe(), Status(), stopped)
            await self._journal.flush()
        except Unavailable as error:
            log.warning("pgha.retire_failed", node=self._config.node, error=str(error))
        finally:
            await self._postgres.kill()

    async def _watch_postgres(self) -> None:
        """Look again at once when our Postgres, or its stream from the primary, has ended."""
        while True:
            await self._postgres.wait_ended()
            self._suspicion.lost_stream()
            self._records.poke()

    async def _keep_checkpointed(self) -> None:
        """A new primary writes a checkpoint in the background, so that others can rewind to it (T11).

        Not before it serves: until then the disk has better to do. Who must rewind sooner asks for one.
        """
        while True:
            await self._acts.serving.wait()
            self._acts.serving.clear()
            try:
                await self._postgres.checkpoint()
            except Unavailable as error:
                log.warning("pgha.checkpoint_failed", node=self._config.node, error=str(error))


def _why(view: View) -> str:
    """Why a round is open."""
    holder = "" if view.lease is None else view.lease.node
    if view.lease is not None and view.lease.released:
        return f"{holder} gave the lease back"
    if doubted(view):
        said = ", ".join(f"{d.evidence} to {d.node}" for d in view.doubts)
        return f"{holder} is gone: {said}"
    return f"{holder} did not renew for {TTL_S} s"


def _role(view: View, node: str, decision: Decision) -> str:
    status = view.status
    if decision.action in ROLES:
        return ROLES[decision.action]
    if decision.rule == "retired":
        return "stopped"
    if status.primary():
        return "primary" if own_term(view, node) else "stopped"
    if not status.ready:
        return "starting"
    return "replica" if status.upstream else "fenced"
