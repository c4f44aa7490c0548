"""The identities of a cluster that is being founded: its authorities, its first hosts, its first person.

Made by the command that founds the cluster, before etcd runs. One of the first hosts, the
founder, finds `founding.json` in its identity folder, puts it into etcd and removes it
(flyd/hosts/membership.py). Loads `cryptography`: for commands, not for the daemon.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flyd.identity.certificates import issue, new_authorities, new_key, public_key, revocation_list
from flyd.identity.folder import Identity, describe
from flyd.identity.subjects import Subject
from flyd.model import Authorities, Founding, Membership, Value
from flyd.ports import Clock, Entropy

USER_LIFETIME_S = 5 * 365 * 86400.0


class FirstHost(Value, frozen=True, kw_only=True):
    """A host that is there from the beginning."""

    name: str
    addresses: tuple[str, ...]
    subnet: str


class Founded(Value, frozen=True, kw_only=True):
    """Everything that founding a cluster makes."""

    founding: Founding
    hosts: Mapping[str, Identity]
    user: Identity


def found(
    hosts: Sequence[FirstHost], user: str, clock: Clock, entropy: Entropy, lifetime_s: float
) -> Founded:
    """Make a new cluster's authorities, and with them its first hosts' and its first person's identity.

    `lifetime_s` is how long a host's certificate lasts; it renews itself after two thirds.
    """
    now_s = clock.wall_s()
    authorities = new_authorities(entropy.token(4), now_s, lifetime_s)
    made = [_first_host(authorities, host, now_s, entropy) for host in hosts]
    return Founded(
        founding=Founding(authorities=authorities, memberships=tuple(m for m, _ in made)),
        hosts={membership.host: identity for membership, identity in made},
        user=user_identity(authorities, user, now_s),
    )


def user_identity(authorities: Authorities, name: str, now_s: float) -> Identity:
    """A person's identity: good for the API of every host, and for nothing else."""
    key = new_key()
    subject = Subject(kind="user", name=name)
    issued = issue(authorities.clients, public_key(key), subject, (), now_s=now_s, lifetime_s=USER_LIFETIME_S)
    return Identity(
        description=describe(
            authorities.cluster_id,
            str(subject),
            expires_at_s=issued.expires_at_s,
            lifetime_s=USER_LIFETIME_S,
        ),
        key=key,
        certificate=issued.certificate_pem,
        hosts=authorities.hosts.certificate_pem,
    )


def _first_host(
    authorities: Authorities, host: FirstHost, now_s: float, entropy: Entropy
) -> tuple[Membership, Identity]:
    key = new_key()
    subject = Subject(kind="host", name=host.name, membership=entropy.token(4))
    issued = issue(
        authorities.hosts,
        public_key(key),
        subject,
        host.addresses,
        now_s=now_s,
        lifetime_s=authorities.lifetime_s,
    )
    membership = Membership(
        host=host.name,
        id=subject.membership,
        public_key=public_key(key),
        addresses=host.addresses,
        subnet=host.subnet,
        joined_at_s=now_s,
        serials={issued.serial: issued.expires_at_s},
    )
    identity = Identity(
        description=describe(
            authorities.cluster_id,
            str(subject),
            expires_at_s=issued.expires_at_s,
            lifetime_s=authorities.lifetime_s,
        ),
        key=key,
        certificate=issued.certificate_pem,
        hosts=authorities.hosts.certificate_pem,
        clients=authorities.clients.certificate_pem,
        expelled=revocation_list(authorities.hosts, (), now_s),
    )
    return membership, identity
