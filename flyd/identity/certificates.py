"""The cluster's own certificate authorities, and what they sign.

There are two authorities, so that who may come in as what is decided in the handshake:

- `hosts` signs hosts. etcd trusts it alone: only a host reaches the cluster's memory.
- `clients` signs people and join tokens. flyd's API trusts both, etcd does not trust this one.

A certificate's common name says who it is (`Subject`): `host:<name>:<membership>`,
`user:<name>`, `join:<token>`. A membership is one stay of a host in the cluster; it is kept
through renewals and ends when the host is expelled, so nobody needs to compare serial numbers.

All functions are pure but for the randomness of keys and serial numbers. `cryptography` takes
20 MB: the daemon calls these through signer.py, in a process of their own.
"""

from __future__ import annotations

import base64
import datetime
import ipaddress
from collections.abc import Sequence
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from flyd.errors import InvalidInput
from flyd.identity.subjects import ANY_HOST, Subject, host_dns_name
from flyd.model import Authorities, Authority, Value

AUTHORITY_LIFETIME_S = 20 * 365 * 86400.0
BACKDATED_S = 3600.0  # hosts' clocks differ


class Issued(Value, frozen=True, kw_only=True):
    """A signed certificate."""

    certificate_pem: str
    serial: str  # hexadecimal
    expires_at_s: float


def new_authorities(cluster_id: str, now_s: float, lifetime_s: float) -> Authorities:
    """The two authorities of a new cluster."""
    hosts, clients = (_new_authority(f"flyd {cluster_id} {kind}", now_s) for kind in ("hosts", "clients"))
    return Authorities(cluster_id=cluster_id, hosts=hosts, clients=clients, lifetime_s=lifetime_s)


def new_key() -> str:
    """A new private key (P-256), PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def public_key(key_pem: str) -> str:
    """The public half of a private key, PEM."""
    return _public_pem(_private_key(key_pem).public_key())


def issue(
    authority: Authority,
    public_key_pem: str,
    subject: Subject,
    addresses: Sequence[str],
    *,
    now_s: float,
    lifetime_s: float,
) -> Issued:
    """Sign a certificate; `addresses` are the IP addresses at which a host answers (empty for others)."""
    try:
        key = serialization.load_pem_public_key(public_key_pem.encode())
    except ValueError as error:
        raise InvalidInput(f"not a public key: {error}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise InvalidInput("a host's key must be of an elliptic curve (P-256)")
    signer = x509.load_pem_x509_certificate(authority.certificate_pem.encode())
    serial = x509.random_serial_number()
    expires_at_s = now_s + lifetime_s
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(str(subject)))
        .issuer_name(signer.subject)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(_time(now_s - BACKDATED_S))
        .not_valid_after(_time(expires_at_s))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(_usages(subject.kind)), critical=False)
    )
    if subject.kind == "host":
        names: list[x509.GeneralName] = [x509.DNSName(host_dns_name(n)) for n in (subject.name, ANY_HOST)]
        names += [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    signed = builder.sign(_private_key(authority.key_pem), hashes.SHA256())
    return Issued(certificate_pem=_pem(signed), serial=f"{serial:x}", expires_at_s=expires_at_s)


def revocation_list(authority: Authority, serials: Sequence[str], now_s: float) -> str:
    """The list that makes etcd refuse these certificates, PEM; it is replaced, it does not expire."""
    signer = x509.load_pem_x509_certificate(authority.certificate_pem.encode())
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(signer.subject)
        .last_update(_time(now_s - BACKDATED_S))
        .next_update(_time(now_s + AUTHORITY_LIFETIME_S))
    )
    for serial in serials:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder()
            .serial_number(int(serial, 16))
            .revocation_date(_time(now_s))
            .build()
        )
    signed = builder.sign(_private_key(authority.key_pem), hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM).decode()


def certificate_to_text(pem: str) -> str:
    """A certificate as one short word, for a token."""
    der = x509.load_pem_x509_certificate(pem.encode()).public_bytes(serialization.Encoding.DER)
    return base64.urlsafe_b64encode(der).decode().rstrip("=")


def certificate_from_text(text: str) -> str:
    """The certificate again, PEM."""
    try:
        der = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        return _pem(x509.load_der_x509_certificate(der))
    except ValueError as error:
        raise InvalidInput(f"not a certificate: {error}") from None


def key_to_text(key_pem: str) -> str:
    """A private key as one short word, for a token."""
    number = _private_key(key_pem).private_numbers().private_value
    return base64.urlsafe_b64encode(number.to_bytes(32, "big")).decode().rstrip("=")


def key_from_text(text: str) -> str:
    """The private key again, PEM."""
    try:
        number = int.from_bytes(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), "big")
        key = ec.derive_private_key(number, ec.SECP256R1())
    except ValueError as error:
        raise InvalidInput(f"not a key: {error}") from None
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def _new_authority(name: str, now_s: float) -> Authority:
    key_pem = new_key()
    key = _private_key(key_pem)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_time(now_s - BACKDATED_S))
        .not_valid_after(_time(now_s + AUTHORITY_LIFETIME_S))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                key_cert_sign=True,
                crl_sign=True,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate_pem=_pem(certificate), key_pem=key_pem)


def _usages(kind: Literal["host", "user", "join"]) -> list[x509.ObjectIdentifier]:
    """A host answers and asks; all others only ask."""
    client = [ExtendedKeyUsageOID.CLIENT_AUTH]
    return [*client, ExtendedKeyUsageOID.SERVER_AUTH] if kind == "host" else client


def _private_key(pem: str) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem.encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def _public_pem(key: ec.EllipticCurvePublicKey) -> str:
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ).decode()


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _time(at_s: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(at_s, datetime.UTC)
