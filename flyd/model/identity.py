"""Who belongs to the cluster, as etcd holds it: its authorities, hosts' memberships, join tokens."""

from __future__ import annotations

from flyd.model.value import Value


class Authority(Value, frozen=True, kw_only=True):
    """One certificate authority: its certificate, and the key that signs; PEM."""

    certificate_pem: str
    key_pem: str


class Authorities(Value, frozen=True, kw_only=True):
    """Both authorities of a cluster, and how long the certificates of hosts last, in seconds."""

    cluster_id: str
    hosts: Authority
    clients: Authority
    lifetime_s: float


class Membership(Value, frozen=True, kw_only=True):
    """One host's stay in the cluster, from its joining to its being expelled.

    `serials` maps the serial numbers (hex) of its certificates to when each ends. A host that joins
    again keeps those of its former stay, refused, until they have ended.
    """

    host: str
    id: str
    public_key: str  # PEM; the same through all renewals
    addresses: tuple[str, ...]  # where it answers: its certificate is good for these
    subnet: str  # first octets of its machines' addresses, e.g. "10.211"; no other host has them
    joined_at_s: float
    serials: dict[str, float] = {}
    refused: tuple[str, ...] = ()  # those of `serials` that nobody accepts any more
    expelled_at_s: float = 0.0
    expelled_by: str = ""


class Founding(Value, frozen=True, kw_only=True):
    """What the founding host puts into a new cluster's etcd."""

    authorities: Authorities
    memberships: tuple[Membership, ...]


class JoinToken(Value, frozen=True, kw_only=True):
    """Leave for one host to join, once, until `expires_at_s`. Kept when used: a second use is told why."""

    id: str
    created_at_s: float
    expires_at_s: float
    created_by: str
    used_by: str = ""  # the host
    used_at_s: float = 0.0
    membership: str = ""  # of that host
