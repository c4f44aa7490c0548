"""Everything that may happen next in a state of the model, each with a name for the trace.

`Bounds` says how much of it. Mutants are put in by replacing one of these functions (mutants.py).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import msgspec

from flyd.model import encode
from flyd.ports import Put, TxnResult, Unchanged
from pgha import keys
from pgha.membership import retargeted
from pgha.membership import settled as settled_quorum
from pgha.model import Lease, Synchronous
from tests.simulation.model import acts
from tests.simulation.model.world import (
    CLUSTER,
    NOBODY,
    NODES,
    Budget,
    Entry,
    Member,
    World,
    accepts,
    began,
    get,
    number_at,
    put,
    read,
    settled,
    shared,
    timeline,
    txn,
)

# Done together with the step before: nobody else sees them, and what comes after a pause here could as well
# have come after a pause before that step. (A promise without being closed forces a vote, which
# a clock that may be wrong allows anyway.)
AT_ONCE = ("get", "save_promise", "fence", "kill", "start", "status")


class Bounds(msgspec.Struct, frozen=True):
    """How far a history goes."""

    rows: int = 0  # that clients write
    renewals: int = 0  # of a lease
    crashes: int = 0  # of a Postgres, of an agent, in the middle of a rewind
    losses: int = 0  # requests to etcd that do not arrive, or whose answer does not
    last_epoch: int = 3  # the first is 2
    members: int = 3  # at the beginning
    changes: int = 0  # of the wish who the members are to be: c or not c

    def budget(self) -> Budget:
        """At the beginning."""
        return Budget(self.rows, self.renewals, self.crashes, self.losses, self.changes)


Next = tuple[str, World]


def successors(world: World, bounds: Bounds) -> Iterator[Next]:
    """Every next state."""
    return ((label, settled(after)) for label, after in _successors(world, bounds))


def _successors(world: World, bounds: Bounds) -> Iterator[Next]:
    yield from _operator(world)
    for number, member in enumerate(world.members):
        name = NODES[number]
        yield from _clients(world, number, member, name)
        yield from _stream(world, number, member, name)
        if member.alive:
            yield from _agent(world, number, member, name, bounds)
            yield from _renew(world, number, member, name)
        yield from _crash(world, number, member, name)


def _operator(world: World) -> Iterator[Next]:
    """Somebody wants c to be a member, or not any more; also half-way there."""
    record = read(world.etcd).membership
    if not world.budget.changes or NODES[2] in record.retired:
        return
    target = NODES[:2] if NODES[2] in record.target else NODES
    key = keys.membership(CLUSTER)
    etcd = txn(world.etcd, (), (Put(key, encode(retargeted(record, target))),))
    assert etcd is not None
    poorer = world.budget._replace(changes=world.budget.changes - 1)
    yield f"the members are to be {' '.join(target)}", world._replace(etcd=etcd, budget=poorer)


def down(member: Member) -> Member:
    """Its Postgres is dead."""
    return member._replace(up=False, recovering=True, upstream=NOBODY, reports=(0, 0, 0))


# --------------------------------------------------------------------------- Postgres by itself


def _clients(world: World, number: int, member: Member, name: str) -> Iterator[Next]:
    if not member.primary():
        return
    budget, mine = world.budget, timeline(member.wal)
    if budget.rows:
        late = read(world.etcd).leader.epoch > mine
        wal = (*member.wal, Entry(mine, budget.rows, late))
        after = put(world, number, member._replace(wal=wal))
        yield f"{name} writes row {budget.rows}", after._replace(budget=budget._replace(rows=budget.rows - 1))


def _stream(world: World, number: int, member: Member, name: str) -> Iterator[Next]:
    """One more entry from its upstream, or only word of what it has."""
    if not member.up or member.upstream == NOBODY:
        return
    sender = world.members[member.upstream]
    if not sender.up or not accepts(sender.wal, member.wal):
        return
    wal = sender.wal[: len(member.wal) + 1] if len(sender.wal) > len(member.wal) else member.wal
    wal = (*member.wal, *wal[len(member.wal) :])
    reports = sender.reports
    if sender.primary():
        reports = (*reports[:number], len(wal), *reports[number + 1 :])
    if wal != member.wal or reports != sender.reports:
        after = put(world, number, member._replace(wal=wal))
        yield f"{name} flushes {len(wal)}", put(after, member.upstream, sender._replace(reports=reports))


def _crash(world: World, number: int, member: Member, name: str) -> Iterator[Next]:
    """Agents start again by themselves; the first thing that they do is to kill Postgres."""
    if not member.alive:
        yield f"agent of {name} starts", put(world, number, down(member)._replace(alive=True))
    if not world.budget.crashes:
        return
    poorer = world._replace(budget=world.budget._replace(crashes=world.budget.crashes - 1))
    if member.up:
        yield f"Postgres of {name} dies", put(poorer, number, down(member))
    if member.alive:
        founders = settled_quorum(NODES).synchronous  # all that a new agent knows of
        gone = member._replace(alive=False, won=0, renewed=0, act=0, synchronous=founders)
        yield f"agent of {name} dies", put(poorer, number, gone)


# --------------------------------------------------------------------------- the term


def _renew(world: World, number: int, member: Member, name: str) -> Iterator[Next]:
    """pgha.term: one compare-and-set, after reading back what an unanswered one did."""
    if not member.won:
        return
    said = read(world.etcd)
    lease = said.lease
    if lease.node != name or lease.epoch != member.won or lease.released:
        yield f"{name} loses its lease", put(world, number, member._replace(won=0, renewed=0))
        return
    if said.lease_revision != member.renewed:
        yield f"{name} reads its lease", put(world, number, member._replace(renewed=said.lease_revision))
        return
    if not world.budget.renewals:
        return
    value = encode(Lease(epoch=member.won, node=name, count=lease.count + 1))
    key = keys.lease(CLUSTER)
    etcd = txn(world.etcd, (Unchanged(key, member.renewed),), (Put(key, value),))
    assert etcd is not None
    after = world._replace(etcd=etcd, budget=world.budget._replace(renewals=world.budget.renewals - 1))
    yield f"{name} renews", put(after, number, member._replace(renewed=etcd.revision))
    if world.budget.losses:
        poorer = after.budget._replace(losses=world.budget.losses - 1)
        yield f"{name} renews, unanswered", after._replace(budget=poorer)


# --------------------------------------------------------------------------- the agent


def _agent(world: World, number: int, member: Member, name: str, bounds: Bounds) -> Iterator[Next]:
    if member.act == 0:
        for step in acts.turns(number, member, world.etcd, bounds.last_epoch):
            what = f"{name} sets out to {acts.describe(step.act)}"
            yield what, at_once(put(world, number, _went_on(member, step)), number)
        return
    yield from _request(world, number, member, name)


def _went_on(member: Member, step: acts.Step) -> Member:
    """The member once its act has come to its next request."""
    member = member._replace(act=step.act if step.request is not None else 0)
    if step.term is not None:
        member = member._replace(won=step.term[0], renewed=step.term[1])
    return member


def _request(world: World, number: int, member: Member, name: str) -> Iterator[Next]:
    request = acts.next_request(member.act)
    what = f"{name}: {request.name}"
    if request.name == "txn":
        yield from _transaction(world, number, member, what, request)
        return
    for label, changed, answer in _effects(world, number, member, request):
        if changed is None:  # it failed: the agent looks again
            yield f"{what} {label}", put(world, number, member._replace(act=0))
            continue
        after = put(world, number, changed)
        if changed.primary() and not member.primary():
            owner = (timeline(changed.wal), number)
            after = after._replace(owners=tuple(sorted((*world.owners, owner))))
        yield f"{what} {label}", answer_to(after, number, answer)


def answer_to(world: World, number: int, answer: Hashable) -> World:
    """The act goes on with this answer."""
    member = world.members[number]
    step = acts.answered(member.act, answer)
    return at_once(put(world, number, _went_on(member, step)), number)


def at_once(world: World, number: int) -> World:
    """The act through what nobody else can see, if that is next."""
    member = world.members[number]
    if member.act == 0 or (request := acts.next_request(member.act)).name not in AT_ONCE:
        return world
    _, changed, answer = next(_effects(world, number, member, request))
    if changed is None:
        return put(world, number, member._replace(act=0))
    return answer_to(put(world, number, changed), number, answer)


def _transaction(
    world: World, number: int, member: Member, what: str, request: acts.Request
) -> Iterator[Next]:
    compares, effects = request.arguments
    etcd = txn(world.etcd, compares, effects)
    result = TxnResult(etcd is not None, (etcd or world.etcd).revision)
    done = world if etcd is None else world._replace(etcd=etcd)
    yield f"{what} {'succeeds' if etcd else 'fails'}", answer_to(done, number, result)
    if world.budget.losses:
        poorer = world.budget._replace(losses=world.budget.losses - 1)
        lost = put(world, number, member._replace(act=0))._replace(budget=poorer)
        yield f"{what} is lost", lost
        if etcd is not None:
            yield f"{what} succeeds, unanswered", lost._replace(etcd=etcd)


Effect = tuple[str, Member | None, Hashable]


def _effects(world: World, number: int, member: Member, request: acts.Request) -> Iterator[Effect]:
    """What a request that is no transaction does to this member, and its answer."""
    arguments: tuple[Any, ...] = request.arguments
    match request.name:
        case "get":
            yield "", member, get(world.etcd, arguments[0])
        case "save_promise":
            yield "", member._replace(promised=max(member.promised, arguments[0])), None
        case "kill":
            yield "", down(member), None
        case "start":
            yield "", (member if member.up else down(member)._replace(up=True)), None
        case "status":
            yield "", member, acts.status_of(member)
        case "rewind" | "copy":
            yield from _restore(world, member, request.name, number_at(arguments[0]))
        case _ if not member.up:
            yield "fails", None, None
        case "fence":
            yield "", fence(member), acts.position_of(member)
        case "follow":
            yield arguments[0], member._replace(upstream=number_at(arguments[0])), None
        case "synchronise":
            yield "", synchronise(member, arguments[0]), len(member.wal)
        case "promote":
            yield str(arguments[0]), *promote(member, arguments[0])
        case other:
            raise AssertionError(f"the model knows no {other}")


def fence(member: Member) -> Member:
    """The walreceiver is gone and stays away."""
    return member._replace(upstream=NOBODY)


def synchronise(member: Member, wanted: Synchronous) -> Member:
    """Its walsenders are new: they know of nobody's WAL until they are told."""
    return member._replace(synchronous=wanted, reports=(0, 0, 0), complete_lsn=len(member.wal))


def promote(member: Member, epoch: int) -> tuple[Member, int]:
    """Out of recovery on this timeline, and where that left its parent."""
    if not member.recovering:
        return member, began(member.wal)
    wal = (*member.wal, Entry(epoch))
    promoted = member._replace(wal=wal, recovering=False, upstream=NOBODY, reports=(0, 0, 0))
    promoted = promoted._replace(complete_lsn=len(wal))
    return promoted, len(member.wal)


def _restore(world: World, member: Member, how: str, source: int) -> Iterator[Effect]:
    """pg_rewind or a fresh copy. A crash in the middle leaves data that is no use."""
    sender = world.members[source]
    if not sender.primary():
        yield "fails", None, None
        return
    kept = shared(member.wal, sender.wal)
    wal = member.wal[:kept] if how == "rewind" else sender.wal
    yield "", down(member)._replace(wal=wal, damaged=False), True
    if world.budget.crashes and not member.damaged:
        yield "is cut short", down(member)._replace(wal=wal[:1], damaged=True), False
