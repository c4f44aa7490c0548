"""The nouns of the Postgres controller, as frozen values.

The first half is stored in etcd (pgha/keys.py says under which keys), the second half is
what an agent sees and decides. An *epoch* is one uninterrupted term of one primary, and it
is also the number of its Postgres timeline: the controller chooses both. Epoch 1 is the
`initdb` that nobody ever served from; the first primary is epoch 2.

No behaviour here beyond what follows from a value itself.
"""

from __future__ import annotations

from enum import StrEnum

from flyd.model import PostgresLeader, Value

FIRST_TIMELINE = 1
ANY_EPOCH = -1
RENEW_S = 0.4  # the holder rewrites the lease this often
TTL_S = 2.0  # a candidate that has seen the lease unchanged for this long opens a round
MARGIN_S = 0.5  # the holder is dead this much earlier, counted from before it sent its last renewal
YIELD_S = 1.0  # how long a voter leaves the first move to the preferred one
REFUSED_S = 0.1  # the primary's port refuses for this long: its agent had time to give the lease back itself
LATE_S = 0.5  # a lease this old is overdue: voters begin to ask the primary whether it is there
SILENT_S = 0.4  # the primary leaves questions unanswered for this long, and ...
OVERDUE_S = 0.9  # ... its lease is this old: two renewals are missing
PLEA_S = 0.6  # a holder whose last renewal is this old asks the voters to bear with it
GRACE_S = 3.0  # voters bear with it while etcd has left a question of theirs unanswered this recently
LATCH_S = 30.0  # a follower that cannot stream from a serving leader for this long copies it afresh

# --------------------------------------------------------------------------- stored in etcd


class Lease(Value, frozen=True, kw_only=True):
    """The holder's sign of life: rewritten by compare-and-set; its mod_revision names a round.

    `released` says that the holder's Postgres is down and a round may start at once;
    `target` is the member that a planned switchover prefers.
    """

    epoch: int
    node: str
    count: int = 0  # grows with each renewal, so that a lost answer can be read back
    released: bool = False
    target: str = ""


class Vote(Value, frozen=True, kw_only=True):
    """Where one member's flushed WAL ends, said after it closed itself to the old primary."""

    node: str
    revision: int  # the lease's mod_revision that this vote was cast against
    epoch: int  # of its last WAL: its timeline
    lsn: int  # end of its flushed WAL
    system_id: str = ""

    def position(self) -> tuple[int, int]:
        """What votes are compared by: a newer epoch beats any LSN of an older one."""
        return (self.epoch, self.lsn)


class Doubt(Value, frozen=True, kw_only=True):
    """One voter's word that the holder of the lease is gone, from what it saw itself.

    Enough of them on one lease revision open a round before the lease has run out.
    """

    node: str
    revision: int  # the lease's mod_revision that it is about
    evidence: str  # "refused" or "silent"


class Lineage(Value, frozen=True, kw_only=True):
    """Where an epoch's timeline left its parent. `switch_lsn` 0: taken over, not promoted yet."""

    epoch: int
    node: str
    system_id: str
    parent: int = 0  # the timeline that it left
    switch_lsn: int = 0


class Bootstrap(Value, frozen=True, kw_only=True):
    """Who may run `initdb` for this cluster: written once, never changed."""

    node: str


class Synchronous(Value, frozen=True, kw_only=True):
    """Whose flushed WAL acknowledges a commit: the primary's own and that of any `acks` others of `names`."""

    names: tuple[str, ...] = ()
    acks: int = 0


class Quorum(Value, frozen=True, kw_only=True):
    """Both kinds of quorum: any `votes` of `voters` elect, and what acknowledges a commit.

    In order of preference. Both have the same members unless a change of them is half-way.
    """

    voters: tuple[str, ...]
    votes: int
    synchronous: Synchronous


class Membership(Value, frozen=True, kw_only=True):
    """Who the members are, and who they are to be. Requests write `target`, the primary the rest, stepwise.

    `added_lsn`: where flushed WAL ended when the primary first saw this target; 0: it has not yet.
    """

    quorum: Quorum
    target: tuple[str, ...]
    added_lsn: int = 0
    retired: tuple[str, ...] = ()  # removed; a name never comes back: its promises went with its disk


class Switchover(Value, frozen=True, kw_only=True):
    """A person's wish that the primary moves; to `target`, or to the best replica if empty."""

    target: str = ""
    requested_at_s: float = 0.0


class Pause(Value, frozen=True, kw_only=True):
    """A person's word that nothing is to move or to be copied over by itself, until they take it back."""

    reason: str = ""
    since_s: float = 0.0


class Backup(Value, frozen=True, kw_only=True):
    """A base backup: wished for, and later what became of it. `error`: it failed."""

    name: str
    requested_at_s: float = 0.0
    node: str = ""
    epoch: int = 0
    began_at_s: float = 0.0
    finished_at_s: float = 0.0  # earliest instant that it can be restored to
    size_bytes: int = 0
    error: str = ""


# --------------------------------------------------------------------------- what an agent sees


class AgentConfig(Value, frozen=True, kw_only=True):
    """Who this member is. Constant for its life."""

    cluster: str
    node: str
    voters: tuple[str, ...]  # that the cluster began with; etcd's record of its members overrides them
    region: str
    address: str  # ip:port of its Postgres
    machine_id: str = ""


