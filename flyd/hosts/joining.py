"""How hosts come into the cluster and are put out of it: join tokens, memberships, renewals.

Decisions are compares in etcd: a token is used by whoever's transaction is first; a host's name
and its machines' subnet belong to one membership. A host that asks again with the same key (its
first answer got lost) gets a certificate of the same membership. What is signed is signed after
the transaction, so no certificate is given out that etcd does not know.

Called by the API (flyd/api/identity.py) and by the host's own loop (flyd/hosts/identity.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from flyd.errors import Conflict, Denied, InvalidInput, NotFound, Refused
from flyd.identity.signing import Issue, MakeToken, Signed, sign
from flyd.identity.subjects import TOLD_FOR_S, Subject, check_host_name
from flyd.model import Authorities, JoinToken, Membership, Value, decode, encode
from flyd.ports import KV, Clock, Delete, Entropy, Put, Unchanged
from flyd.store import keys

MAX_TOKEN_S = 30 * 86400.0
TOKEN_BYTES = 8
MEMBERSHIP_BYTES = 4
SUBNET_NUMBERS = range(1, 255)


class Newcomer(Value, frozen=True, kw_only=True):
    """A host that wants to join: what it says of itself."""

    name: str
    addresses: tuple[str, ...]
    subnet: str  # empty: the next free one
    public_key: str


class Joined(Value, frozen=True, kw_only=True):
    """What a host that joined is given."""

    authorities: Authorities
    membership: Membership
    certificate: Signed


async def authorities(kv: KV) -> Authorities:
    """The cluster's authorities."""
    found = await kv.get(keys.AUTHORITIES)
    if found is None:
        raise NotFound(
            "this cluster has no authorities yet",
            hint="The founding host puts them into etcd when it starts: is its flyd up?",
        )
    return decode(found.value, Authorities)


async def create_token(
    kv: KV, api: Sequence[str], lifetime_s: float, created_by: str, *, clock: Clock, entropy: Entropy
) -> tuple[JoinToken, str]:
    """A new join token: its record, and its text, which is kept nowhere."""
    if not 0 < lifetime_s <= MAX_TOKEN_S:
        raise InvalidInput(
            f"a join token can not last {lifetime_s:g} s",
            hint=f"More than nothing, and at most {MAX_TOKEN_S / 86400:g} days.",
        )
    signers = await authorities(kv)
    now_s = clock.wall_s()
    token = JoinToken(
        id=entropy.token(TOKEN_BYTES),
        created_at_s=now_s,
        expires_at_s=now_s + lifetime_s,
        created_by=created_by,
    )
    old = [decode(item.value, JoinToken) for item in (await kv.list(keys.TOKENS)).items]
    forgotten = [Delete(keys.token(t.id)) for t in old if t.expires_at_s + TOLD_FOR_S < now_s]
    await kv.txn([], [Put(keys.token(token.id), encode(token)), *forgotten])
    made = await sign(
        MakeToken(
            authority=signers.clients,
            hosts_certificate=signers.hosts.certificate_pem,
            token_id=token.id,
            api=tuple(api),
            now_s=now_s,
            lifetime_s=lifetime_s,
        )
    )
    return token, made.text


async def join(kv: KV, token_id: str, newcomer: Newcomer, *, clock: Clock, entropy: Entropy) -> Joined:
    """Use the token and make the newcomer a member; asked again with the same key, the same member."""
    check_host_name(newcomer.name)
    signers = await kv.get(keys.AUTHORITIES)
    stored = await kv.get(keys.token(token_id))
    if signers is None or stored is None:
        raise Denied("this cluster knows no such join token", hint="`fly hosts token` makes one.")
    token = decode(stored.value, JoinToken)
    members = {
        keys.last_part(item.key): (decode(item.value, Membership), item.mod_revision)
        for item in (await kv.list(keys.MEMBERSHIPS)).items
    }
    held, revision = members.get(newcomer.name, (None, 0))
    if token.used_by:
        if held is None or held.id != token.membership or held.public_key != newcomer.public_key:
            raise Denied(
                f"this join token was used already, by {token.used_by}",
                hint="A token lets one host in, once. `fly hosts token` makes another.",
            )
        return await _certify(kv, decode(signers.value, Authorities), held, clock)
    now_s = clock.wall_s()
    if token.expires_at_s < now_s:
        raise Denied(
            f"this join token expired {now_s - token.expires_at_s:.0f} s ago",
            hint="`fly hosts token --ttl 24h` makes one that lasts longer.",
        )
    if held is not None and not held.expelled_at_s:
        raise Conflict(
            f"a host called {newcomer.name} is a member already",
            hint=f"Choose another --name; if it is gone for good: fly hosts expel {newcomer.name}",
        )
    others = [m for m, _ in members.values() if m.host != newcomer.name]
    membership = Membership(
        host=newcomer.name,
        id=entropy.token(MEMBERSHIP_BYTES),
        public_key=newcomer.public_key,
        addresses=newcomer.addresses,
        subnet=choose_subnet(newcomer.subnet, held, others),
        joined_at_s=now_s,
        serials=held.serials if held else {},  # those of its former stay stay refused
        refused=tuple(sorted(held.serials)) if held else (),
    )
    used = replace(token, used_by=newcomer.name, used_at_s=now_s, membership=membership.id)
    done = await kv.txn(
        [
            Unchanged(keys.token(token.id), stored.mod_revision),
            Unchanged(keys.membership(newcomer.name), revision),
            # Joins go one after the other: each rewrites this key, so no two choose one subnet.
            Unchanged(keys.AUTHORITIES, signers.mod_revision),
        ],
        [
            Put(keys.token(token.id), encode(used)),
            Put(keys.membership(newcomer.name), encode(membership)),
            Put(keys.AUTHORITIES, signers.value),
        ],
    )
    if not done.succeeded:
        raise Conflict("another host joined at this very moment", hint="Try again: the token is still good.")
    return await _certify(kv, decode(signers.value, Authorities), membership, clock)


