"""etcd's wire format: our values to and from the bytes of etcd's gRPC messages.

Owns every use of etcd3aio's generated messages, which carry no types: requests are built
and answers taken apart here, so that flyd/store/etcd.py is typed throughout and deals
only with connections. Pure functions. Called by etcd.py alone.
"""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from etcd3aio import prefix_range_end
from etcd3aio._protobuf import (
    Compare,
    DeleteRangeRequest,
    LeaseGrantRequest,
    LeaseGrantResponse,
    LeaseKeepAliveRequest,
    LeaseKeepAliveResponse,
    LeaseRevokeRequest,
    PutRequest,
    PutResponse,
    RangeRequest,
    RangeResponse,
    RequestOp,
    TxnRequest,
    TxnResponse,
    WatchCreateRequest,
    WatchRequest,
    WatchResponse,
)

from flyd.ports import Change, Delete, KeyValue, Listing, Put, TxnResult, Unchanged

RANGE = "/etcdserverpb.KV/Range"
PUT = "/etcdserverpb.KV/Put"
TXN = "/etcdserverpb.KV/Txn"
WATCH = "/etcdserverpb.Watch/Watch"
LEASE_GRANT = "/etcdserverpb.Lease/LeaseGrant"
LEASE_REVOKE = "/etcdserverpb.Lease/LeaseRevoke"
LEASE_KEEPALIVE = "/etcdserverpb.Lease/LeaseKeepAlive"

DELETE_EVENT = 1  # mvccpb.Event.DELETE


class WatchAnswer(msgspec.Struct, frozen=True):
    """One message of a watch stream. Without any of these set it only proves life."""

    created: bool
    canceled: bool
    reason: str
    compact_revision: int
    changes: tuple[Change, ...]


def get_request(key: str) -> bytes:
    """One key, linearizable."""
    return RangeRequest(key=key.encode()).SerializeToString()


def list_request(prefix: str) -> bytes:
    """All keys under a prefix, linearizable; etcd answers in key order."""
    first, end = _range(prefix)
    return RangeRequest(key=first, range_end=end).SerializeToString()


def history_request(revision: int) -> bytes:
    """A read of nothing at an old revision, on this member alone: fails if it is compacted."""
    return RangeRequest(key=b"\0", revision=revision, serializable=True, count_only=True).SerializeToString()


def parse_range(data: bytes) -> Listing:
    """The answer to get_request and list_request."""
    answer = RangeResponse.FromString(data)
    return Listing(revision=answer.header.revision, items=tuple(_key_value(kv) for kv in answer.kvs))


def put_request(put: Put) -> bytes:
    """An unconditional put."""
    return _put(put).SerializeToString()


def parse_put(data: bytes) -> int:
    """The put's revision."""
    return PutResponse.FromString(data).header.revision


def txn_request(compares: Sequence[Unchanged], effects: Sequence[Put | Delete]) -> bytes:
    """If all compares hold, all effects. An absent key has mod_revision 0 in etcd too."""
    return TxnRequest(
        compare=[
            Compare(result=Compare.EQUAL, target=Compare.MOD, key=c.key.encode(), mod_revision=c.mod_revision)
            for c in compares
        ],
        success=[_operation(e) for e in effects],
    ).SerializeToString()


def parse_txn(data: bytes) -> TxnResult:
    """Whether the compares held."""
    answer = TxnResponse.FromString(data)
    return TxnResult(succeeded=answer.succeeded, revision=answer.header.revision)


def watch_request(prefix: str, from_revision: int) -> bytes:
    """Open a watch."""
    first, end = _range(prefix)
    create = WatchCreateRequest(key=first, range_end=end, start_revision=from_revision)
    return WatchRequest(create_request=create).SerializeToString()


def progress_request() -> bytes:
    """Ask a watch stream for a sign of life."""
    request = WatchRequest()
    request.progress_request.SetInParent()
    return request.SerializeToString()


def parse_watch(data: bytes) -> WatchAnswer:
    """One message of a watch stream."""
    answer = WatchResponse.FromString(data)
    return WatchAnswer(
        created=answer.created,
        canceled=answer.canceled,
        reason=answer.cancel_reason,
        compact_revision=answer.compact_revision,
        changes=tuple(_change(event) for event in answer.events),
    )


def lease_grant_request(ttl_s: int) -> bytes:
    """A new lease; etcd chooses its id."""
    return LeaseGrantRequest(TTL=ttl_s).SerializeToString()


def parse_lease_grant(data: bytes) -> int:
    """The new lease's id."""
    return LeaseGrantResponse.FromString(data).ID


def lease_keepalive_request(lease: int) -> bytes:
    """Renew a lease once."""
    return LeaseKeepAliveRequest(ID=lease).SerializeToString()


def parse_lease_keepalive(data: bytes) -> int:
    """The TTL granted, 0 if the lease is gone."""
    return LeaseKeepAliveResponse.FromString(data).TTL


def lease_revoke_request(lease: int) -> bytes:
    """End a lease."""
    return LeaseRevokeRequest(ID=lease).SerializeToString()


def _range(prefix: str) -> tuple[bytes, bytes]:
    return (prefix.encode(), prefix_range_end(prefix)) if prefix else (b"\0", b"\0")


def _put(put: Put) -> Any:
    return PutRequest(key=put.key.encode(), value=put.value, lease=put.lease)


def _operation(effect: Put | Delete) -> Any:
    if isinstance(effect, Put):
        return RequestOp(request_put=_put(effect))
    return RequestOp(request_delete_range=DeleteRangeRequest(key=effect.key.encode()))


def _key_value(kv: Any) -> KeyValue:
    return KeyValue(kv.key.decode(), kv.value, kv.mod_revision, kv.create_revision, kv.lease)


def _change(event: Any) -> Change:
    value = None if event.type == DELETE_EVENT else _key_value(event.kv)
    return Change(key=event.kv.key.decode(), value=value, mod_revision=event.kv.mod_revision)
