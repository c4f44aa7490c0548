"""Views of a Postgres cluster as a member sees it, to be changed by the tests of its decisions."""

from __future__ import annotations

import msgspec

from flyd.model import PostgresLeader
from pgha.membership import settled
from pgha.model import (
    TTL_S,
    YIELD_S,
    Bootstrap,
    Data,
    DataState,
    Lease,
    Lineage,
    Membership,
    Replica,
    Status,
    View,
    Vote,
)

NODES = ("a", "b", "c")
NOW = 1000.0
OLD = NOW - TTL_S - 0.01  # seen so long ago that the lease has run out
LONG_AGO = OLD - YIELD_S


def leader(node: str = "a", epoch: int = 4, *, serving: bool = True) -> PostgresLeader:
    return PostgresLeader(
        cluster="db", epoch=epoch, node=node, address=f"10.0.0.{node}:5432", serving=serving
    )


def vote(node: str, epoch: int = 4, lsn: int = 100) -> Vote:
    return Vote(node=node, revision=50, epoch=epoch, lsn=lsn)


HISTORY = (
    Lineage(epoch=2, node="a", system_id="7", parent=1, switch_lsn=10),
    Lineage(epoch=4, node="a", system_id="7", parent=2, switch_lsn=80),
)
SYNCHRONOUS = settled(NODES).synchronous
STANDBY = Status(
    running=True,
    ready=True,
    timeline=4,
    flushed_lsn=100,
    replayed_lsn=100,
    idle=True,
    upstream=leader().address,
    streaming=True,
    synchronous=SYNCHRONOUS,
)
PRIMARY = Status(
    running=True,
    ready=True,
    in_recovery=False,
    timeline=4,
    flushed_lsn=100,
    replayed_lsn=100,
    synchronous=SYNCHRONOUS,
)
FENCED = msgspec.structs.replace(STANDBY, upstream="", streaming=False)
# A replica of a living leader; every example changes something of it.
CALM = View(
    founders=NODES,
    bootstrap=Bootstrap(node="a"),
    leader=leader(),
    lease=Lease(epoch=4, node="a", count=9),
    lease_revision=50,
    lease_seen_s=NOW - 0.3,
    membership=Membership(quorum=settled(NODES), target=NODES),
    history=HISTORY,
    data=Data(state=DataState.READY, system_id="7", promised=20),
    status=STANDBY,
)
LEADING = msgspec.structs.replace(
    CALM,
    status=PRIMARY,
    won_epoch=4,
    complete_lsn=90,
    replicas=(Replica(name="b", flushed_lsn=95), Replica(name="c", flushed_lsn=85)),
)
PROMISED = Data(state=DataState.READY, system_id="7", promised=50)
ROUND = msgspec.structs.replace(CALM, lease_seen_s=OLD, status=FENCED, data=PROMISED)
EMPTY = msgspec.structs.replace(CALM, data=Data(), status=Status())
NEW = View(founders=NODES)


def but(view: View, **changes: object) -> View:
    return msgspec.structs.replace(view, **changes)
