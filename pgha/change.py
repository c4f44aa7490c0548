"""A change of members: the primary's next step, and what it waits for before it takes it. Pure.

Who is to be a member is written by requests (changes.py); the record is walked by the primary alone, one
compare-and-set at a time (membership.py has the steps). All that a step needs is in etcd and in what Postgres
says now, so whoever is primary next goes on from where the last one was.

Called by pgha/decide.py.
"""

from __future__ import annotations

from pgha.membership import everybody, newcomers, next_step, resting, settled, stepped
from pgha.model import Action, Decision, Membership, Quorum, Replica, View


def quorum_of(view: View) -> Quorum:
    """In force: as recorded; before the first record, of those that the cluster began with."""
    return settled(view.founders) if view.membership is None else view.membership.quorum


def votes(view: View, me: str) -> bool:
    """Whether we have a vote."""
    return me in quorum_of(view).voters


def acknowledging(view: View, me: str, lsn: int) -> int:
    """How many of the others whose word counts have flushed so far."""
    names = quorum_of(view).synchronous.names
    return sum(1 for r in view.replicas if r.name != me and r.name in names and r.flushed_lsn >= lsn)


def enough(view: View, me: str) -> bool:
    """As primary: a quorum of those in force has all that may have been acknowledged before they were."""
    wanted = quorum_of(view).synchronous
    if view.status.synchronous != wanted or view.complete_lsn <= 0:
        return False
    return acknowledging(view, me, view.complete_lsn) >= wanted.acks


def removed(view: View, me: str, now: float) -> Decision | None:
    """We were a member once: whatever we have counts for nothing any more."""
    if view.membership is None or me not in view.membership.retired:
        return None
    return Decision(rule="removed", detail="removed from the cluster: nothing here is needed any more")


def synchronise(view: View, me: str, now: float) -> Decision | None:
    """Our Postgres would wait for others than those whose word counts now."""
    if view.status.synchronous == quorum_of(view).synchronous:
        return None
    return Decision(rule="synchronise", action=Action.SYNCHRONISE)


def onlooker(view: View, me: str, now: float) -> Decision | None:
    """A round is open and we have no vote: not yet, or not any more."""
    if votes(view, me):
        return None
    return Decision(rule="no_vote", detail="no voter yet, or not any more: waiting for the next primary")


def reconfigure(view: View, me: str) -> Decision | None:
    """The next step of a change of members; None: there is nothing to do."""
    record = view.membership
    if record is None:
        first = Membership(quorum=settled(view.founders), target=view.founders)
        return _write("record_members", first, "the members that it began with")
    if resting(record):
        return None
    if me not in record.target:
        return _step_aside(view, record)
    if record.added_lsn == 0:
        noted = Membership(
            quorum=record.quorum,
            target=record.target,
            added_lsn=max(1, view.status.flushed_lsn),
            retired=record.retired,
        )
        return _write("members_change", noted, f"to {', '.join(record.target)}")
    step = next_step(record.quorum, record.target)
    if step is None:
        return None
    waits = _waits_for(view, me, record, step)
    if waits:
        return Decision(rule="members_wait", detail=waits)
    return _write("members_step", stepped(record, step), described(step))


def described(quorum: Quorum) -> str:
    """For a person."""
    acks, names = quorum.synchronous.acks, ", ".join(quorum.synchronous.names)
    return (
        f"any {quorum.votes} of {', '.join(quorum.voters)} elect; "
        f"the primary and any {acks} other{'s' if acks > 1 else ''} of {names} acknowledge"
    )


def _write(rule: str, membership: Membership, detail: str) -> Decision:
    return Decision(rule=rule, action=Action.RECONFIGURE, membership=membership, detail=detail)


def _step_aside(view: View, record: Membership) -> Decision:
    """We are to be removed and became primary meanwhile: one that stays takes over first."""
    stay = [n for n in record.target if n in record.quorum.voters]
    best = max(
        (r for r in view.replicas if r.streaming and r.name in stay),
        key=lambda r: r.flushed_lsn,
        default=None,
    )
    if best is None:
        return Decision(rule="members_wait", detail="we are to be removed; nobody who stays streams")
    return Decision(rule="members_step_aside", action=Action.STEP_DOWN, target=best.name)


def _waits_for(view: View, me: str, record: Membership, step: Quorum) -> str:
    """Why this step can not be taken yet; nothing: it can."""
    now, streaming = record.quorum, {r.name: r for r in view.replicas if r.streaming and r.name != me}
    for name in newcomers(now, step):
        if name != me and not _caught_up(streaming.get(name), record.added_lsn):
            return f"{name} does not have yet what there was when it was added"
    if step.voters != now.voters and not view.complete:
        return "no quorum of the synchronous members has yet all that was acknowledged before"
    return _poorer(now, step, set(streaming), me)


def _caught_up(replica: Replica | None, lsn: int) -> bool:
    return replica is not None and replica.flushed_lsn >= lsn


def _poorer(now: Quorum, step: Quorum, streaming: set[str], me: str) -> str:
    """What would work no more after this step, if it works now: acknowledging, and electing without us."""

    def acks(quorum: Quorum) -> bool:
        return len(streaming.intersection(quorum.synchronous.names)) >= quorum.synchronous.acks

    def elects(quorum: Quorum) -> bool:
        return len(streaming.intersection(quorum.voters)) >= quorum.votes

    missing = ", ".join(n for n in everybody(step) if n != me and n not in streaming)
    if acks(now) and not acks(step):
        return f"commits would hang: {missing} does not stream"
    if elects(now) and not elects(step):
        return f"nobody could be elected without us: {missing} does not stream"
    return ""
