"""The real decisions and the real steps of an agent, one request at a time.

`pgha.decide.decide` chooses, `pgha.acts.Acts` carries out: both as they are. A coroutine cannot be
copied, so an act in progress is kept as the answers that it has had so far, and is run again from its
beginning to learn its next request. All that is remembered, so each is run once.

Replaced: the ports, the journal (silent), the clock (stands still) and `_soon` (no request times out by
itself: whether it is lost is a step of the model). Clocks are not trusted at all: any member
may at any moment take any lease for expired, and the holder takes its own term for valid.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Generator, Hashable
from functools import cache
from typing import Any, NamedTuple, TypeVar, cast
from unittest import mock

import msgspec

from flyd.errors import Unavailable
from flyd.ports import KV
from pgha import acts as pgha_acts
from pgha import keys
from pgha.acts import Acts
from pgha.change import enough
from pgha.decide import decide
from pgha.model import (
    TTL_S,
    YIELD_S,
    Action,
    AgentConfig,
    Data,
    DataState,
    Decision,
    Position,
    Replica,
    Status,
    View,
)
from pgha.observe import ClusterRecords
from pgha.term import Term
from tests.simulation.model.world import (
    CLUSTER,
    NOBODY,
    NODES,
    SYSTEM,
    Etcd,
    Member,
    address,
    began,
    listing,
    timeline,
)

NOW = 1000.0
LONG_AGO = NOW - TTL_S - YIELD_S - 1
T = TypeVar("T")

# What an action's steps look at; the rest of the view is left out, so that acts that go on alike are alike.
LOOKS_AT: dict[Action, tuple[str, ...]] = {
    Action.START: (),
    Action.FOLLOW: (),
    Action.REWIND: (),
    Action.COPY: (),
    Action.VOTE: (),
    Action.TAKE_OVER: ("votes", "leader_revision", "membership_revision"),
    Action.PROMOTE: ("history", "leader_revision"),
    Action.SYNCHRONISE: ("membership",),
    Action.RECONFIGURE: ("leader_revision", "membership_revision"),
    Action.DEMOTE: (),
    Action.RELEASE: (),
}


class Request(NamedTuple):
    """What an act asks of etcd or of its Postgres."""

    name: str
    arguments: tuple[Any, ...] = ()


class Act(NamedTuple):
    """An act in progress: what was decided on what, and the answers so far."""

    number: int
    view: View
    decision: Decision
    etcd: Etcd | None  # as the agent knew it; None where no step looks at it
    answers: tuple[Any, ...] = ()


class Step(NamedTuple):
    """How an act goes on: its next request (None: it ended), and what became of the term on the way."""

    act: int
    request: Request | None
    term: tuple[int, int] | None  # (epoch, lease revision) of a term that began; (0, 0): it ended


_acts: list[Act] = []
_numbers: dict[Act, int] = {}


def forget() -> None:
    """Decide afresh: a mutant came or went."""
    for remembered in (_turns, answered, _step, next_request):
        remembered.cache_clear()
    _acts.clear()
    _numbers.clear()


def describe(act: int) -> str:
    """For a trace."""
    return _acts[act - 1].decision.rule


def turns(number: int, member: Member, etcd: Etcd, last_epoch: int) -> tuple[Step, ...]:
    """What this agent may set out to do on what it sees: by a right clock and by a wrong one."""
    return _turns(number, member._replace(alive=True, renewed=0, act=0), etcd, last_epoch)


@cache
def _turns(number: int, member: Member, etcd: Etcd, last_epoch: int) -> tuple[Step, ...]:
    first: dict[int, Step] = {}
    for seen_s in (NOW, LONG_AGO):
        view = _view(number, member, etcd, seen_s)
        decision = decide(view, NODES[number], NOW)
        if decision.action in LOOKS_AT and decision.epoch <= last_epoch:
            step = _begin(number, view, decision, etcd)
            first[step.act] = step
    return tuple(first.values())


def _begin(number: int, view: View, decision: Decision, etcd: Etcd) -> Step:
    kept = {name: getattr(view, name) for name in LOOKS_AT[decision.action]}
    small = View(founders=NODES, data=Data(system_id=SYSTEM), **kept)
    plain = msgspec.structs.replace(decision, detail="", rule=decision.action.value)
    known = etcd if decision.action is Action.TAKE_OVER else None
    return _step(_number(Act(number, small, plain, known)))


def _number(act: Act) -> int:
    if act not in _numbers:
        _acts.append(act)
        _numbers[act] = len(_acts)
    return _numbers[act]


@cache
def answered(act: int, answer: Hashable) -> Step:
    """The act after its request has got this answer."""
    before = _acts[act - 1]
    return _step(_number(before._replace(answers=(*before.answers, answer))))


@cache
def next_request(act: int) -> Request:
    """What the act asks next."""
    request = _step(act).request
    assert request is not None
    return request


# --------------------------------------------------------------------------- the agent's view


def _view(number: int, member: Member, etcd: Etcd, lease_seen_s: float) -> View:
    records = _records(etcd)
    state = DataState.DAMAGED if member.damaged else DataState.READY
    view = View(
        founders=NODES,
        membership=records.membership(),
        membership_revision=records.mod_revision(keys.membership(CLUSTER)),
        bootstrap=records.bootstrap(),
        leader=records.leader(),
        leader_revision=records.mod_revision(keys.postgres_leader(CLUSTER)),
        lease=records.lease(),
        lease_revision=records.lease_revision,
        lease_seen_s=lease_seen_s,
        votes=records.votes(),
        history=records.history(),
        data=Data(state=state, system_id=SYSTEM, promised=member.promised),
        status=status_of(member),
        won_epoch=member.won,
        replicas=tuple(
            Replica(name=NODES[n], flushed_lsn=lsn)
            for n, lsn in enumerate(member.reports)
            if n != number and lsn
        ),
        complete_lsn=member.complete_lsn,
    )
    # The agent remembers that it was enough; here reports only grow, so it still is.
    return msgspec.structs.replace(view, complete=member.primary() and enough(view, NODES[number]))


def status_of(member: Member) -> Status:
    """What Postgres would say."""
    if not member.up:
        return Status()
    return Status(
        running=True,
        ready=True,
        in_recovery=member.recovering,
        timeline=timeline(member.wal),
        began_lsn=began(member.wal),
        flushed_lsn=len(member.wal),
        replayed_lsn=len(member.wal),
        idle=member.recovering,
        upstream="" if member.upstream == NOBODY else address(member.upstream),
        streaming=member.upstream != NOBODY,
        synchronous=member.synchronous,
    )


@cache
def _records(etcd: Etcd) -> ClusterRecords:
    records = ClusterRecords(CLUSTER, cast(KV, _KV()), cast(Any, _Clock()))
    _feed(records.refresh(), listing(etcd))
    return records


def _feed(work: Awaitable[None], answer: object) -> None:
    """Run what asks for one listing."""
    steps = work.__await__()
    next(steps)
    with contextlib.suppress(StopIteration):
        steps.send(answer)
        raise AssertionError("a listing is one request")


# --------------------------------------------------------------------------- running the real steps


class _Clock:
    """Stands still."""

    def monotonic_s(self) -> float:
        return NOW

    def wall_s(self) -> float:
        return 0.0


class _Ask:
    """A request as something to await."""

    def __init__(self, name: str, *arguments: object) -> None:
        self._request = Request(name, arguments)

    def __await__(self) -> Generator[Request, Any, Any]:
        return (yield self._request)


class _KV:
    """flyd.ports.KV, as far as acts use it."""

    async def get(self, key: str) -> object:
        return await _Ask("get", key)

    async def list(self, prefix: str) -> object:
        return await _Ask("list", prefix)

    async def txn(self, compares: Any, effects: Any) -> object:
        return await _Ask("txn", tuple(compares), tuple(effects))


class _Postgres:
    """pgha.ports.Postgres: every call is a request."""

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: object) -> object:
            return await _Ask(name, *arguments)

        return call


class _Journal:
    """Silent."""

    def record(self, kind: str, message: str, **fields: str | int) -> None:
        """Nothing."""


class _Extensions:
    """A voter never holds back for a word that it gave: that only makes rounds rarer."""

    def close(self, revision: int) -> bool:
        return True


class _Killer:
    """That it may come at any time is a step of the model."""

    def arm(self, deadline_s: float) -> None:
        """Nothing."""


class _Term(Term):
    """The real one, which says what became of it."""

    def __init__(self, node: str) -> None:
        super().__init__(CLUSTER, node, cast(KV, _KV()), cast(Any, _Clock()), _Killer())
        self.became: tuple[int, int] | None = None

    def valid(self) -> bool:
        return True

    def begin(self, epoch: int, revision: int, sent_s: float) -> None:
        self.became = (epoch, revision)

    def end(self) -> None:
        self.became = (0, 0)


async def _no_deadline(request: Awaitable[T]) -> T:
    return await request


@cache
def _step(act: int) -> Step:
    """Run the act from its beginning over the answers that it had, up to its next request."""
    number, view, decision, etcd, answers = _acts[act - 1]
    config = AgentConfig(
        cluster=CLUSTER, node=NODES[number], voters=NODES, region="", address=address(number)
    )
    term = _Term(NODES[number])
    kv, clock = cast(KV, _KV()), cast(Any, _Clock())
    records = ClusterRecords(CLUSTER, kv, clock)
    if etcd is not None:
        _feed(records.refresh(), listing(etcd))
    postgres, journal, extensions = (cast(Any, part()) for part in (_Postgres, _Journal, _Extensions))
    acts = Acts(config, kv, postgres, clock, records, term, journal, extensions)
    with mock.patch.object(pgha_acts, "_soon", _no_deadline):
        steps = acts.do(view, decision).__await__()
        try:
            request = next(steps)
            for answer in answers:
                term.became = None
                request = steps.send(answer)
        except (StopIteration, Unavailable):
            return Step(0, None, term.became)
    return Step(act, request, term.became)


def position_of(member: Member) -> Position:
    """What `fence` answers."""
    return Position(timeline=timeline(member.wal), lsn=len(member.wal))
