"""Postgres, as the rest of flyd sees it. Written by pgha, read by the edge and the API."""

from __future__ import annotations

from flyd.model.value import Value


class PostgresLeader(Value, frozen=True, kw_only=True):
    """Key pg/<cluster>/leader: who may be primary. Changed only by a take-over's compare-and-set.

    The endpoint forwards to `address` only while `serving` is true: the primary is complete
    and open for writes in `epoch`.
    """

    cluster: str
    epoch: int
    node: str  # member name, e.g. "chat-db-1"
    address: str  # ip:port of its Postgres
    serving: bool = False
    since_s: float = 0.0


class PostgresMember(Value, frozen=True, kw_only=True):
    """Key pg/<cluster>/members/<node>: what one member last said of itself."""

    node: str
    region: str
    address: str  # ip:port of its Postgres
    machine_id: str = ""
    role: str = "starting"  # starting, primary, replica, fenced, rewinding, copying, stopped
    epoch: int = 0
    timeline: int = 0
    flushed_lsn: int = 0
    streaming: bool = False
    detail: str = ""
    updated_at_s: float = 0.0