class DataState(StrEnum):
    """What a member's data directory is worth."""

    EMPTY = "empty"
    READY = "ready"
    DAMAGED = "damaged"  # a copy or rewind began and did not finish: only a fresh copy helps


class Data(Value, frozen=True, kw_only=True):
    """A member's disk: the data directory and the promise that it must keep."""

    state: DataState = DataState.EMPTY
    system_id: str = ""
    promised: int = 0  # lease revision of the newest vote begun; fenced until a newer one is seen


class Status(Value, frozen=True, kw_only=True):
    """What Postgres says of itself now. Not `ready`: it runs but takes no connections yet.

    `synchronous` is in force in every process of it: none acknowledges by an earlier one any more.
    """

    running: bool = False
    ready: bool = False
    in_recovery: bool = True
    timeline: int = 0  # of the last flushed WAL
    began_lsn: int = 0  # where this timeline left its parent, by our own copy of its history; 0: unknown
    flushed_lsn: int = 0
    replayed_lsn: int = 0
    idle: bool = False  # in recovery, all local WAL is replayed
    upstream: str = ""  # ip:port that it is told to stream from; empty: fenced
    streaming: bool = False
    synchronous: Synchronous = Synchronous()

    def primary(self) -> bool:
        """Out of recovery: it would take writes."""
        return self.running and self.ready and not self.in_recovery


class Replica(Value, frozen=True, kw_only=True):
    """A standby as its primary sees it."""

    name: str
    flushed_lsn: int
    streaming: bool = True


class Answer(StrEnum):
    """What came back when a voter asked at the primary's address whether there is a Postgres."""

    ANSWERED = "answered"
    REFUSED = "refused"  # the host says that nobody listens
    SILENT = "silent"  # nothing came back in time


class Sighting(Value, frozen=True, kw_only=True):
    """An unbroken series of bad answers from the primary of `epoch`; 0: there is none of that kind."""

    epoch: int = 0
    refused_since_s: float = 0.0  # when the first of them was asked
    silent_since_s: float = 0.0


class Plea(Value, frozen=True, kw_only=True):
    """The holder of an epoch cannot renew its lease: may it go on for a while?"""

    cluster: str
    node: str
    epoch: int


class Extension(Value, frozen=True, kw_only=True):
    """A voter's word to the holder of `epoch`: no vote of mine against you before `until_s`.

    Kept in memory. A voter that has just begun cannot know what it said before: `ANY_EPOCH`.
    """

    epoch: int = 0
    until_s: float = 0.0


class Position(Value, frozen=True, kw_only=True):
    """Where flushed WAL ends."""

    timeline: int
    lsn: int


class View(Value, frozen=True, kw_only=True):
    """All that one decision may look at. Times are this agent's monotonic clock.

    The revisions are of what the view shows: an act compares with these, never with what came in since.
    """

    founders: tuple[str, ...]  # the members that the cluster began with: all of them until there is a record
    membership: Membership | None = None
    membership_revision: int = 0
    bootstrap: Bootstrap | None = None
    leader: PostgresLeader | None = None
    leader_revision: int = 0
    lease: Lease | None = None
    lease_revision: int = 0
    lease_seen_s: float = 0.0  # when this agent first saw this revision
    votes: tuple[Vote, ...] = ()  # cast against this revision
    doubts: tuple[Doubt, ...] = ()  # of this revision
    history: tuple[Lineage, ...] = ()
    switchover: Switchover | None = None
    pause: Pause | None = None
    data: Data = Data()
    status: Status = Status()
    replicas: tuple[Replica, ...] = ()  # while primary
    won_epoch: int = 0  # taken over by this very process; forgotten by a restart
    complete_lsn: int = 0  # while primary: what a quorum of those in force must have before it may serve
    complete: bool = False  # ... and has had
    unlatched_s: float = 0.0  # since when it follows without streaming; 0: it streams
    sighting: Sighting = Sighting()  # of the present leader, by this agent itself
    extension: Extension = Extension()  # given by this very process


class Action(StrEnum):
    """What an agent can do next."""

    WAIT = "wait"
    CLAIM_BOOTSTRAP = "claim_bootstrap"
    INITIALISE = "initialise"
    START = "start"
    COPY = "copy"
    REWIND = "rewind"
    FOLLOW = "follow"
    DOUBT = "doubt"
    VOTE = "vote"
    TAKE_OVER = "take_over"
    PROMOTE = "promote"
    SERVE = "serve"
    DEMOTE = "demote"
    RELEASE = "release"
    STEP_DOWN = "step_down"
    SYNCHRONISE = "synchronise"
    RECONFIGURE = "reconfigure"
    REFUSE_SWITCHOVER = "refuse_switchover"


class Decision(Value, frozen=True, kw_only=True):
    """One action and the name of the rule that chose it."""

    rule: str
    action: Action = Action.WAIT
    address: str = ""  # COPY, REWIND, FOLLOW: from whom
    epoch: int = 0  # TAKE_OVER, PROMOTE: which
    revision: int = 0  # DOUBT, VOTE, TAKE_OVER: the lease revision it is about
    target: str = ""  # STEP_DOWN: to whom
    membership: Membership | None = None  # RECONFIGURE: the record as it is to be
    detail: str = ""