def choose_subnet(wanted: str, former: Membership | None, others: Sequence[Membership]) -> str:
    """The newcomer's own: what it asks for, what it had, or the first free one beside the others'."""
    taken = {m.subnet: m.host for m in others}
    if wanted in taken:
        raise Conflict(
            f"the subnet {wanted} belongs to {taken[wanted]}",
            hint="Leave --subnet out: a free one is chosen.",
        )
    if wanted:
        return wanted
    if former is not None and former.subnet not in taken:
        return former.subnet
    first = min((m.subnet for m in others), default="10.211").partition(".")[0]
    numbers = [int(s.partition(".")[2]) for s in taken if s.startswith(f"{first}.")]
    begin = min(numbers, default=SUBNET_NUMBERS.start)
    for number in (*range(begin, SUBNET_NUMBERS.stop), *range(SUBNET_NUMBERS.start, begin)):
        if f"{first}.{number}" not in taken:
            return f"{first}.{number}"
    raise Refused(f"every subnet of {first}.0.0.0/8 is taken", hint="Give a free one: --subnet A.B")


async def renew(kv: KV, host: str, membership_id: str, *, clock: Clock) -> Joined:
    """A new certificate for a host that is a member; its key stays."""
    signers = await authorities(kv)
    stored = await kv.get(keys.membership(host))
    if stored is None:
        raise Denied(f"{host} is no member of this cluster")
    membership = decode(stored.value, Membership)
    if membership.id != membership_id or membership.expelled_at_s:
        raise expelled_error(membership)
    return await _certify(kv, signers, membership, clock)


async def expel(kv: KV, host: str, by: str, *, empty: bool, clock: Clock) -> Membership:
    """Put a host out: from now on nobody talks to it. Its name can join again with a new token.

    The description of an `empty` host goes, too; any other stays, lost, as what its machines are on.
    """
    stored = await kv.get(keys.membership(host))
    if stored is None:
        raise NotFound(f"no host is called {host!r}", hint="`fly hosts list` shows the hosts.")
    membership = decode(stored.value, Membership)
    if membership.expelled_at_s:
        return membership
    marked = replace(
        membership, expelled_at_s=clock.wall_s(), expelled_by=by, refused=tuple(sorted(membership.serials))
    )
    described = (keys.host(host), keys.alive(host), keys.reservations(host)) if empty else ()
    done = await kv.txn(
        [Unchanged(keys.membership(host), stored.mod_revision)],
        [Put(keys.membership(host), encode(marked)), *(Delete(key) for key in described)],
    )
    if not done.succeeded:
        raise Conflict(f"{host} renewed its certificate at this very moment", hint="Try again.")
    return marked


def expelled_error(membership: Membership) -> Denied:
    """Why a host that was put out is not let in."""
    by = f" by {membership.expelled_by}" if membership.expelled_by else ""
    return Denied(
        f"host {membership.host} was expelled from this cluster{by}",
        hint="It can join again with a new token: `fly hosts token`, then `fly hosts join` on it.",
    )


async def _certify(kv: KV, signers: Authorities, membership: Membership, clock: Clock) -> Joined:
    """Sign for a member, and have etcd know the certificate before anyone has it."""
    now_s = clock.wall_s()
    certificate = await sign(
        Issue(
            authority=signers.hosts,
            public_key=membership.public_key,
            subject=Subject(kind="host", name=membership.host, membership=membership.id),
            addresses=membership.addresses,
            now_s=now_s,
            lifetime_s=signers.lifetime_s,
        )
    )
    while True:
        stored = await kv.get(keys.membership(membership.host))
        held = decode(stored.value, Membership) if stored else membership
        if stored is None or held.id != membership.id or held.expelled_at_s:
            raise expelled_error(held)
        lasting = {serial: end_s for serial, end_s in held.serials.items() if end_s > now_s}
        known = replace(held, serials={**lasting, certificate.serial: certificate.expires_at_s})
        put = await kv.txn(
            [Unchanged(keys.membership(held.host), stored.mod_revision)],
            [Put(keys.membership(held.host), encode(known))],
        )
        if put.succeeded:
            return Joined(authorities=signers, membership=known, certificate=certificate)
