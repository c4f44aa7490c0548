"""An identity folder: what is in it, and how it is written.

    certificate.pem  key.pem   its own; the key never leaves the host that made it
    hosts.pem                  the authority that every host's certificate comes from
    clients.pem                the authority of people and join tokens (hosts only)
    identity.json              cluster, subject, expiry: what people and loops ask for
    expelled.crl               certificates that etcd on this host refuses (hosts only)
    founding.json              what the founding host is to put into etcd, once
    peers.json  refused.json   where the other flyds answer; why this host is not let in any more

Every file is replaced in one step, and the key is written before the certificate that goes
with it: whatever instant the power fails at, the folder is the old identity, the new one, or
(before the first certificate) none. A renewal keeps the key and replaces the certificate alone.
"""

from __future__ import annotations

import os
from pathlib import Path

from flyd.model import Value, encode

PRIVATE = 0o600

CERTIFICATE, KEY = "certificate.pem", "key.pem"
HOSTS_CA, CLIENTS_CA = "hosts.pem", "clients.pem"
DESCRIPTION = "identity.json"
EXPELLED = "expelled.crl"
FOUNDING = "founding.json"
REFUSAL = "refused.json"


class Description(Value, frozen=True, kw_only=True):
    """What an identity is, in words. A host renews its certificate at `renew_at_s`."""

    cluster_id: str
    subject: str
    expires_at_s: float
    renew_at_s: float


def describe(cluster_id: str, subject: str, *, expires_at_s: float, lifetime_s: float) -> Description:
    """An identity that is renewed when a third of its life is left."""
    return Description(
        cluster_id=cluster_id,
        subject=subject,
        expires_at_s=expires_at_s,
        renew_at_s=expires_at_s - lifetime_s / 3,
    )


class Identity(Value, frozen=True, kw_only=True):
    """All that an identity folder holds; PEM texts. `clients` and `expelled` are for hosts only."""

    description: Description
    key: str
    certificate: str
    hosts: str
    clients: str = ""
    expelled: str = ""


def write_identity(folder: Path, identity: Identity) -> None:
    """Write a whole identity; the certificate comes last."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, data in files(identity).items():
        replace_file(folder / name, data)


def files(identity: Identity) -> dict[str, bytes]:
    """The folder's files in the order of writing, for a folder that is not on this machine's disk."""
    texts = {
        KEY: identity.key,
        HOSTS_CA: identity.hosts,
        CLIENTS_CA: identity.clients,
        EXPELLED: identity.expelled,
    }
    written = {name: text.encode() for name, text in texts.items() if text}
    return {
        **written,
        DESCRIPTION: encode(identity.description),
        CERTIFICATE: identity.certificate.encode(),
    }


def write_renewed(folder: Path, certificate: str, description: Description) -> None:
    """Replace the certificate; the description after it, so that a half-done renewal is done again."""
    replace_file(folder / CERTIFICATE, certificate.encode())
    replace_file(folder / DESCRIPTION, encode(description))


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, readable by its owner alone."""
    new = path.with_name(path.name + ".new")
    handle = os.open(new, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, PRIVATE)
    try:
        os.write(handle, data)
        os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(new, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
