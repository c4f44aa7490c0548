"""A host's own identity over time: put into etcd at the founding, renewed, lost by being expelled.

`keep_identity` renews the certificate after two thirds of its life, keeps the list of refused
certificates that etcd on this host reads (expelled.crl), and ends flyd with `Denied` once its own
host is expelled. A host that was expelled while it was away can not ask etcd, which closes its
connections: `wait_admitted` asks the other flyds, whose addresses are kept on disk for that.
Either way the reason is left in the folder, so that the next start says it at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import structlog

from flyd.errors import Denied, FlydError, Unavailable
from flyd.hosts.joining import expelled_error, renew
from flyd.identity.credentials import Credentials
from flyd.identity.folder import (
    CLIENTS_CA,
    EXPELLED,
    FOUNDING,
    REFUSAL,
    Description,
    describe,
    replace_file,
    write_renewed,
)
from flyd.identity.signing import Revoke, sign
from flyd.identity.subjects import Subject, read_subject
from flyd.model import Authorities, Founding, Host, Membership, Value, decode, encode
from flyd.ports import KV, Clock, Put, Unchanged
from flyd.store import keys
from flyd.store.mirror import Mirror

log = structlog.get_logger(__name__)

ASK_AFTER_S = 5.0
RETRY_S = 5.0
LONGEST_WAIT_S = 86400.0
PEERS = "peers.json"


class Peers(Value, frozen=True, kw_only=True):
    """Where the other flyds answered when etcd was last heard of."""

    api: tuple[str, ...]


class Refusal(Value, frozen=True, kw_only=True):
    """Why this host may not come back, as it was told."""

    message: str
    hint: str


def check_not_expelled(folder: Path) -> None:
    """Raise Denied if this host learned that it was expelled, and has not joined again since."""
    try:
        refusal = decode((folder / REFUSAL).read_bytes(), Refusal)
    except FileNotFoundError:
        return
    raise Denied(refusal.message, hint=refusal.hint)


async def put_founding(kv: KV, folder: Path) -> None:
    """If this host founds the cluster: put authorities and first memberships into etcd, once."""
    path = folder / FOUNDING
    while path.exists():
        founding = decode(path.read_bytes(), Founding)
        members = [Put(keys.membership(m.host), encode(m)) for m in founding.memberships]
        try:
            await kv.txn(
                [Unchanged(keys.AUTHORITIES, 0)],
                [Put(keys.AUTHORITIES, encode(founding.authorities)), *members],
            )
        except Unavailable as error:  # the others' members of etcd may not be up yet
            log.info("identity.founding_waits", error=error.message)
            await asyncio.sleep(RETRY_S / 10)
        else:
            path.unlink()


async def wait_admitted(mirror: Mirror, folder: Path, ask: Callable[[str], Awaitable[None]]) -> None:
    """Return once etcd has been read; raise Denied if the other flyds say that this host is expelled.

    `ask` calls the flyd at an address and raises what that answers.
    """
    while True:
        try:
            async with asyncio.timeout(ASK_AFTER_S):
                return await mirror.wait_synced()
        except TimeoutError:
            await _ask_peers(folder, ask)


async def _ask_peers(folder: Path, ask: Callable[[str], Awaitable[None]]) -> None:
    try:
        peers = decode((folder / PEERS).read_bytes(), Peers)
    except FileNotFoundError:
        return
    for address in peers.api:
        try:
            await ask(address)
        except Denied as denied:
            _remember(folder, denied)
            raise
        except FlydError as error:
            log.info("identity.peer_unavailable", address=address, error=error.message)


async def keep_identity(kv: KV, mirror: Mirror, credentials: Credentials, clock: Clock) -> None:
    """Keep this host's certificate and its list of refused ones current, for ever.

    Certificates end by the wall clock, so here it decides: a host whose clock is wrong by a month is refused.
    """
    folder = credentials.folder
    description = credentials.describe()
    subject = read_subject(description.subject)
    refused: tuple[str, ...] = ()  # as the founding or joining wrote it
    peers: tuple[str, ...] = ()
    while True:
        seen = _changed(mirror)
        memberships = [item.value for item in mirror.list(keys.MEMBERSHIPS, Membership)]
        _check_mine(folder, subject, memberships)
        try:
            if (now := refused_serials(memberships, clock.wall_s())) != refused:
                await _write_refused(kv, folder, now, clock)
                refused = now
            if (others := _others(mirror, subject.name)) != peers:
                replace_file(folder / PEERS, encode(Peers(api=others)))
                peers = others
            wait_s = description.renew_at_s - clock.wall_s()
            if wait_s <= 0:
                description = await _renew(kv, subject, credentials, clock)
                continue
        except Unavailable as error:
            log.warning("identity.not_kept", error=error.message, again_in_s=RETRY_S)
            wait_s = RETRY_S
        await _wait(mirror, seen, min(wait_s, LONGEST_WAIT_S))


def refused_serials(memberships: Sequence[Membership], now_s: float) -> tuple[str, ...]:
    """The certificates that no one may be let in with, and which have not ended by themselves."""
    found = [s for m in memberships for s in m.refused if m.serials.get(s, 0.0) > now_s]
    return tuple(sorted(found))


def _check_mine(folder: Path, subject: Subject, memberships: Sequence[Membership]) -> None:
    mine = next((m for m in memberships if m.host == subject.name), None)
    if mine is not None and (mine.id != subject.membership or mine.expelled_at_s):
        denied = expelled_error(mine)
        _remember(folder, denied)
        raise denied


def _remember(folder: Path, denied: Denied) -> None:
    replace_file(folder / REFUSAL, encode(Refusal(message=denied.message, hint=denied.hint)))


def _others(mirror: Mirror, name: str) -> tuple[str, ...]:
    return tuple(h.value.api_address for h in mirror.list(keys.HOSTS, Host) if h.value.name != name)


async def _write_refused(kv: KV, folder: Path, serials: tuple[str, ...], clock: Clock) -> None:
    stored = await kv.get(keys.AUTHORITIES)
    if stored is None:
        return
    signers = decode(stored.value, Authorities)
    made = await sign(Revoke(authority=signers.hosts, serials=serials, now_s=clock.wall_s()))
    replace_file(folder / EXPELLED, made.text.encode())
    log.info("identity.refused_certificates", count=len(serials))


async def _renew(kv: KV, subject: Subject, credentials: Credentials, clock: Clock) -> Description:
    joined = await renew(kv, subject.name, subject.membership, clock=clock)
    description = describe(
        joined.authorities.cluster_id,
        str(subject),
        expires_at_s=joined.certificate.expires_at_s,
        lifetime_s=joined.authorities.lifetime_s,
    )
    replace_file(credentials.folder / CLIENTS_CA, joined.authorities.clients.certificate_pem.encode())
    write_renewed(credentials.folder, joined.certificate.text, description)
    log.info("identity.renewed", host=subject.name, expires_at_s=round(description.expires_at_s))
    return description


def _changed(mirror: Mirror) -> tuple[int, int]:
    """Differs when anything that is looked at here has changed."""
    return mirror.changed_at(keys.MEMBERSHIPS), mirror.changed_at(keys.HOSTS)


async def _wait(mirror: Mirror, seen: tuple[int, int], timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            while _changed(mirror) == seen:
                await mirror.wait_change(mirror.version)
    except TimeoutError:
        return
